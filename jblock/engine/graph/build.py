"""From the chains of a zoo to a graph. Only records are read here; what goes on the device, and when,
is for `residency.py` to decide."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jblock.blocks.spec import (
    AttentionSpec,
    ComponentSpec,
    EmbeddingSpec,
    ExpertSpec,
    RouterSpec,
)
from jblock.engine.adapters import compose as slot_content
from jblock.engine.adapters.slot_tables import Tables
from jblock.engine.config import EngineConfig
from jblock.engine.graph.expert_parallel import ExpertGroup
from jblock.engine.graph.graph import (
    BlockInstance,
    KvGroup,
    Layer,
    Part,
    Route,
    ServingGraph,
    Tied,
    Wiring,
)
from jblock.engine.graph.stitches import check_widths, positions
from jblock.engine.signature import Signature, TableForm
from jblock.engine.weights import params as parameters
from jblock.engine.weights.residents import Adapter, Weights, WeightSet
from jblock.parallel.placement import Placement
from jblock.zoo.partition import Block, blocks
from jblock.zoo.records import Chain, ComponentRecord
from jblock.zoo.store import Zoo

# Calls cost the host and the device some time each; longer segments only cost more to compile.
SEGMENT_COMPONENTS = 32


def assemble(
    zoo: Zoo,
    chains: Mapping[str, Chain],
    config: EngineConfig,
    previous: ServingGraph | None = None,
    targets: Mapping[ComponentSpec, frozenset[str]] | None = None,
    placement: Placement | None = None,
) -> ServingGraph:
    """Wires chains into instances. A thousand adapters on one base cost little more than ten.

    Args:
      zoo: where records are read from.
      chains: what may be asked for, by public name.
      config: of the agent.
      previous: what is served now. Blocks that stay as they were stay the same instances, and it goes on
        working until nobody holds it.
      targets: what to make tables for, beside what is known to be adapted.
      placement: the devices it is for; None: those of the previous one, or of this process.

    Raises:
      ZooError: a record the zoo cannot read.
      ValueError: a chain this engine cannot run.
    """
    if placement is None:
        placement = previous.placement if previous else Placement.on(config.sharding)
    wirer = _Wirer(zoo, chains, config, previous, placement)
    wirer.find_targets(targets or {})
    # Without sharing, every chain is a world of its own.
    worlds = {"": dict(chains)} if config.share else {n: {n: c} for n, c in chains.items()}
    routes: dict[str, Route] = {}
    for world, members in worlds.items():
        routes |= wirer.routes(world, members)
    instances = {id(i): i for route in routes.values() for i in route.instances}
    return ServingGraph(
        zoo=zoo,
        routes={name: routes[name] for name in chains},
        instances=tuple(sorted(instances.values(), key=lambda i: i.depth)),
        targets=wirer.targets,
        pinned=tuple(name for name in config.pinned if name in chains),
        placement=wirer.placement,
        known=wirer.known,
    )


class _Wirer:
    """Makes the routes of one graph. Whatever the last one has too is taken over from it."""

    def __init__(
        self,
        zoo: Zoo,
        chains: Mapping[str, Chain],
        config: EngineConfig,
        previous: ServingGraph | None,
        placement: Placement,
    ):
        self.zoo, self.chains, self.config = zoo, chains, config
        self.placement = placement
        self.known: dict[Any, Any] = {}
        self.targets: dict[ComponentSpec, frozenset[str]] = {}
        self._previous = previous
        self._before = previous.known if previous else {}
        self._adapted: dict[str, set[str]] = {}
        self._virtual: dict[str, int] = {}  # virtual tokens by chain

    def _keep(self, key: Any, make) -> Any:
        if key not in self.known:
            self.known[key] = self._before[key] if key in self._before else make()
        return self.known[key]

    def _record(self, component: str) -> ComponentRecord:
        return self._keep(("record", component), lambda: self.zoo.component(component))

    def _specs(self, ids: Sequence[str]) -> list[ComponentSpec]:
        return [self._record(component).spec for component in ids]

    def find_targets(self, more: Mapping[ComponentSpec, frozenset[str]]) -> None:
        """One set of targets for all adapted components of a spec, so that they share their programs.

        Of a chain not met before one delta a spec is looked at, which nearly always tells of all; where it
        does not, tables are widened when the chain is asked for.
        """
        before = self._previous.targets if self._previous else {}
        found: dict[ComponentSpec, set[str]] = collections.defaultdict(set)
        adapted: set[ComponentSpec] = set()
        for chain in self.chains.values():
            deltas: dict[ComponentSpec, tuple[str, ...]] = {}
            for step in chain.steps:
                if step.deltas:
                    self._adapted.setdefault(step.component, set()).add(chain.name)
                    deltas.setdefault(self._record(step.component).spec, step.deltas)
            for spec, ids in deltas.items():
                adapted.add(spec)
                wanted, virtual = self._keep(
                    ("targets", spec, ids), lambda spec=spec, ids=ids: self._targets(spec, ids)
                )
                found[spec] |= wanted
                self._virtual[chain.name] = max(virtual, self._virtual.get(chain.name, 0))
        for spec in adapted:
            every = found[spec] | before.get(spec, frozenset()) | more.get(spec, frozenset())
            self.targets[spec] = frozenset(every)

    def _targets(self, spec: ComponentSpec, ids: Iterable[str]) -> tuple[frozenset[str], int]:
        """What needs tables for some deltas, and their virtual tokens."""
        try:
            deltas = [self.zoo.delta(id_).spec for id_ in ids]
            return slot_content.targets(spec, deltas), slot_content.virtual_tokens(deltas)
        except ValueError:
            return frozenset(), 0  # who asks for the chain will hear of it

    def routes(self, world: str, chains: Mapping[str, Chain]) -> dict[str, Route]:
        """Routes of chains that share what they can."""
        of = {name: tuple(s.component for s in chain.steps) for name, chain in chains.items()}
        # Adapters have their base's components: what these decide is worked out once.
        first = {ids: name for name, ids in reversed(of.items())}
        served = {name: chains[name] for name in first.values()}
        partition = blocks(served, self.zoo.cut_cost(served))
        users: collections.Counter[tuple] = collections.Counter()
        chains_of = collections.Counter(of.values())
        keys = {}
        for ids, name in first.items():
            check_widths(name, self._specs(ids))
            groups = self._groups(ids)
            keys[ids] = [
                self._block_key(
                    world, b, self._kv_placement(ids, groups, b), positions(self._specs(ids), b)
                )
                for b in partition[name]
            ]
            for key in keys[ids]:
                users[key] += chains_of[ids]
        wirings = {ids: self._wiring(world, ids, keys[ids], users) for ids in first}
        routes = {}
        for name, chain in chains.items():
            wiring = wirings[of[name]]
            fields = {f.name: getattr(wiring, f.name) for f in dataclasses.fields(wiring)}
            routes[name] = Route(
                chain=chain,
                adapter=self._adapter(world, chain),
                virtual_tokens=self._virtual.get(name, 0),
                **fields,
            )
        return routes

    def _wiring(self, world: str, ids: tuple[str, ...], keys: list, users: Mapping) -> Wiring:
        parts = []
        for component in ids:
            spec, form = self._record(component).spec, self._form(world, component)
            tables = self._tables(world, component, form) if form else None
            parts.append(Part(component, spec, form, tables))
        members: dict[Weights, None] = {}
        for component, part in zip(ids, self._expert_parts(p.spec for p in parts), strict=True):
            found = self._weights(world, component, part)
            members[found.owner if isinstance(found, Tied) else found] = None
        return Wiring(
            specs=tuple(p.spec for p in parts),
            instances=tuple(
                self._keep(key, lambda key=key: self._instance(world, key)) for key in keys
            ),
            groups=self._groups(ids),
            parts=tuple(parts),
            weights=self._keep(("weight set", world, ids), lambda: WeightSet(tuple(members))),
            shared_blocks=sum(users[key] > 1 for key in keys),
        )

    def _block_key(
        self, world: str, block: Block, placement: tuple, positions: tuple[int, ...]
    ) -> tuple:
        forms = tuple(self._form(world, component) for component in block.components)
        return ("block", world, block, placement, forms, positions)

    def _form(self, world: str, component: str) -> TableForm | None:
        users = self._adapted.get(component, ())
        if not users or (world and world not in users):
            return None
        return TableForm(
            targets=tuple(sorted(self.targets[self._record(component).spec])),
            slots=self.config.adapter_slots + 1,
            pieces=self.config.adapter_pieces + 1,
        )

    def _tables(self, world: str, component: str, form: TableForm) -> Tables:
        spec = self._record(component).spec
        return self._keep(("tables", world, component), lambda: Tables(spec, form, self.placement))

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

    def _weights(self, world: str, component: str, part: int | None = None) -> Weights | Tied:
        record = self._record(component)
        if record.refs and self.config.dtype == "float32":
            owner, tensor = record.refs["weight"]
            found = self._weights(world, owner)
            if isinstance(found, Tied):
                raise ValueError(f"component {component} is tied to one that is tied: damaged")
            return Tied(found, tensor)
        placement = self.placement if part is None else self.placement.expert_part(part)
        return self._keep(
            ("weights", world, component, part),
            lambda: Weights(
                name=f"component {component}",
                component=component,
                spec=record.spec,
                size=parameters.param_bytes(record.spec, self.config.dtype, placement),
                placement=placement,
            ),
        )

    def _adapter(self, world: str, chain: Chain) -> Adapter | None:
        deltas = tuple({s.component: s.deltas for s in chain.steps if s.deltas}.items())
        if not deltas:
            return None
        name = f"the adapter of model {chain.name!r}"
        return self._keep(("adapter", world, deltas), lambda: Adapter(name=name, deltas=deltas))

    def _groups(self, ids: Sequence[str]) -> tuple[KvGroup, ...]:
        """The KV groups of a chain."""
        shapes: collections.Counter[tuple[int, int]] = collections.Counter()
        for component in ids:
            spec = self._record(component).spec
            if isinstance(spec, AttentionSpec):
                shapes[spec.num_kv_heads, spec.head_dim] += 1
        return tuple(KvGroup(h, d, n) for (h, d), n in sorted(shapes.items()))

    def _kv_placement(
        self, ids: Sequence[str], groups: Sequence[KvGroup], block: Block
    ) -> tuple[tuple[KvGroup, int], ...]:
        """For each attention of the block: its group, and its layer in the group's pools."""
        by_shape = {(g.num_kv_heads, g.head_dim): g for g in groups}
        seen: collections.Counter[KvGroup] = collections.Counter()
        placement = []
        for position, component in enumerate(ids[: block.first + len(block.components)]):
            spec = self._record(component).spec
            if isinstance(spec, AttentionSpec):
                group = by_shape[spec.num_kv_heads, spec.head_dim]
                if position >= block.first:
                    placement.append((group, seen[group]))
                seen[group] += 1
        return tuple(placement)

    def _instance(self, world: str, key: tuple) -> BlockInstance:
        """A block with its units."""
        _, _, block, placement, forms, positions = key
        kv, stitches = iter(placement), iter(positions)
        units: list[Layer] = []
        specs = [self._record(component).spec for component in block.components]
        for run in _unit_runs(specs):
            ids = [block.components[i] for i in run]
            units.append(self._unit(world, ids, [forms[i] for i in run], kv, stitches))
        name = f"{units[0].signature.kind}_{block.first}_{block.components[0][:8]}"
        return BlockInstance(
            name=name, depth=block.first, units=tuple(units), segments=_segments(units)
        )

    def _unit(
        self,
        world: str,
        ids: list[str],
        forms: list[TableForm | None],
        kv: Iterator[tuple[KvGroup, int]],
        positions: Iterator[int],
    ) -> Layer:
        specs = tuple(self._record(component).spec for component in ids)
        members = [
            self._weights(world, component, part)
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
        group, layer = next(kv) if signature.attentions else (None, 0)
        return Layer(
            signature=signature,
            weights=weights,
            tables=tuple(
                self._tables(world, ids[i], form).view(form) if (form := forms[i]) else {}
                for i, *_ in signature.arguments
            ),
            group=group,
            kv_layer=layer,
            position=next(positions) if signature.kind == "stitch" else 0,
        )


def _segments(units: Sequence[Layer]) -> tuple[tuple[Layer, ...], ...]:
    """Runs of layers of one KV group, of SEGMENT_COMPONENTS at most, that one program may carry."""
    runs: list[list[Layer]] = []
    for unit in units:
        joins = (
            bool(runs)
            and unit.signature.kind == runs[-1][-1].signature.kind == "layer"
            and unit.group == runs[-1][-1].group
            and sum(len(u.signature.specs) for u in [*runs[-1], unit]) <= SEGMENT_COMPONENTS
        )
        if joins:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return tuple(tuple(run) for run in runs)


def _unit_runs(specs: Sequence[ComponentSpec]) -> list[list[int]]:
    """Cuts a block into units: an attention with the ffn, or the router and experts, behind it; a stitch;
    or norm with unembedding."""
    runs: list[list[int]] = []
    for i, spec in enumerate(specs):
        previous = specs[runs[-1][-1]].kind if runs else None
        joins = spec.kind == "expert" or (previous, spec.kind) in (
            ("attention", "ffn"),
            ("attention", "router"),
            ("norm", "unembedding"),
        )
        if joins:
            runs[-1].append(i)
        else:
            runs.append([i])
    if any(isinstance(specs[r[0]], EmbeddingSpec) for r in runs) and len(runs) > 1:
        raise ValueError("an embedding is a block of its own; write the partition record anew")
    return runs
