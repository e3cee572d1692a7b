"""`jblock-convert peft`: a PEFT LoRA adapter becomes a chain of deltas on a chain's components."""

import dataclasses
from pathlib import Path

from checkpoints.errors import CheckpointError
from checkpoints.hf import again_if_gone, note_tokenizer
from checkpoints.peft_config import LoraSettings, read_settings
from checkpoints.progress import Progress
from checkpoints.source import Source, open_source, read_json
from checkpoints.tokenizer import read_tokenizer
from jblock.blocks.layout import is_projection
from jblock.blocks.spec import LoraSpec, LoraTarget, projection_shape
from jblock.families import families
from jblock.zoo.records import Chain, check_name
from jblock.zoo.store import Zoo

_SMALL = ("adapter_config.json", "adapter_model.safetensors.index.json")
_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedDelta:
    """The delta on one step: `index` of the step, and delta tensor -> adapter tensor."""

    index: int
    spec: LoraSpec
    tensors: dict[str, str]


def convert(
    source_path: Path, zoo_path: Path, base_name: str, name: str, progress: Progress
) -> tuple[Chain, bool]:
    """Adds the adapter in `source_path` as model `name`, riding on the live version of `base_name`.

    Returns:
      The chain, and whether it is a new version (False: the zoo had it).

    Raises:
      CheckpointError, ConfigError, SpecError, ZooError: see `errors.BAD_INPUT`.
    """
    check_name(name)
    zoo = Zoo.open(zoo_path)
    base = zoo.chain(base_name)
    config = read_json(source_path / "adapter_config.json")
    settings = read_settings(config)
    if name == base_name:
        raise CheckpointError(f"--name {name!r} is the base itself: give the adapter its own name")
    _check_base(zoo, base, settings)
    source = open_source(source_path, "adapter_model")
    planned = plan_deltas(zoo, base, settings, source)
    tokenizer = read_tokenizer(source_path)
    small = source.small_files(_SMALL, tokenizer.given if tokenizer else ())
    if tokenizer is not None:
        note_tokenizer(tokenizer, base.vocab_size, source_path, progress)

    before = zoo.versions(name)

    def add() -> Chain:
        with zoo.writer() as writer:
            added: dict[int, str] = {}
            total = sum(t.nbytes for t in source.tensors.values())
            with progress.bar(f"{name}: deltas", total) as advance:
                for delta in planned:
                    tensors = {t: source.read(n) for t, n in delta.tensors.items()}
                    component = base.steps[delta.index].component
                    added[delta.index] = writer.put_delta(delta.spec, component, tensors)
                    advance(sum(v.nbytes for v in tensors.values()))
            steps = tuple(
                dataclasses.replace(s, deltas=s.deltas + ((added[i],) if i in added else ()))
                for i, s in enumerate(base.steps)
            )
            chain = dataclasses.replace(
                base,
                name=name,
                version=0,
                steps=steps,
                base=f"{base.name}@{base.version}",
                adapter=config,
                source_files=writer.put_files("sources", small),
            )
            if tokenizer is not None:
                own = writer.put_files("tokenizers", tokenizer.files)
                chain = dataclasses.replace(chain, tokenizer=own)
            progress.note(f"{name}: {writer.new_bytes} of {total} bytes are new to the zoo")
            return writer.publish(chain)

    published = again_if_gone(add)
    return published, published.version not in before


def plan_deltas(
    zoo: Zoo, base: Chain, settings: LoraSettings, source: Source
) -> tuple[PlannedDelta, ...]:
    """Which step gets which tensors of an adapter.

    Raises:
      CheckpointError: a tensor that fits no projection of the base, has another shape or rank than
        expected, or is missing.
    """
    modules = _modules(base)
    left = set(source.tensors)
    found: dict[int, dict[str, LoraTarget]] = {}
    names: dict[int, dict[str, str]] = {}
    for module, (index, projection) in modules.items():
        pair = {h: f"{_PREFIX}{module}.lora_{h.upper()}.weight" for h in ("a", "b")}
        there = {h for h, n in pair.items() if n in source.tensors}
        if not there:
            if settings.targets(module):
                raise CheckpointError(
                    f"{source.path}: tensor {pair['a']!r} is missing, though target_modules of "
                    "adapter_config.json names its module: give the whole adapter"
                )
            continue
        if not settings.allows(module):
            raise CheckpointError(
                f"{source.path}: tensors for {module!r} are surplus: target_modules and "
                "layers_to_transform of adapter_config.json leave it out: one of the two files is "
                "of another adapter"
            )
        if len(there) == 1:
            raise CheckpointError(
                f"{source.path}: tensor {pair[({'a', 'b'} - there).pop()]!r} is missing: give the "
                "whole adapter"
            )
        rank, scale = settings.rank_and_scale(module)
        spec = zoo.component(base.steps[index].component).spec
        out, inner = projection_shape(spec, projection)
        for half, shape in (("a", (rank, inner)), ("b", (out, rank))):
            if source.tensors[pair[half]].shape != shape:
                raise CheckpointError(
                    f"{source.path}: tensor {pair[half]!r} has shape "
                    f"{list(source.tensors[pair[half]].shape)}, expected {list(shape)} (rank "
                    f"{rank} on {base.name}): the adapter is for another base, or its r and "
                    "rank_pattern do not belong to it"
                )
        found.setdefault(index, {})[projection] = LoraTarget(rank=rank, scale=scale)
        names.setdefault(index, {}).update({f"{projection}.{h}": n for h, n in pair.items()})
        left -= set(pair.values())
    if left:
        raise CheckpointError(
            f"{source.path}: tensor {min(left)!r} fits no projection of {base.name} "
            f"({base.family}, {len(base.steps)} components): the adapter is for another base, or "
            "adapts what cannot be served"
        )
    if not found:
        raise CheckpointError(f"{source.path} has no LoRA tensors: give a trained adapter")
    return tuple(
        PlannedDelta(index=i, spec=LoraSpec(targets=found[i]), tensors=names[i])
        for i in sorted(found)
    )


def _modules(base: Chain) -> dict[str, tuple[int, str]]:
    """Module path in the checkpoint -> (index of the step, projection)."""
    return {
        source.removesuffix(".weight"): (index, name.removesuffix(".weight"))
        for index, step in enumerate(families()[base.family].plan(base.source).steps)
        for name, source in step.tensors.items()
        if is_projection(step.spec, name)
    }


def _check_base(zoo: Zoo, base: Chain, settings: LoraSettings) -> None:
    if base.base is not None or any(step.deltas for step in base.steps):
        raise CheckpointError(
            f"--base {base.name!r} is itself an adapter on {base.base}; adapters on adapters are "
            f"not served yet: give {(base.base or '').rpartition('@')[0]!r}, or merge it first"
        )
    declared = settings.base.rstrip("/").rsplit("/", 1)[-1]
    if declared != base.name and declared in zoo.chains():
        raise CheckpointError(
            f"adapter_config.json: base_model_name_or_path is {settings.base!r}, which this zoo "
            f"holds as {declared!r}, but --base is {base.name!r}: give --base {declared}"
        )
