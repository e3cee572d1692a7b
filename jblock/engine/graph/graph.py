"""What an agent serves: blocks with their units, the route of each chain through them, and all of it
together. `wiring.py` makes it of a zoo's chains."""

import collections
import dataclasses
from typing import Any

from jblock.blocks.spec import ComponentSpec
from jblock.engine.adapters.slot_tables import Tables
from jblock.engine.config import Bucket
from jblock.engine.graph.expert_parallel import ExpertGroup
from jblock.engine.runner.batch import Underway
from jblock.engine.scheduling.sequence import WorkItem
from jblock.engine.scheduling.step_budget import NO_LIMIT
from jblock.engine.signature import Signature, TableForm
from jblock.engine.weights import params as parameters
from jblock.engine.weights.residents import Adapter, Resident, Weights, WeightSet
from jblock.parallel.placement import Placement
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo


@dataclasses.dataclass(frozen=True, order=True)
class KvGroup:
    """The attention layers of one KV shape in a chain. Chains of equal groups share its pools: a
    sequence passes one block at each depth, so layer i of the pool serves every variant of layer i."""

    num_kv_heads: int
    head_dim: int
    layers: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tied:
    """An unembedding that reads the table of its embedding as it is."""

    owner: Weights
    tensor: str

    @property
    def tensors(self) -> parameters.Tensors:
        """Device tensors by name; empty while the owner's are not there."""
        return {"weight": self.owner.tensors[self.tensor]} if self.owner.tensors else {}


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """What one executable call runs: an embedding, one layer, or a head.

    Attributes:
      signature: decides the program.
      weights: of each argument (`Signature.arguments`), mostly one component.
      tables: one dict of slot tables an argument, kept up to date; empty where it has none.
      group: KV group its attention belongs to; None without attention.
      kv_layer: index of its attention in the group's pools.
      position: of a stitch, the row of its position tables.
    """

    signature: Signature
    weights: tuple[Weights | Tied | ExpertGroup, ...]
    tables: tuple[parameters.Tensors, ...]
    group: KvGroup | None = None
    kv_layer: int = 0
    position: int = 0

    @property
    def params(self) -> tuple[parameters.Tensors, ...]:
        """One dict of device tensors an argument."""
        return tuple(w.tensors for w in self.weights)


@dataclasses.dataclass(eq=False)
class BlockInstance:
    """A block on this agent, with its own queue.

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
    units: tuple[Layer, ...]
    segments: tuple[tuple[Layer, ...], ...] = ()
    queue: collections.deque[WorkItem] = dataclasses.field(default_factory=collections.deque)
    underway: Underway | None = None
    limit: int = NO_LIMIT
    wanted: float = 0.0
    calls_by_bucket: dict[Bucket, tuple[int, list]] = dataclasses.field(default_factory=dict)

    @property
    def is_head(self) -> bool:
        """Whether it ends a chain with logits."""
        return self.units[0].signature.kind == "head"


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One component of a chain: its id, its spec, and its slot tables with their form, if any chain
    adapts it."""

    component: str
    spec: ComponentSpec
    form: TableForm | None
    tables: Tables | None


@dataclasses.dataclass(frozen=True, eq=False)
class Wiring:
    """What all chains with the same components have in common; Route tells of the fields."""

    specs: tuple[ComponentSpec, ...]
    instances: tuple[BlockInstance, ...]
    groups: tuple[KvGroup, ...]
    parts: tuple[Part, ...]
    weights: WeightSet
    shared_blocks: int


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """One served chain.

    Attributes:
      chain: its record.
      specs: of its components, one a step.
      instances: the blocks a row of it visits, in order.
      groups: the KV groups its sequences need pages in.
      parts: its components, one a step.
      weights: of its components, whether they are on the device or not.
      shared_blocks: how many of its blocks another route uses too.
      adapter: its deltas; None without.
      virtual_tokens: how many its sequences begin with (prompt or prefix tuning).
    """

    chain: Chain
    specs: tuple[ComponentSpec, ...]
    instances: tuple[BlockInstance, ...]
    groups: tuple[KvGroup, ...]
    parts: tuple[Part, ...]
    weights: WeightSet
    shared_blocks: int = 0
    adapter: Adapter | None = None
    virtual_tokens: int = 0

    @property
    def lacks_targets(self) -> bool:
        """Its deltas want tables that are not there."""
        targets = (self.adapter.targets if self.adapter else None) or {}
        return any(
            not targets.get(p.component, frozenset()) <= set(p.form.targets if p.form else ())
            for p in self.parts
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ServingGraph:
    """All chains one agent may serve, and what they share.

    Attributes:
      zoo: where they come from.
      routes: by chain name.
      instances: in sweep order.
      targets: what has tables, by spec.
      pinned: names of the routes that stay on the device.
      placement: the devices it is for.
      known: what the next graph takes over instead of making it again, by what decides it.
    """

    zoo: Zoo
    routes: dict[str, Route]
    instances: tuple[BlockInstance, ...]
    targets: dict[ComponentSpec, frozenset[str]]
    pinned: tuple[str, ...]
    placement: Placement
    known: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def residents(self) -> list[Resident]:
        """All that may come to the device."""
        return [r for r in self.known.values() if isinstance(r, Resident)]

    @property
    def table_bytes(self) -> int:
        """Bytes of all slot tables."""
        return sum(t.nbytes for t in self.known.values() if isinstance(t, Tables))
