"""From the chains of a zoo to a graph. Only records are read here; what goes on the device, and when,
is for `weights/cache.py` to decide."""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jblock.blocks.spec import (
    AttentionSpec,
    ComponentSpec,
    ExpertSpec,
    RouterSpec,
)
from jblock.engine.adapters.slot_tables import Tables
from jblock.engine.config import EngineConfig
from jblock.engine.graph.boundaries import boundaries, partings
from jblock.engine.graph.expert_parallel import ExpertGroup
from jblock.engine.graph.graph import (
    BlockInstance,
    Hop,
    Layer,
    Route,
    ServingGraph,
    Stage,
    Tied,
)
from jblock.engine.graph.layer_runs import layer_runs
from jblock.engine.graph.order import visiting_order
from jblock.engine.graph.page_names import kv_digests, plain_digests
from jblock.engine.graph.segments import segments
from jblock.engine.graph.span_placement import HOME, Layout, SpanPlacement, layout_of
from jblock.engine.graph.stitches import check_widths, positions
from jblock.engine.graph.table_forms import Looked, TableForms, Targets, read_deltas
from jblock.engine.kv_cache.prefix_keys import step_digests
from jblock.engine.kv_cache.sequence_pages import Boundary
from jblock.engine.kv_cache.spec import KVShape
from jblock.engine.signature import Signature, TableForm
from jblock.engine.weights import params as parameters
from jblock.engine.weights.needs import Needs, Part
from jblock.engine.weights.residents import Adapter, Weights, WeightSet
from jblock.parallel.placement import Placement
from jblock.zoo.partition import Block, BlockPlan
from jblock.zoo.records import Chain, ComponentRecord
from jblock.zoo.store import Zoo

# Calls cost the host and the device some time each; longer segments only cost more to compile.
SEGMENT_COMPONENTS = 32


def assemble(
    zoo: Zoo,
    chains: Mapping[str, Chain],
    config: EngineConfig,
    previous: ServingGraph | None = None,
    targets: Targets | None = None,
    placement: Placement | None = None,
    spans: SpanPlacement | None = None,
) -> ServingGraph:
    """Builds the routes of chains through shared blocks. A thousand adapters on one base
    cost little more than ten. Slot tables are made here where nothing is served yet; else
    `ServingGraph.make_tables` is to be called before it is served.

    Args:
      zoo: where records are read from.
      chains: what may be asked for, by public name.
      config: of the agent.
      previous: what is served now. Blocks that stay as they were stay the same instances, and it goes on
        working until nobody holds it.
      targets: what to make tables for, beside what is known to be adapted.
      placement: the devices it is for; None: those of the previous one, or of this process.
      spans: which steps lie on this agent; None: as of the previous one, or all.

    Raises:
      ZooError: a record the zoo cannot read.
      ValueError: a chain this engine cannot run.
    """
    if placement is None:
        placement = previous.placement if previous else Placement.on(config.sharding)
    if spans is None and previous:
        spans = previous.spans
    builder = _Builder(zoo, chains, config, previous, placement, spans)
    builder.find_tables(targets or {})
    # Without sharing, every chain is an isolation domain of its own.
    domains = {"": dict(chains)} if config.share else {n: {n: c} for n, c in chains.items()}
    routes: dict[str, Route] = {}
    for domain, members in domains.items():
        routes |= builder.routes(domain, members)
    graph = ServingGraph(
        zoo=zoo,
        routes={name: routes[name] for name in chains},
        instances=visiting_order(routes.values()),
        targets=builder.tables.lasting,
        pinned=tuple(name for name in config.pinned if name in chains),
        placement=builder.placement,
        plans=builder.plans,
        spans=spans,
        cache=builder.cache,
    )
    if previous is None:
        graph.make_tables()
    return graph


class _Builder:
    """Makes the routes of one graph. Whatever the last one has too is taken over from it."""

    def __init__(
        self,
        zoo: Zoo,
        chains: Mapping[str, Chain],
        config: EngineConfig,
        previous: ServingGraph | None,
        placement: Placement,
        spans: SpanPlacement | None = None,
    ):
        self.zoo, self.chains, self.config = zoo, chains, config
        self.placement, self.spans = placement, spans
        self.cache: dict[Any, Any] = {}
        self.plans: dict[str, BlockPlan] = {}
        self._previous = previous
        self._before = previous.cache if previous else {}

    def _keep(self, key: Any, make) -> Any:
        if key not in self.cache:
            self.cache[key] = self._before[key] if key in self._before else make()
        return self.cache[key]

    def _record(self, component: str) -> ComponentRecord:
        return self._keep(("record", component), lambda: self.zoo.component(component))

    def _specs(self, ids: Sequence[str]) -> list[ComponentSpec]:
        return [self._record(component).spec for component in ids]

    def find_tables(self, more: Targets) -> None:
        """What has tables, of what form; those of `more` too."""

        def read(spec: ComponentSpec, ids: tuple[str, ...]) -> Looked | None:
            key = ("targets", spec, ids)
            try:
                return self._keep(key, lambda: read_deltas(spec, ids, self.zoo.delta))
            except ValueError:
                return None  # who asks for the chain will hear of it

        self.tables = TableForms(
            self.chains.values(),
            lambda component: self._record(component).spec,
            read,
            self.config,
            self._previous.targets if self._previous else {},
            more,
        )

    def routes(self, domain: str, chains: Mapping[str, Chain]) -> dict[str, Route]:
        """Routes of chains that share what they can."""
        of = {name: layout_of(chain, self.spans, self._specs) for name, chain in chains.items()}
        # Adapters have their base's components: what these decide is worked out once.
        first = {ids: name for name, ids in reversed(of.items())}
        served = {name: chains[name] for name in first.values()}
        plan = self.zoo.block_plan(served)
        self.plans[domain] = plan
        digests = {
            chain.name: self._keep(("digests", chain.steps), lambda c=chain: step_digests(c.steps))
            for chain in chains.values()
        }
        # An activated LoRA finds its base's pages instead.
        parting = partings(digests[c.name] for c in chains.values() if not c.invocation)
        stages, parts = {}, {}
        for layout, name in first.items():
            specs = self._specs(layout.components)
            check_widths(name, specs)
            parts[layout] = self._parts(domain, layout.here)
            stages[layout] = tuple(self._stages(domain, specs, layout, plan.blocks[name]))
        return {
            name: self._route(
                domain,
                chain,
                of[name],
                parts[of[name]],
                stages[of[name]],
                # Where a chain leaves this agent, its rows are not kept.
                ()
                if self.spans or chain.invocation
                else boundaries(stages[of[name]], digests[chain.name], parting),
            )
            for name, chain in chains.items()
        }

    def _stages(
        self,
        domain: str,
        specs: Sequence[ComponentSpec],
        layout: Layout,
        blocks: Sequence[Block],
    ) -> Iterator[Stage]:
        """The stages of a chain on this agent. Where rows leave there is a hop: at home in front of each span
        of another agent, on other agents behind each of theirs."""
        spans: collections.Counter[int] = collections.Counter()
        for agent, own in layout.runs(blocks):
            if agent == layout.agent:
                yield from (self._stage(domain, specs, layout, block) for block in own)
                if agent != HOME:
                    yield self._hop(None, specs[own[-1].first + len(own[-1].components)], 0)
            elif layout.agent == HOME:
                yield self._hop(agent, specs[own[0].first], spans[agent])
                spans[agent] += 1

    def _hop(self, agent: int | None, reader: ComponentSpec, span: int) -> Stage:
        width = reader.hidden_size
        name = "hop_home" if agent is None else f"hop_{agent}"
        hop = functools.partial(Hop, name, (), (), agent=agent, width=width)
        return Stage(self._keep(("hop", agent, width), hop), {}, span=span)

    def _route(
        self,
        domain: str,
        chain: Chain,
        layout: Layout,
        parts: tuple[Part, ...],
        stages: tuple[Stage, ...],
        parted: tuple[Boundary, ...],
    ) -> Route:
        """The route of a chain; the same one as before where all of it stayed as it was."""
        ids = tuple(part.component for part in parts)
        members: dict[Weights, None] = {}
        for part, of in zip(parts, self._expert_parts(p.spec for p in parts), strict=True):
            found = self._weights(domain, part.component, of)
            members[found.owner if isinstance(found, Tied) else found] = None
        weights = self._keep(("weight set", domain, ids), lambda: WeightSet(tuple(members)))
        whole = chain
        if layout.agents:
            own = tuple(s for i, s in enumerate(chain.steps) if layout.is_here(i))
            chain = dataclasses.replace(chain, steps=own)
        adapter = self._adapter(domain, chain)
        places = tuple((b.stage, b.layer) for b in parted)
        key = ("route", domain, chain.name, tuple(id(s) for s in (*parts, *stages)), places)
        route = self._before.get(key)
        if route is None or route.chain != whole:
            route = Route(
                needs=Needs(chain, parts, weights, adapter),
                stages=stages,
                kv_digests=kv_digests(whole, layout, parts),
                plain_digests=plain_digests(whole, layout, parts),
                virtual_tokens=self.tables.virtual.get(chain.name, 0),
                boundaries=parted,
                whole=whole if layout.agents else None,
            )
        self.cache[key] = route
        return route

    def _parts(self, domain: str, ids: tuple[str, ...]) -> tuple[Part, ...]:
        parts = []
        for component in ids:
            spec, form = self._record(component).spec, self._form(domain, component)
            tables = self._tables(domain, component, form) if form else None
            part = functools.partial(Part, component, spec, form, tables)
            parts.append(self._keep(("part", domain, component, form), part))
        return tuple(parts)

    def _stage(
        self, domain: str, specs: Sequence[ComponentSpec], layout: Layout, block: Block
    ) -> Stage:
        """A block at its place in a chain of these components."""
        forms = tuple(self._form(domain, component) for component in block.components)
        key = ("block", domain, block.components, forms)
        instance = self._keep(key, lambda: self._instance(domain, block.components, forms))
        before = collections.Counter(
            KVShape.of(s)
            for i, s in enumerate(specs[: block.first])
            if isinstance(s, AttentionSpec) and layout.is_here(i)
        )
        at = positions(specs, block)
        place = ("stage", key, tuple(sorted(before.items())), at)
        return self._keep(place, lambda: Stage(instance, before, at))

    def _form(self, domain: str, component: str) -> TableForm | None:
        return self.tables.form(component, self._record(component).spec, domain)

    def _tables(self, domain: str, component: str, form: TableForm) -> Tables:
        spec = self._record(component).spec
        return self._keep(("tables", domain, component), lambda: Tables(spec, form, self.placement))

    def _expert_parts(self, specs: Iterable[ComponentSpec]) -> list[int | None]:
        """For each of a run of components the part of the mesh's experts it lies on; None: all devices."""
        ways = self.placement.rules.ways("experts")
        parts: list[int | None] = []
        dealt: Iterator[int] = iter(())
        for spec in specs:
            parts.append(next(dealt, None) if isinstance(spec, ExpertSpec) else None)
            if isinstance(spec, RouterSpec) and ways > 1:
                number = spec.num_experts
                dealt = iter([i * ways // number for i in range(number)])
        return parts

    def _weights(self, domain: str, component: str, part: int | None = None) -> Weights | Tied:
        record = self._record(component)
        # The table lies as an embedding's: a head that wants it the other way round has one of its own, in
        # bfloat16 on a CPU without AVX-512. In float32 that is not worth its memory.
        if record.refs and (self.config.dtype == "float32" or self.placement.platform.out_in):
            owner, tensor = record.refs["weight"]
            found = self._weights(domain, owner)
            if isinstance(found, Tied):
                raise ValueError(f"component {component} is tied to one that is tied: damaged")
            return Tied(found, tensor)
        placement = self.placement if part is None else self.placement.expert_part(part)
        return self._keep(
            ("weights", domain, component, part),
            lambda: Weights(
                name=f"component {component}",
                component=component,
                spec=record.spec,
                size=parameters.param_bytes(record.spec, self.config.dtype, placement),
                placement=placement,
            ),
        )

    def _adapter(self, domain: str, chain: Chain) -> Adapter | None:
        deltas = tuple({s.component: s.deltas for s in chain.steps if s.deltas}.items())
        if not deltas:
            return None
        pieces, places = self.tables.table_pieces, self.tables.places_for(chain.name)
        make = functools.partial(
            Adapter,
            name=f"the adapter of model {chain.name!r}",
            deltas=deltas,
            table_pieces=pieces,
            places=places,
        )
        return self._keep(("adapter", domain, deltas, pieces, places), make)

    def _instance(
        self, domain: str, components: tuple[str, ...], forms: tuple[TableForm | None, ...]
    ) -> BlockInstance:
        """A block with its layers."""
        specs = [self._record(component).spec for component in components]
        layers = [
            self._layer(domain, [components[i] for i in run], [forms[i] for i in run])
            for run in layer_runs(specs)
        ]
        return BlockInstance(
            name=f"{layers[0].signature.kind}_{components[0][:8]}",
            segments=segments(layers, SEGMENT_COMPONENTS),
            singles=segments(layers, 1),
        )

    def _layer(self, domain: str, ids: list[str], forms: list[TableForm | None]) -> Layer:
        specs = tuple(self._record(component).spec for component in ids)
        members = [
            self._weights(domain, component, part)
            for component, part in zip(ids, self._expert_parts(specs), strict=True)
        ]
        signature = Signature(
            specs=specs,
            forms=tuple(forms),
            dtype=self.config.dtype,
            tied=isinstance(members[-1], Tied),
            sharding=self.placement.rules,
        )
        structs = parameters.abstract_params(signature, self.placement)
        weights = tuple(
            members[of[0]] if len(of) == 1 else ExpertGroup([members[i] for i in of], struct)
            for of, struct in zip(signature.arguments, structs, strict=True)
        )
        shapes = [KVShape.of(spec) for spec in signature.attentions]
        return Layer(
            signature=signature,
            weights=weights,
            tables=tuple(
                self._tables(domain, ids[i], form).view(form) if (form := forms[i]) else {}
                for i, *_ in signature.arguments
            ),
            kv_shape=shapes[0] if shapes else None,
        )
