"""From chains in a zoo to blocks resident on this agent: instances, units and the route of each chain."""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jblock.blocks import layout
from jblock.blocks.spec import AttentionSpec, ComponentSpec, EmbeddingSpec, LoraSpec
from jblock.engine import params as parameters
from jblock.engine.batching import Underway
from jblock.engine.config import Bucket, EngineConfig
from jblock.engine.policy import NO_LIMIT
from jblock.engine.sequence import Item
from jblock.engine.signature import LoraForm, Signature
from jblock.parallel.placement import Placement
from jblock.zoo.partition import Block, blocks
from jblock.zoo.records import Chain, Step
from jblock.zoo.store import Zoo

# Calls cost the host and the device some time each; longer segments only cost more to compile.
SEGMENT_COMPONENTS = 32


@dataclasses.dataclass(frozen=True, order=True)
class KvGroup:
    """The attention layers of one KV shape in a chain. Chains of equal groups share its pools: a
    sequence passes one block at each depth, so layer i of the pool serves every variant of layer i."""

    num_kv_heads: int
    head_dim: int
    layers: int


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """What one executable call runs: an embedding, one layer, or a head.

    Attributes:
      signature: decides the program.
      params: one dict of device tensors a component.
      tables: one dict of LoRA slot tables a component; empty where it has none.
      group: KV group its attention belongs to; None without attention.
      kv_layer: index of its attention in the group's pools.
    """

    signature: Signature
    params: tuple[parameters.Tensors, ...]
    tables: tuple[parameters.Tensors, ...]
    group: KvGroup | None = None
    kv_layer: int = 0


@dataclasses.dataclass(eq=False)
class Instance:
    """A block resident on this agent, with its own queue.

    Attributes:
      name: for traces and logs.
      depth: index of its first step in the chains that use it; the sweep goes in this order.
      units: run one after another over the same rows.
      segments: the units again, in runs that one program may carry.
      queue: items ready to run here.
      underway: the batch of prompts that stays between two of its layers, if the last step ended there.
      limit: rows it may decode in a step.
      wanted: rows that have lately come to it in a step.
      calls_by_bucket: what runs it on each grid, as the device looked it up last.
    """

    name: str
    depth: int
    units: tuple[Unit, ...]
    segments: tuple[tuple[Unit, ...], ...] = ()
    queue: collections.deque[Item] = dataclasses.field(default_factory=collections.deque)
    underway: Underway | None = None
    limit: int = NO_LIMIT
    wanted: float = 0.0
    calls_by_bucket: dict[Bucket, tuple[int, list]] = dataclasses.field(default_factory=dict)

    @property
    def is_head(self) -> bool:
        """Whether it ends a chain with logits."""
        return self.units[0].signature.kind == "head"


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """One served chain.

    Attributes:
      chain: its record.
      specs: of its components, one a step.
      instances: the blocks a row of it visits, in order.
      groups: the KV groups its sequences need pages in.
      slot: its slot in the delta tables; 0 is none.
      shared_blocks: how many of its blocks another route uses too.
    """

    chain: Chain
    specs: tuple[ComponentSpec, ...]
    instances: tuple[Instance, ...]
    groups: tuple[KvGroup, ...]
    slot: int
    shared_blocks: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Assembly:
    """Everything resident on one agent.

    Attributes:
      routes: by chain name.
      instances: in sweep order.
      resident_bytes: of all parameters and slot tables.
      params: device tensors by component id and whether they are a tied table; what the next assembly
        takes over instead of loading it again.
      by_key: instances by what decides them; the next assembly takes over those it needs unchanged.
    """

    routes: dict[str, Route]
    instances: tuple[Instance, ...]
    resident_bytes: int
    params: dict[tuple[str, bool], parameters.Tensors] = dataclasses.field(default_factory=dict)
    by_key: dict[tuple, Instance] = dataclasses.field(default_factory=dict)


def assemble(
    zoo: Zoo, chains: Mapping[str, Chain], config: EngineConfig, previous: Assembly | None = None
) -> Assembly:
    """Loads the components of `chains` and wires them into instances.

    Args:
      zoo: where components are read from.
      chains: what to serve, by public name.
      config: of the agent.
      previous: what is resident now. Its parameters are not loaded again, blocks that stay as they
        were stay the same instances, and it goes on working until nobody holds it.

    Raises:
      ZooError: a record or tensor the zoo cannot read.
      ValueError: a chain this engine cannot run.
    """
    if config.share:
        return _assemble(zoo, chains, config, previous)
    parts = [_assemble(zoo, {name: chain}, config, None) for name, chain in chains.items()]
    instances = sorted((i for p in parts for i in p.instances), key=lambda i: i.depth)
    return Assembly(
        routes={name: route for p in parts for name, route in p.routes.items()},
        instances=tuple(instances),
        resident_bytes=sum(p.resident_bytes for p in parts),
    )


def _assemble(
    zoo: Zoo, chains: Mapping[str, Chain], config: EngineConfig, previous: Assembly | None
) -> Assembly:
    loader = _Loader(zoo, chains, config, previous)
    partition = blocks(dict(chains))
    users: dict[tuple, set[str]] = {}
    instances: dict[tuple, Instance] = {}
    wired = {}
    for name, chain in chains.items():
        keys = []
        for block in partition[name]:
            placement = loader.kv_placement(name, block)
            deltas = tuple(loader.delta_key(c) for c in block.components)
            key = (block.components, block.first, placement, deltas)
            if key not in instances:
                kept = previous.by_key.get(key) if previous else None
                instances[key] = kept or loader.instance(chain, block, placement)
            users.setdefault(key, set()).add(name)
            keys.append(key)
        wired[name] = keys
    routes = {
        name: Route(
            chain=chain,
            specs=tuple(loader.records[s.component].spec for s in chain.steps),
            instances=tuple(instances[key] for key in wired[name]),
            groups=loader.groups(name),
            slot=loader.slots.get(name, 0),
            shared_blocks=sum(len(users[key]) > 1 for key in wired[name]),
        )
        for name, chain in chains.items()
    }
    units = [u for i in instances.values() for u in i.units]
    return Assembly(
        routes=routes,
        instances=tuple(sorted(instances.values(), key=lambda i: i.depth)),
        resident_bytes=parameters.nbytes([t for u in units for t in (*u.params, *u.tables)]),
        params=loader.params,
        by_key=instances,
    )


class _Loader:
    """Reads components once each and builds units from them."""

    def __init__(
        self,
        zoo: Zoo,
        chains: Mapping[str, Chain],
        config: EngineConfig,
        previous: Assembly | None,
    ):
        self.zoo, self.chains, self.config = zoo, chains, config
        self.placement = Placement.on(config.sharding)
        ids = {s.component for c in chains.values() for s in c.steps}
        self.records = {i: zoo.component(i) for i in ids}
        self.slots = _slots(chains, previous)
        self.deltas = self._deltas()
        self.forms = self._forms()
        self.params: dict[tuple[str, bool], parameters.Tensors] = {}
        self._resident = previous.params if previous else {}

    def delta_key(self, component: str) -> tuple:
        """What decides the slot tables of a component."""
        if component not in self.deltas:
            return ()
        ids = tuple(
            (slot, step.deltas)
            for name, slot in self.slots.items()
            for step in self.chains[name].steps
            if step.component == component and step.deltas
        )
        return (self.forms[self.records[component].spec], tuple(sorted(ids)))

    def _deltas(self) -> dict[str, dict[int, list[tuple[LoraSpec, dict[str, np.ndarray]]]]]:
        """Component id -> slot -> its LoRA deltas."""
        out: dict[str, dict[int, list]] = {}
        for name, slot in self.slots.items():
            for step in self.chains[name].steps:
                parts = [(self.zoo.delta(d).spec, self.zoo.load_delta(d)) for d in step.deltas]
                if parts:
                    out.setdefault(step.component, {})[slot] = parts
        return out

    def _forms(self) -> dict[ComponentSpec, LoraForm]:
        """One form for all adapted components of a spec, so that they share their programs; with room
        to spare, so that a few adapters more need no other."""
        targets: dict[ComponentSpec, set[str]] = {}
        counts: dict[ComponentSpec, list[list[int]]] = {}
        for component, slots in self.deltas.items():
            spec = self.records[component].spec
            adapters = [[lora for lora, _ in parts] for parts in slots.values()]
            targets.setdefault(spec, set()).update(
                part
                for a in adapters
                for d in a
                for t in d.targets
                for part in layout.parts(spec, t)
            )
            counts.setdefault(spec, []).append([parameters.num_pieces(a) for a in adapters])
        return {
            spec: LoraForm(
                targets=tuple(sorted(targets[spec])),
                slots=_capacity(max(self.slots.values()) + 1),
                pieces=-(-(1 + max(map(sum, pieces))) // 16) * 16,
                turns=_capacity(max(map(max, pieces))),
            )
            for spec, pieces in counts.items()
        }

    def groups(self, name: str) -> tuple[KvGroup, ...]:
        """The KV groups of a chain."""
        shapes: collections.Counter[tuple[int, int]] = collections.Counter()
        for step in self.chains[name].steps:
            spec = self.records[step.component].spec
            if isinstance(spec, AttentionSpec):
                shapes[spec.num_kv_heads, spec.head_dim] += 1
        return tuple(KvGroup(h, d, n) for (h, d), n in sorted(shapes.items()))

    def kv_placement(self, name: str, block: Block) -> tuple[tuple[KvGroup, int], ...]:
        """For each attention of the block: its group, and its layer in the group's pools."""
        by_shape = {(g.num_kv_heads, g.head_dim): g for g in self.groups(name)}
        seen: collections.Counter[KvGroup] = collections.Counter()
        placement = []
        steps = self.chains[name].steps[: block.first + len(block.components)]
        for position, step in enumerate(steps):
            spec = self.records[step.component].spec
            if isinstance(spec, AttentionSpec):
                group = by_shape[spec.num_kv_heads, spec.head_dim]
                if position >= block.first:
                    placement.append((group, seen[group]))
                seen[group] += 1
        return tuple(placement)

    def instance(
        self, chain: Chain, block: Block, placement: Sequence[tuple[KvGroup, int]]
    ) -> Instance:
        """A block with its parameters on the device."""
        kv = iter(placement)
        units: list[Unit] = []
        steps = chain.steps[block.first : block.first + len(block.components)]
        for run in _unit_runs([self.records[s.component].spec for s in steps]):
            units.append(self._unit([steps[i] for i in run], kv))
        name = f"{units[0].signature.kind}_{block.first}_{block.components[0][:8]}"
        return Instance(name=name, depth=block.first, units=tuple(units), segments=_segments(units))

    def _unit(self, steps: Sequence[Step], kv) -> Unit:
        records = [self.records[s.component] for s in steps]
        specs = tuple(r.spec for r in records)
        lora = tuple(self.forms[r.spec] if r.id in self.deltas else None for r in records)
        tied = bool(records[-1].refs) and self.config.dtype == "float32"
        signature = Signature(
            specs=specs,
            lora=lora,
            dtype=self.config.dtype,
            tied=tied,
            sharding=self.placement.rules,
        )
        group, layer = next(kv) if signature.attentions else (None, 0)
        return Unit(
            signature=signature,
            params=tuple(self._load(r.id, tied and bool(r.refs)) for r in records),
            tables=tuple(
                parameters.lora_tables(r.spec, form, self.deltas.get(r.id, {}), self.placement)
                for r, form in zip(records, lora, strict=True)
            ),
            group=group,
            kv_layer=layer,
        )

    def _load(self, component: str, tied: bool) -> parameters.Tensors:
        """Device tensors of a component, read once; a tied table is its embedding's own array."""
        key = (component, tied)
        if key not in self.params:
            record = self.records[component]
            if key in self._resident:
                self.params[key] = self._resident[key]
            elif tied:
                owner, tensor = record.refs["weight"]
                self.params[key] = {"weight": self._load(owner, False)[tensor]}
            else:
                self.params[key] = parameters.prepare(
                    record.spec,
                    self.zoo.load_component(component),
                    self.config.dtype,
                    False,
                    self.placement,
                )
        return self.params[key]


def _segments(units: Sequence[Unit]) -> tuple[tuple[Unit, ...], ...]:
    """Runs of layers of one KV group, of SEGMENT_COMPONENTS at most, that one program may carry."""
    runs: list[list[Unit]] = []
    for unit in units:
        joins = (
            bool(runs)
            and unit.signature.kind == "layer"
            and unit.group == runs[-1][-1].group
            and sum(len(u.signature.specs) for u in [*runs[-1], unit]) <= SEGMENT_COMPONENTS
        )
        if joins:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return tuple(tuple(run) for run in runs)


def _slots(chains: Mapping[str, Chain], previous: Assembly | None) -> dict[str, int]:
    """A slot for every chain with deltas; one that is resident already keeps its own."""
    adapted = [n for n, c in chains.items() if any(s.deltas for s in c.steps)]
    slots = {
        name: previous.routes[name].slot
        for name in adapted
        if previous and name in previous.routes and previous.routes[name].chain == chains[name]
    }
    free = (i for i in itertools.count(1) if i not in set(slots.values()))
    return {name: slots[name] if name in slots else next(free) for name in adapted}


def _capacity(slots: int) -> int:
    """A power of two from 4 on that holds `slots`."""
    return max(4, 1 << (slots - 1).bit_length())


def _unit_runs(specs: Sequence[ComponentSpec]) -> list[list[int]]:
    """Cuts a block into units: an attention with the ffn, or the router and experts, behind it; or norm
    with unembedding."""
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
