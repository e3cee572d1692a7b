"""What an agent serves, as records: layers, blocks, and the route of each chain through them. `build.py`
makes them of a zoo's chains. Nothing here changes while it is served; queues and batches are the runner's."""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jblock.blocks.spec import ComponentSpec
from jblock.engine.adapters.slot_layout import table_bytes
from jblock.engine.graph.expert_parallel import ExpertGroup
from jblock.engine.graph.span_placement import SpanPlacement
from jblock.engine.kv_cache.sequence_pages import Boundary, LayerDigests
from jblock.engine.kv_cache.spec import KVShape, PageShape
from jblock.engine.signature import Signature
from jblock.engine.weights import params as parameters
from jblock.engine.weights.needs import Needs, ResidentSet
from jblock.engine.weights.residents import Adapter, Resident, Weights, WeightSet
from jblock.parallel.placement import Placement
from jblock.zoo.partition import BlockPlan
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo


@dataclasses.dataclass(frozen=True, eq=False)
class Tied:
    """An unembedding that reads the table of its embedding as it is."""

    owner: Weights
    tensor: str
    size: int = 0  # The bytes are the owner's.

    @property
    def tensors(self) -> parameters.Tensors:
        """Device tensors by name; empty while the owner's are not there."""
        return {"weight": self.owner.tensors[self.tensor]} if self.owner.tensors else {}


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """The least that one program runs: an embedding, an attention and what follows it, a stitch, or a head.

    Attributes:
      signature: decides the program.
      weights: of each argument (`Signature.arguments`), mostly one component.
      tables: one dict of slot tables an argument, kept up to date; empty where it has none.
      kv_shape: of the pages of its attention; None without attention.
      kind: "embedding", "layer", "stitch" or "head".
      width: of the register it reads.
    """

    signature: Signature
    weights: tuple[Weights | Tied | ExpertGroup, ...]
    tables: tuple[parameters.Tensors, ...]
    kv_shape: KVShape | None = None
    kind: str = dataclasses.field(init=False)
    width: int = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "kind", self.signature.kind)
        object.__setattr__(self, "width", self.signature.hidden_size)

    @property
    def params(self) -> tuple[parameters.Tensors, ...]:
        """One dict of device tensors an argument."""
        return tuple([w.tensors for w in self.weights])


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive layers of a block that one program may run.

    Attributes:
      layers: in order, all but those of one layer with attentions of one KV shape.
      kv_shape: of their pages; None without attention.
      kv_first: how many attentions of this shape the block has before them.
      kv_layers: attentions among them.
      stitch: of a stitch, how many the block has before it.
    """

    layers: tuple[Layer, ...]
    kv_shape: KVShape | None
    kv_first: int
    kv_layers: int
    stitch: int = 0

    @functools.cached_property
    def tables(self) -> tuple[tuple[parameters.Tensors, ...], ...]:
        """Those of each layer."""
        return tuple(layer.tables for layer in self.layers)

    @functools.cached_property
    def _kept(self) -> tuple[tuple[parameters.Tensors, ...], ...]:
        """`params`, where none of them is made of others' tensors anew."""
        own = all(isinstance(w, Weights) for layer in self.layers for w in layer.weights)
        return tuple(layer.params for layer in self.layers) if own else ()

    @property
    def params(self) -> tuple[tuple[parameters.Tensors, ...], ...]:
        """Those of each layer."""
        return self._kept or tuple([layer.params for layer in self.layers])


@dataclasses.dataclass(frozen=True, eq=False)
class BlockInstance:
    """A block on this agent. Chains that have it at different depths, or twice, share it.

    Attributes:
      name: for traces and logs.
      segments: its layers, in runs that one program may carry.
      singles: its layers, one by one.
    """

    name: str
    segments: tuple[Segment, ...]
    singles: tuple[Segment, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Run one after another over the same rows."""
        return tuple(segment.layers[0] for segment in self.singles)

    @property
    def kind(self) -> str:
        """ "embedding", "layer", "stitch" or "head", of its first layer."""
        return self.singles[0].layers[0].kind

    @property
    def is_head(self) -> bool:
        """Whether it ends a chain with logits."""
        return self.kind == "head"

    @property
    def widths(self) -> set[int]:
        """Widths of all registers that it reads or writes."""
        return {w for layer in self.layers for w in layer.signature.widths}


@dataclasses.dataclass(frozen=True, eq=False)
class Hop(BlockInstance):
    """Where rows leave for another agent, or on an agent that is not their home, where they go back.

    Attributes:
      agent: where to; None: their home.
      width: of the register they leave from.
    """

    agent: int | None = None
    width: int = 0

    @property
    def kind(self) -> str:
        """As of a block."""
        return "hop"

    @property
    def widths(self) -> set[int]:
        """As of a block."""
        return {self.width}


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A block at its place in a chain.

    Attributes:
      instance: the block.
      kv_first: of each KV shape, how many attentions the chain has before the block.
      positions: of each of the block's stitches, the row of its position tables.
      span: of a hop, which of the chain's spans on the agent it leads to.
    """

    instance: BlockInstance
    kv_first: Mapping[KVShape, int]
    positions: tuple[int, ...] = ()
    span: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """The way of a request: the blocks it visits and what it needs there. A request is bound to one when it
    is submitted and keeps it to its end.

    Attributes:
      needs: what it needs on the device.
      stages: the blocks a row of it visits, in order.
      kv_digests: of each KV shape, what names the content of its attentions' pages.
      plain_digests: the same before an activated LoRA acts; None where that is not what it is.
      virtual_tokens: how many its sequences begin with (prompt or prefix tuning).
      boundaries: where chains leave it, the lowest first.
      whole: the record of a chain of which `needs` names what lies on this agent alone; None: all of it.
    """

    needs: Needs
    stages: tuple[Stage, ...]
    kv_digests: LayerDigests
    plain_digests: LayerDigests | None = None
    virtual_tokens: int = 0
    boundaries: tuple[Boundary, ...] = ()
    whole: Chain | None = None

    @property
    def chain(self) -> Chain:
        """Its record."""
        return self.whole or self.needs.chain

    @functools.cached_property
    def agents(self) -> tuple[int, ...]:
        """The other agents that its rows pass, ascending."""
        agents = {i.agent for i in self.instances if isinstance(i, Hop)}
        return tuple(sorted(a for a in agents if a is not None))

    @functools.cached_property
    def span_starts(self) -> tuple[int, ...]:
        """On an agent that is not its home: the stage with which each of its spans begins."""
        ends = [at for at, stage in enumerate(self.stages) if isinstance(stage.instance, Hop)]
        return (0, *(at + 1 for at in ends[:-1]))

    @property
    def adapter(self) -> Adapter | None:
        """Its deltas; None without."""
        return self.needs.adapter

    @property
    def weights(self) -> WeightSet:
        """Of its components, whether they are on the device or not."""
        return self.needs.weights

    @property
    def instances(self) -> tuple[BlockInstance, ...]:
        """The blocks it visits, in order."""
        return tuple(stage.instance for stage in self.stages)

    @property
    def widths(self) -> set[int]:
        """Widths of all registers that its blocks read or write."""
        return {w for i in self.instances for w in i.widths}


@dataclasses.dataclass(frozen=True, eq=False)
class ServingGraph:
    """All chains one agent may serve, and what they share.

    Attributes:
      zoo: where they come from.
      routes: by chain name.
      instances: the blocks of all routes.
      targets: what has tables in the next graph too, by spec, while any chain adapts it.
      pinned: names of the routes that stay on the device.
      placement: the devices it is for.
      plans: which runs of components are blocks, by isolation domain; "" where blocks are shared.
      spans: which of their steps lie here; None: all.
      cache: what the next graph takes over instead of making it again, by what decides it.
    """

    zoo: Zoo
    routes: dict[str, Route]
    instances: tuple[BlockInstance, ...]
    targets: dict[ComponentSpec, frozenset[str]]
    pinned: tuple[str, ...]
    placement: Placement
    plans: Mapping[str, BlockPlan]
    spans: SpanPlacement | None = None
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def users(self) -> Mapping[BlockInstance, int]:
        """How many chains use each block."""
        return collections.Counter(i for r in self.routes.values() for i in {*r.instances})

    @functools.cached_property
    def resident_set(self) -> ResidentSet:
        """All that may come to the device."""
        return ResidentSet(
            needs={name: route.needs for name, route in self.routes.items()},
            residents=[r for r in self.cache.values() if isinstance(r, Resident)],
            pinned=self.pinned,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, were they all on the device."""
        return sum(r.size for r in self.cache.values() if isinstance(r, Weights))

    @functools.cached_property
    def table_bytes(self) -> int:
        """Bytes of all slot tables."""
        tables = self.resident_set.tables
        return sum(table_bytes(p.spec, p.form, self.placement) for p in tables.values() if p.form)

    def make_tables(self) -> None:
        """Allocates the slot tables that are not there yet."""
        for tables, form in self.resident_set.tables:
            tables.make(form)

    def has(self, route: Route) -> bool:
        """Whether all blocks of a route are among its own."""
        return all(i in self.users for i in route.instances)

    @functools.cached_property
    def widths(self) -> set[int]:
        """Widths of all registers that its blocks read or write."""
        return {w for i in self.instances for w in i.widths}

    @property
    def has_hops(self) -> bool:
        """Whether rows leave for other agents."""
        return any(isinstance(i, Hop) for i in self.instances)

    @functools.cached_property
    def kv_layers(self) -> dict[PageShape, int]:
        """Of each KV shape, how many attentions the deepest chain has; and the shapes of rows that are kept
        where chains part, with 1."""
        most: dict[PageShape, int] = {}
        for route in self.routes.values():
            for shape, digests in route.kv_digests.items():
                most[shape] = max(len(digests), most.get(shape, 0))
            most |= {boundary.shape: 1 for boundary in route.boundaries}
        return dict(sorted(most.items()))
