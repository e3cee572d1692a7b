"""`jblock-convert hf`: a Hugging Face checkpoint becomes a chain of components."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from checkpoints import prequantized
from checkpoints.bitfit import BitFitMatcher, Shared
from checkpoints.errors import CheckpointError
from checkpoints.progress import Progress
from checkpoints.source import Source, open_source, read_json
from checkpoints.tokenizer import TokenizerFiles, read_tokenizer
from jblock.blocks.spec import (
    AttentionSpec,
    ComponentSpec,
    NormSpec,
    canonical_json,
    spec_to_json,
)
from jblock.families import Plan, family_for
from jblock.families.config import token_ids
from jblock.zoo.records import Chain, NotFoundError, Step, check_name
from jblock.zoo.store import Zoo

_SMALL = ("config.json", "generation_config.json", "model.safetensors.index.json")
# In a folder of small files: tensors that the model does not need but an export writes again.
LEFT_OUT = "left_out.safetensors"
_SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "max_new_tokens",
    "max_length",
)


def convert(source_path: Path, zoo_path: Path, name: str, progress: Progress) -> tuple[Chain, bool]:
    """Adds the checkpoint in `source_path` to the zoo (made when absent) as model `name`.

    One component is in memory at a time. Whatever goes wrong, no chain changes.

    Returns:
      The chain, and whether it is a new version (False: the zoo had it).

    Raises:
      CheckpointError, ConfigError, SpecError, ZooError: see `errors.BAD_INPUT`.
    """
    check_name(name)
    config = read_json(source_path / "config.json")
    generation = read_json(source_path / "generation_config.json", required=False)
    family = family_for(config)
    source = open_source(source_path)
    packing = prequantized.packing_of(config) if config.get(prequantized.FIELD) else None
    described = {n: v for n, v in config.items() if n != prequantized.FIELD}
    plan = family.plan(described).fitting(source.tensors)
    if packing is not None:
        plan, source = prequantized.unpacked(plan, source, packing)
    check_tensors(plan, source)
    eos = token_ids(generation, "eos_token_id", plan.vocab_size)
    bos = token_ids(generation, "bos_token_id", plan.vocab_size)
    eos = eos or token_ids(config, "eos_token_id", plan.vocab_size)
    bos = bos or token_ids(config, "bos_token_id", plan.vocab_size)
    tokenizer = read_tokenizer(source_path)
    note_tokenizer(tokenizer, plan.vocab_size, source_path, progress)

    given = tokenizer.given if tokenizer else ()
    small = source.small_files(_SMALL, given) | _left_out(plan, source)

    zoo = Zoo.create(zoo_path)
    before = zoo.versions(name)

    def add() -> Chain:
        with zoo.writer(source.key()) as writer:
            owners: dict[str, tuple[str, str]] = {}  # checkpoint tensor -> (component, tensor)
            steps: dict[int, Step] = {}
            finder = BitFitMatcher(zoo)
            total = sum(t.nbytes for t in source.tensors.values())
            with progress.bar(f"{name}: components", total) as advance:
                for i in in_order(plan):
                    step = plan.steps[i]
                    tied = {t: owners[n] for t, n in step.tensors.items() if n in owners}
                    own = [t for t in step.tensors if t not in tied]
                    # What the component is made from beside the bytes, which the key stands for.
                    label = canonical_json([i, spec_to_json(step.spec), step.tensors])
                    id_ = writer.finished(label)
                    deltas: tuple[str, ...] = ()
                    if id_ is None:
                        tensors = {t: source.read(step.tensors[t]) for t in own}
                        shared = share(finder, step.spec, tensors, tied, steps.get(i + 1))
                        if shared is None:
                            id_ = writer.put_component(step.spec, tensors, tied)
                            writer.finish(label, id_)
                        else:
                            id_ = shared.component
                            deltas = (writer.put_delta(shared.spec, id_, shared.vectors),)
                        del tensors
                    owners |= {step.tensors[t]: (id_, t) for t in own}
                    steps[i] = Step(
                        component=id_, deltas=deltas, fused_with_previous=step.fused_with_previous
                    )
                    advance(sum(source.tensors[step.tensors[t]].nbytes for t in own))
            chain = Chain(
                name=name,
                family=family.name,
                steps=tuple(steps[i] for i in sorted(steps)),
                tokenizer=None
                if tokenizer is None
                else writer.put_files("tokenizers", tokenizer.files),
                max_position=plan.max_position,
                vocab_size=plan.vocab_size,
                eos_token_ids=eos,
                bos_token_id=bos[0] if bos else None,
                generation={k: v for k, v in generation.items() if k in _SAMPLING and _plain(v)},
                source=described,
                # Packed weights are kept otherwise, so the same files cannot be written again.
                source_files=writer.put_files("sources", small) if packing is None else None,
                derived={} if packing is None else {"packed": config[prequantized.FIELD]},
            )
            shared_steps = sum(bool(step.deltas) for step in chain.steps)
            if shared_steps:
                progress.note(
                    f"{name}: {shared_steps} components differ from known ones in biases and norms only, "
                    "and are stored as such"
                )
            progress.note(f"{name}: {writer.new_bytes} of {total} bytes are new to the zoo")
            return writer.publish(chain)

    published = again_if_gone(add)
    return published, published.version not in before


def in_order(plan: Plan) -> list[int]:
    """The numbers of the steps, the unembedding before its norm, which is looked for by it."""
    count = len(plan.steps)
    return [*range(count - 2), count - 1, count - 2]


def share(
    finder: BitFitMatcher | None,
    spec: ComponentSpec,
    tensors: Mapping[str, np.ndarray],
    tied: Mapping[str, object],
    following: Step | None,
) -> Shared | None:
    """See `bitfit.BitFitMatcher`; `following` is the step behind, where that is known already."""
    if finder is None:
        return None
    if isinstance(spec, NormSpec) and following is not None:
        return finder.shared_norm(spec, tensors, following.component)
    return finder.shared(spec, tensors, tied)


def again_if_gone(add: Callable[[], Chain]) -> Chain:
    """Does `add` again if something it found in the zoo was removed before it could publish."""
    for _ in range(4):
        with contextlib.suppress(NotFoundError):
            return add()
    return add()


def check_tensors(plan: Plan, source: Source) -> None:
    """Checks that a checkpoint holds what its config promises, and nothing else.

    Raises:
      CheckpointError: a tensor is missing, surplus, or of another shape; or a copy that differs.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for step in plan.steps:
        shapes = step.spec.tensors()
        wanted |= {source_name: shapes[name] for name, source_name in step.tensors.items()}
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        names = ", ".join(map(repr, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise CheckpointError(
            f"{source.path}: {len(missing)} tensors are missing: {names}: give the whole checkpoint, "
            "and the config.json that belongs to it"
        )
    for name, shape in wanted.items():
        if source.tensors[name].shape != shape:
            raise CheckpointError(
                f"{source.path}: tensor {name!r} has shape {list(source.tensors[name].shape)}, "
                f"config.json makes it {list(shape)}: one of the two is of another model"
            )
    surplus = []
    for name in sorted(source.tensors.keys() - wanted.keys()):
        if name in plan.copies:
            if not source.equal(name, plan.copies[name]):
                raise CheckpointError(
                    f"{source.path}: config.json ties {name!r} to {plan.copies[name]!r}, but the "
                    "two differ: set tie_word_embeddings to false if both are meant"
                )
        elif name in plan.inverse_frequencies:
            _check_frequencies(plan, source, name)
        elif name in plan.masks:
            _check_mask(source, name)
        else:
            surplus.append(name)
    if surplus:
        names = ", ".join(map(repr, surplus[:8]))
        raise CheckpointError(
            f"{source.path}: {len(surplus)} tensors are surplus: {names}"
            + (", ..." if len(surplus) > 8 else "")
            + ": config.json describes a model without them, so what they are for is not known"
        )


def note_tokenizer(
    tokenizer: TokenizerFiles | None, vocab_size: int, path: Path, progress: Progress
) -> None:
    """Notes what a user of the tokenizer should know."""
    if tokenizer is None:
        progress.note(f"{path} has no tokenizer: the model can be served with token ids only")
        return
    if tokenizer.made:
        progress.note("tokenizer.json was made from tokenizer.model")
    if tokenizer.largest_id >= vocab_size:
        # Usual for a padding token added after training, which no prompt contains.
        progress.note(
            f"the tokenizer has ids up to {tokenizer.largest_id}, the model only {vocab_size - 1}"
        )


def _plain(value: object) -> bool:
    return isinstance(value, (bool, int, float))


def _left_out(plan: Plan, source: Source) -> dict[str, bytes]:
    """Rope tables and masks kept aside, so that an export can write them again."""
    names = [n for n in (*plan.inverse_frequencies, *plan.masks) if n in source.tensors]
    tensors = {n: source.read(n) for n in names}
    return {LEFT_OUT: safetensors.numpy.save(tensors)} if tensors else {}


def _check_mask(source: Source, name: str) -> None:
    """A mask must be the causal one, or the value that masked scores once took.

    Raises:
      CheckpointError: it is something else.
    """
    info = source.tensors[name]
    if info.shape in ((), (1,)):
        return
    square = len(info.shape) == 4 and info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3]
    if not square or not np.array_equal(source.read(name)[0, 0], np.tri(info.shape[2])):
        raise CheckpointError(
            f"{source.path}: {name!r} is not a causal mask: other masks cannot be served"
        )


def _check_frequencies(plan: Plan, source: Source, name: str) -> None:
    spec = next(s.spec for s in plan.steps if isinstance(s.spec, AttentionSpec))
    if spec.rope is not None and spec.rope.kind == "default":
        dim = spec.rope.rotated(spec.head_dim)
        expected = spec.rope.theta ** -(np.arange(0, dim, 2) / dim)
        if source.tensors[name].shape == expected.shape:
            found = source.read(name).astype(np.float64)
            if np.allclose(found, expected, rtol=1e-2, atol=0):
                return
    raise CheckpointError(
        f"{source.path}: {name!r} is not the rope that config.json describes ({spec.rope}): only "
        "what config.json says can be served"
    )
