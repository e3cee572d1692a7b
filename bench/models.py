"""A zoo in memory: models of random weights made on the spot, full fine-tunes that share layers, adapters.

Nothing is held: a component's tensors are drawn anew from its own seed each time they are loaded, so
a zoo of eight fine-tunes costs no memory beside what the engine keeps.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jblock.blocks.delta_spec import LoraSpec, LoraTarget, delta_to_json
from jblock.blocks.spec import (
    AttentionSpec,
    ComponentSpec,
    EmbeddingSpec,
    FfnSpec,
    NormSpec,
    RopeSpec,
    UnembeddingSpec,
)
from jblock.blocks.spec_json import canonical_json, spec_to_json
from jblock.zoo.partition import BlockPlan, plan_blocks
from jblock.zoo.records import Chain, ComponentRecord, DeltaRecord, Step, TensorRecord
from jblock.zoo.store import Zoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Llama-shaped model.

    Attributes:
      layers: attention and ffn pairs.
      hidden_size: width.
      intermediate_size: width inside the ffn.
      num_heads: query heads.
      num_kv_heads: key/value heads.
      head_dim: width of a head.
      vocab_size: rows of the embedding.
      tied: the unembedding is the embedding's own table.
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False

    @property
    def attention(self) -> AttentionSpec:
        """Its attention component."""
        return AttentionSpec(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            norm_eps=1e-5,
            rope=RopeSpec(),
        )

    @property
    def ffn(self) -> FfnSpec:
        """Its ffn component."""
        return FfnSpec(
            hidden_size=self.hidden_size, intermediate_size=self.intermediate_size, norm_eps=1e-5
        )

    @property
    def layer_weights(self) -> int:
        """Matmul weights of one layer."""
        specs = (self.attention, self.ffn)
        return sum(int(np.prod(s)) for c in specs for s in c.tensors().values() if len(s) == 2)

    @property
    def head_weights(self) -> int:
        """Matmul weights of the unembedding."""
        return self.vocab_size * self.hidden_size

    @property
    def kv_floats_per_token(self) -> int:
        """K and V numbers one token keeps over all layers."""
        return 2 * self.layers * self.num_kv_heads * self.head_dim


MODEL_250M = ModelShape(
    layers=16,
    hidden_size=1024,
    intermediate_size=2816,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=32000,
)
DEMO_3M = ModelShape(  # examples/models/demo-3m, the larger base of the demo family
    layers=6,
    hidden_size=192,
    intermediate_size=576,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=1024,
)
TINY = ModelShape(
    layers=4,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=256,
)


class MemoryZoo:
    """What an engine reads of a zoo, for models made on the spot.

    Attributes:
      shape: of every model that is given no other.
      seed: decides all weights.
      served: the newest version of every chain, by name.
    """

    def __init__(self, shape: ModelShape, seed: int = 0):
        self.shape, self.seed = shape, seed
        self.served: dict[str, Chain] = {}
        self._versions: dict[str, list[Chain]] = {}
        self._components: dict[str, ComponentRecord] = {}
        self._deltas: dict[str, DeltaRecord] = {}
        self._labels: dict[str, str] = {}

    def add_base(self, name: str = "base", shape: ModelShape | None = None) -> Chain:
        """A model of its own weights."""
        return self.add_variant(name, name, 0, shape)

    def add_variant(
        self, name: str, base: str, private_layers: int, shape: ModelShape | None = None
    ) -> Chain:
        """A full fine-tune of `base`: the last `private_layers` layers are its own."""
        shape = shape or self.shape
        ids = [self._component(EmbeddingSpec(**_table(shape)), f"{base}/embedding")]
        for i in range(shape.layers):
            owner = name if i >= shape.layers - private_layers else base
            ids.append(self._component(shape.attention, f"{owner}/attention/{i}"))
            ids.append(self._component(shape.ffn, f"{owner}/ffn/{i}"))
        norm = NormSpec(hidden_size=shape.hidden_size, eps=1e-5)
        ids.append(self._component(norm, f"{base}/norm"))
        tie = ids[0] if shape.tied else None
        ids.append(self._component(UnembeddingSpec(**_table(shape)), f"{base}/unembedding", tie))
        return self._publish(name, tuple(Step(component=i) for i in ids))

    def add_stack(self, name: str, base: str, layers: Sequence[int]) -> Chain:
        """A model of layers of `base` in this order, some of them perhaps more than once."""
        steps = self.served[base].steps
        body = [steps[1 + 2 * i : 3 + 2 * i] for i in layers]
        return self._publish(name, (steps[0], *(s for pair in body for s in pair), *steps[-2:]))

    def retune(self, name: str) -> Chain:
        """A new version of a fine-tune: the layers of its own get other weights."""
        old = self.served[name]
        steps = []
        for step in old.steps:
            label = self._labels[step.component]
            if label.startswith(f"{name}/"):
                fresh = f"{label.split('@')[0]}@{old.version + 1}"
                id_ = self._component(self.component(step.component).spec, fresh)
                step = dataclasses.replace(step, component=id_, deltas=())
            steps.append(step)
        return self._publish(name, tuple(steps))

    def add_adapter(
        self,
        name: str,
        base: str,
        rank: int,
        targets: Sequence[str] = ("q", "k", "v", "o"),
        first_layer: int = 0,
        invocation: tuple[int, ...] = (),
    ) -> Chain:
        """LoRA of one rank on `targets` of every layer of the chain `base`, or of those from one on; with an
        invocation an activated one."""
        steps = []
        for at, step in enumerate(self.served[base].steps):
            spec = self._components[step.component].spec
            adapted = at > 2 * first_layer
            mine = [t for t in targets if adapted and f"{t}.weight" in spec.tensors()]
            deltas: tuple[str, ...] = ()
            if mine:
                lora = LoraSpec(
                    targets={t: LoraTarget(rank=rank, scale=0.5) for t in mine},
                    invocation=invocation,
                )
                deltas = (self._delta(lora, step.component, name),)
            steps.append(dataclasses.replace(step, deltas=deltas))
        config = {"alora_invocation_tokens": list(invocation)} if invocation else {}
        return self._publish(name, tuple(steps), f"{base}@1", config)

    def chains(self) -> list[str]:
        """Names of the chains, sorted."""
        return sorted(self.served)

    def versions(self, name: str) -> list[int]:
        """Versions of a chain, ascending."""
        return [chain.version for chain in self._versions[name]]

    def chain(self, name: str, version: int | None = None) -> Chain:
        """A chain in its newest version, or in the one given."""
        return self.served[name] if version is None else self._versions[name][version - 1]

    def block_plan(self, chains: Mapping[str, Chain]) -> BlockPlan:
        """See `Zoo.block_plan`; nothing was measured."""
        return plan_blocks(chains)

    def component(self, id: str) -> ComponentRecord:
        """The record of a component."""
        return self._components[id]

    def load_component(self, id: str, verify: bool = False) -> dict[str, np.ndarray]:
        """Tensors `[out, in]` of a component, drawn from its seed; tied ones are the owner's."""
        record = self._components[id]
        if record.refs:
            return {n: self.load_component(o)[t] for n, (o, t) in record.refs.items()}
        return self._draw(id, {n: t.shape for n, t in record.tensors.items()})

    def serve(self, name: str, version: int | str | None = None) -> Chain:
        """See `Zoo.serve`; nothing can be removed here."""
        return self.chain(name, None if version is None else int(version))

    def prefetch(self, id: str) -> None:
        """Nothing: tensors are drawn, not read."""

    def load_tensor(self, id: str, name: str) -> np.ndarray:
        """One tensor of a component."""
        return self.load_component(id)[name]

    def delta(self, id: str) -> DeltaRecord:
        """The record of a delta."""
        return self._deltas[id]

    def load_delta(self, id: str, verify: bool = False) -> dict[str, np.ndarray]:
        """Tensors of a delta, drawn from its seed."""
        return self._draw(id, {n: t.shape for n, t in self._deltas[id].tensors.items()})

    path = None

    def tokenizer_path(self, id: str) -> Path:
        """Raises ValueError: these models have no tokenizer."""
        raise ValueError(f"tokenizer {id!r} was asked for; models made on the spot have none")

    def _component(self, spec: ComponentSpec, label: str, tie: str | None = None) -> str:
        id_ = self._id(spec, label)
        tensors = {} if tie else _float32(spec.tensors())
        self._labels[id_] = label
        self._components[id_] = ComponentRecord(
            id=id_,
            spec=spec,
            tensors=tensors,
            refs={"weight": (tie, "weight")} if tie else {},
            nbytes=_nbytes(tensors),
        )
        return id_

    def _delta(self, spec: LoraSpec, component: str, label: str) -> str:
        tensors = _float32(spec.tensors(self._components[component].spec))
        id_ = self._id(spec, f"{label}/{component}")
        self._deltas[id_] = DeltaRecord(
            id=id_, spec=spec, component=component, tensors=tensors, nbytes=_nbytes(tensors)
        )
        return id_

    def _id(self, spec, label: str) -> str:
        plain = delta_to_json(spec) if isinstance(spec, LoraSpec) else spec_to_json(spec)
        text = canonical_json([plain, label, self.seed])
        return hashlib.sha256(text.encode()).hexdigest()

    def _publish(
        self,
        name: str,
        steps: tuple[Step, ...],
        base: str | None = None,
        adapter: dict[str, Any] | None = None,
    ) -> Chain:
        versions = self._versions.setdefault(name, [])
        versions.append(
            Chain(
                name=name,
                version=len(versions) + 1,
                family="llama",
                steps=steps,
                tokenizer=None,
                max_position=1 << 20,
                vocab_size=self._components[steps[-1].component].spec.vocab_size,
                base=base,
                adapter=adapter or {},
            )
        )
        self.served[name] = versions[-1]
        return versions[-1]

    def _draw(self, id: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Weights that keep a row's size: norms about 1, projections of variance 1 / inputs."""
        rng = np.random.Generator(np.random.SFC64(int(id[:16], 16)))
        tensors = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                noise = rng.standard_normal(shape, np.float32)
                tensors[name] = np.float32(1.0) + np.float32(0.1) * noise
            else:
                tensors[name] = rng.standard_normal(shape, np.float32)
                tensors[name] *= np.float32(shape[1] ** -0.5)
        return tensors


def fine_tunes(shape: ModelShape, count: int, private_layers: int, seed: int = 0) -> MemoryZoo:
    """`count` full fine-tunes of one base (not served itself): "tune-0", "tune-1", ..."""
    zoo = MemoryZoo(shape, seed)
    for i in range(count):
        zoo.add_variant(f"tune-{i}", "base", private_layers)
    return zoo


def save(zoo: MemoryZoo, path: Path, tokenizer: Mapping[str, bytes] | None = None) -> Path:
    """Writes the chains of a zoo in memory to a zoo on disk, all with the tokenizer of these files, if there
    is one; returns its path."""
    store = Zoo.create(path)
    tokenizer_id = store.put_tokenizer(tokenizer) if tokenizer else None
    ids: dict[str, str] = {}
    for chain in zoo.served.values():
        for step in chain.steps:
            if step.component in ids:
                continue
            record = zoo.component(step.component)
            refs = {name: (ids[owner], tensor) for name, (owner, tensor) in record.refs.items()}
            tensors = {} if refs else zoo.load_component(step.component)
            ids[step.component] = store.put_component(record.spec, tensors, refs)
        steps = []
        for step in chain.steps:
            component, deltas = ids[step.component], []
            for delta in step.deltas:
                spec, tensors = zoo.delta(delta).spec, zoo.load_delta(delta)
                deltas.append(store.put_delta(spec, component, tensors))
            steps.append(Step(component=component, deltas=tuple(deltas)))
        store.publish(
            dataclasses.replace(chain, steps=tuple(steps), version=0, tokenizer=tokenizer_id)
        )
    return path


def _table(shape: ModelShape) -> dict[str, int]:
    return {"vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size}


def _float32(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorRecord]:
    return {n: TensorRecord(shape=s, dtype="float32") for n, s in shapes.items()}


def _nbytes(tensors: Mapping[str, TensorRecord]) -> int:
    return sum(4 * int(np.prod(t.shape)) for t in tensors.values())
