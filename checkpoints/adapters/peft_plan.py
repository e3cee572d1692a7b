"""Which step of a base gets which tensors of a PEFT adapter. Names and shapes decide, no numbers."""

import dataclasses
from collections.abc import Mapping

from checkpoints import naming
from checkpoints.adapters.adapter_plan import AdapterPlan, PlannedDelta, TensorSource
from checkpoints.adapters.peft_config import LoraSettings, Settings
from checkpoints.adapters.peft_names import PREFIX, Module, modules_of, of_other_parts
from checkpoints.errors import CheckpointError
from checkpoints.source import Source
from jblock.blocks.delta_spec import (
    BiasNormSpec,
    DeltaSpec,
    Ia3Spec,
    LoraSpec,
    LoraTarget,
    PrefixSpec,
    PromptSpec,
)
from jblock.blocks.layout import is_projection
from jblock.blocks.spec import (
    AttentionSpec,
    ComponentSpec,
    EmbeddingSpec,
    UnembeddingSpec,
    projection_shape,
    unquantized,
)
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

_VIRTUAL = "prompt_embeddings"
_EXPERTS = ".experts."


def plan_peft(zoo: Zoo, base: Chain, settings: Settings, source: Source) -> AdapterPlan:
    """Finds the place of every tensor of an adapter.

    Raises:
      CheckpointError: a tensor that has no place in the base, has another shape or rank than
        expected, or is missing.
    """
    if settings.lora is not None and settings.lora.invocation:
        _check_activated(base, settings.lora.invocation)
    modules = modules_of(base, source)
    planner = _Planner(zoo, base, settings, source, modules)
    if settings.virtual_tokens:
        planner.take_virtual()
    for path, module in modules.items():
        planner.take_module(path, module)
    planner.take_tied_head()
    return planner.plan()


def _check_activated(base: Chain, invocation: tuple[int, ...]) -> None:
    """Raises CheckpointError where a base cannot have an activated LoRA, which before its invocation is the
    base's components alone."""
    unknown = [token for token in invocation if token >= base.vocab_size]
    if unknown:
        raise CheckpointError(
            f"adapter_config.json: alora_invocation_tokens has {unknown[0]}, the vocabulary of {base.name} "
            f"ends with {base.vocab_size - 1}: the adapter is for another base"
        )
    if any(step.deltas for step in base.steps):
        raise CheckpointError(
            f"adapter_config.json: alora_invocation_tokens is {list(invocation)}, and {base.name} has deltas "
            "of its own: an activated LoRA can be served on whole components only; export the base and "
            "convert it into a zoo of its own, or merge its deltas"
        )


class _Planner:
    """Takes tensors of the adapter, module by module."""

    def __init__(
        self,
        zoo: Zoo,
        base: Chain,
        settings: Settings,
        source: Source,
        modules: Mapping[str, Module],
    ):
        self._zoo, self._base, self._settings, self._source = zoo, base, settings, source
        self._modules = modules
        self._others = of_other_parts(source)
        self._left = set(source.tensors) - set(self._others)
        self._unmodular = not any(_EXPERTS in name for name in source.tensors)
        self._lora: dict[int, dict[str, LoraTarget]] = {}
        self._outputs: dict[int, list[str]] = {}
        self._inputs: dict[int, list[str]] = {}
        self._tensors: dict[
            tuple[int, str], dict[str, TensorSource]
        ] = {}  # by step and kind of delta
        self._whole: dict[int, dict[str, str]] = {}
        self._virtual: list[PlannedDelta] = []
        self._specs: dict[int, ComponentSpec] = {}
        self._vocab_size = 0
        self._vocab_size = self._resized_vocabulary()
        self._specs.clear()

    def plan(self) -> AdapterPlan:
        """What was taken; refuses what is left."""
        if self._left:
            raise CheckpointError(
                f"{self._source.path}: tensor {min(self._left)!r} fits no projection of "
                f"{self._base.name} ({self._base.family}, {len(self._base.steps)} components): "
                + (
                    self._explained()
                    or "the adapter is for another base, or adapts what cannot be served"
                )
            )
        deltas: list[PlannedDelta] = list(self._virtual)
        replaced: dict[int, dict[str, str]] = {}
        for index in range(len(self._base.steps)):
            if index in self._whole:
                shapes = self._spec(index).tensors()
                if any(len(shapes[name]) > 1 for name in self._whole[index]):
                    replaced[index] = self._whole[index]
                else:
                    names = tuple(sorted(self._whole[index]))
                    tensors = {n: TensorSource(self._whole[index][n]) for n in names}
                    spec: DeltaSpec = BiasNormSpec(names=names)
                    deltas.append(PlannedDelta(index=index, spec=spec, tensors=tensors))
            if index in self._lora:
                invocation = self._settings.lora.invocation if self._settings.lora else ()
                spec = LoraSpec(targets=self._lora[index], invocation=invocation)
                deltas.append(self._delta(index, spec))
            if index in self._outputs or index in self._inputs:
                spec = Ia3Spec(
                    outputs=tuple(sorted(self._outputs.get(index, ()))),
                    inputs=tuple(sorted(self._inputs.get(index, ()))),
                )
                deltas.append(self._delta(index, spec))
        if not deltas and not replaced:
            raise CheckpointError(
                f"{self._source.path} has no tensors of an adapter: give a trained one"
            )
        return AdapterPlan(
            deltas=tuple(deltas),
            replaced=replaced,
            vocab_size=self._vocab_size,
            left_out=self._others,
        )

    def take_tied_head(self) -> None:
        """Where the head is tied to an embedding that the adapter brings, it is the head's too."""
        last = len(self._base.steps) - 1
        tied = "weight" in self._zoo.component(self._base.steps[last].component).refs
        if tied and 0 in self._whole and last not in self._whole:
            if any(self._settings.saves(path) for path, m in self._modules.items() if m.index == 0):
                return  # PEFT trains a copy of it, and leaves the head as it is.
            self._whole[last] = dict(self._whole[0])
        if self._vocab_size and not {0, last} <= self._whole.keys():
            raise CheckpointError(
                f"{self._source.path}: its vocabulary has {self._vocab_size} tokens, that of "
                f"{self._base.name} {self._base.vocab_size}, and it brings only one of embedding and head: "
                "save it with save_embedding_layers=True"
            )

    def _resized_vocabulary(self) -> int:
        """Tokens of the vocabulary where the adapter brings embeddings of another one; 0 where not."""
        for path, module in self._modules.items():
            spec = self._spec(module.index)
            if module.tensors.get("weight") != "weight" or not hasattr(spec, "vocab_size"):
                continue
            for name in (f"{PREFIX}{path}.weight", f"{PREFIX}{path}.base_layer.weight"):
                info = self._source.tensors.get(name)
                if info is None or len(info.shape) != 2 or info.shape[1] != spec.hidden_size:
                    continue
                if info.shape[0] != spec.vocab_size:
                    return info.shape[0]
        return 0

    def _explained(self) -> str:
        """Which prefix the adapter's names have and which is expected; "" where it is not that."""
        suffix = "ia3_l" if self._settings.method == "IA3" else "lora_A.weight"
        wanted = [
            f"{PREFIX}{path}.{suffix}"
            for path, module in self._modules.items()
            if self._is_projection(module.index, module.tensors.get("weight", ""))
            and (self._settings.modules is None or self._settings.targets(path))
        ]
        missing = [n for n in wanted if n not in self._source.tensors]
        return naming.explain(self._left, missing)

    def take_module(self, path: str, module: Module) -> None:
        """Takes all that the adapter has for one module of the base."""
        name = module.tensors.get("weight", "")
        if self._is_projection(module.index, name):
            projection = name.removesuffix(".weight")
            if self._settings.lora is not None:
                self._take_lora(path, module.index, projection, self._settings.lora)
            elif self._settings.method == "IA3":
                self._take_ia3(path, module.index, projection)
        self._take_whole(path, module)

    def take_virtual(self) -> None:
        """Takes the virtual tokens of a tuned prompt, or the keys and values of a prefix."""
        tokens = self._settings.virtual_tokens
        if self._settings.method != "PREFIX_TUNING":
            embedding = self._spec(0)
            if getattr(embedding, "scale", 1.0) != 1.0:
                raise CheckpointError(
                    f"{self._base.name} ({self._base.family}) scales its embeddings: prompt tuning on "
                    "it cannot be served, tune a prefix"
                )
            self._take(_VIRTUAL, (tokens, embedding.hidden_size), f"{tokens} virtual tokens")
            self._virtual.append(
                PlannedDelta(
                    index=0,
                    spec=PromptSpec(tokens=tokens),
                    tensors={"prompt": TensorSource(_VIRTUAL)},
                )
            )
            return
        begin = 0
        for index in range(len(self._base.steps)):
            spec = self._spec(index)
            if isinstance(spec, AttentionSpec):
                tensors = {}
                for part in "kv":
                    end = begin + spec.widths[part]
                    tensors[part] = TensorSource(_VIRTUAL, (begin, end))
                    begin = end
                delta = PlannedDelta(index=index, spec=PrefixSpec(tokens=tokens), tensors=tensors)
                self._virtual.append(delta)
        self._take(_VIRTUAL, (tokens, begin), f"{tokens} virtual tokens of keys and values")

    def _take_lora(self, path: str, index: int, projection: str, settings: LoraSettings) -> None:
        embedding = self._spec(index).kind == "embedding"
        stem = f"{PREFIX}{path}.lora_"
        names = {
            h: f"{stem}embedding_{h.upper()}" if embedding else f"{stem}{h.upper()}.weight"
            for h in "ab"
        }
        if not self._adapted(path, names["a"], names["b"]):
            return
        rank, scale = settings.rank_and_scale(path)
        out, inner = projection_shape(self._spec(index), projection)
        shapes: dict[str, tuple[int, ...]] = {"a": (rank, inner), "b": (out, rank)}
        b_bias = settings.b_bias and not embedding
        if settings.dora:
            names["magnitude"], shapes["magnitude"] = f"{stem}magnitude_vector", (out,)
        if b_bias:
            names["b_bias"], shapes["b_bias"] = f"{stem}B.bias", (out,)
        if settings.invocation and embedding:
            raise CheckpointError(
                f"alora_invocation_tokens with an adapter on {path!r} cannot be served, nor does PEFT "
                "compute with it: leave the embedding out"
            )
        if settings.dora and embedding and getattr(self._spec(index), "scale", 1.0) != 1.0:
            raise CheckpointError(
                f"use_dora on {path!r}, whose rows are scaled, cannot be served: leave it out, or "
                "merge the adapter into the base"
            )
        taken = self._tensors.setdefault((index, LoraSpec.kind), {})
        for part, shape in shapes.items():
            self._take(names[part], shape, f"rank {rank} by r and rank_pattern")
            taken[f"{projection}.{part}"] = TensorSource(names[part])
        self._lora.setdefault(index, {})[projection] = LoraTarget(
            rank=rank, scale=scale, dora=settings.dora, bias=b_bias
        )

    def _take_ia3(self, path: str, index: int, projection: str) -> None:
        name = f"{PREFIX}{path}.ia3_l"
        if not self._adapted(path, name):
            return
        out, inner = projection_shape(self._spec(index), projection)
        taken = self._tensors.setdefault((index, Ia3Spec.kind), {})
        if any(path.endswith(ending) for ending in self._settings.feedforward):
            self._take(name, (1, inner), "a scale of inputs, as feedforward_modules says")
            self._inputs.setdefault(index, []).append(projection)
            taken[f"{projection}.in_scale"] = TensorSource(name)
        else:
            self._take(name, (out, 1), "a scale of outputs")
            self._outputs.setdefault(index, []).append(projection)
            taken[f"{projection}.scale"] = TensorSource(name)

    def _take_whole(self, path: str, module: Module) -> None:
        """Takes tensors that stand for the base's own."""
        settings = self._settings
        saved = settings.saves(path)
        biases = settings.lora is not None and settings.lora.bias != "none"
        norms = settings.method == "LN_TUNING"
        shapes = self._spec(module.index).tensors()
        for tensor, name in module.tensors.items():
            stem = f"{PREFIX}{path}."
            # Embedding and head may be saved along though they are the base's own.
            table = hasattr(self._spec(module.index), "vocab_size") and tensor == "weight"
            plain = saved or table or (biases and tensor == "bias")
            found = [f"{stem}{tensor}"] if plain else []
            # What is adapted may come with the base's own tensors: embeddings, and trained biases.
            found.append(f"{stem}base_layer.{tensor}")
            if norms:
                found.append(f"{stem}ln_tuning_layers.{tensor}")
            there = [n for n in found if n in self._left]
            if not there and saved:
                raise CheckpointError(
                    f"{self._source.path}: tensor {found[0]!r} is missing, though modules_to_save of "
                    "adapter_config.json names its module: give the whole adapter"
                )
            for one in there:
                self._take(one, shapes[name], "the base's own shape")
                self._whole.setdefault(module.index, {})[name] = one

    def _adapted(self, path: str, *names: str) -> bool:
        """Whether the adapter has these tensors for a module: all or none, and as the config says."""
        there = [n for n in names if n in self._left]
        if not there:
            # Since transformers 5 experts are no modules of their own, so a name of theirs targets others.
            expert = self._unmodular and _EXPERTS in path
            if self._settings.targets(path) and not expert:
                raise CheckpointError(
                    f"{self._source.path}: tensor {names[0]!r} is missing, though target_modules of "
                    "adapter_config.json names its module: "
                    + (self._explained() or "give the whole adapter")
                )
            return False
        if not self._settings.allows(path):
            raise CheckpointError(
                f"{self._source.path}: tensors for {path!r} are surplus: target_modules and "
                "layers_to_transform of adapter_config.json leave it out: one of the two files is "
                "of another adapter"
            )
        return True

    def _take(self, name: str, shape: tuple[int, ...], why: str) -> None:
        """Takes one tensor."""
        info = self._source.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self._source.path}: tensor {name!r} is missing: give the whole adapter"
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{self._source.path}: tensor {name!r} has shape {list(info.shape)}, expected "
                f"{list(shape)} ({why}, on {self._base.name}): the adapter is for another base, or "
                "its config does not belong to it"
            )
        self._left.discard(name)

    def _delta(self, index: int, spec: DeltaSpec) -> PlannedDelta:
        return PlannedDelta(index=index, spec=spec, tensors=self._tensors[index, spec.kind])

    def _is_projection(self, index: int, name: str) -> bool:
        spec = self._spec(index)
        whole = spec.kind in ("embedding", "unembedding") and name == "weight"
        return whole or (name in spec.tensors() and is_projection(spec, name))

    def _spec(self, index: int) -> ComponentSpec:
        if index not in self._specs:
            component = self._base.steps[index].component
            spec = unquantized(self._zoo.component(component).spec)
            if isinstance(spec, (EmbeddingSpec, UnembeddingSpec)) and self._vocab_size:
                spec = dataclasses.replace(spec, vocab_size=self._vocab_size)
            self._specs[index] = spec
        return self._specs[index]
