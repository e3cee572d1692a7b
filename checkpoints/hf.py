"""`jblock convert hf`: a Hugging Face checkpoint becomes a chain of components."""

import contextlib
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import generation
from checkpoints.bitfit import BitFitMatcher, Shared
from checkpoints.opening import open_checkpoint
from checkpoints.progress import Progress
from checkpoints.safetensors_file import pack_tensors
from checkpoints.source import Source
from checkpoints.tokenizer import TokenizerFiles
from jblock.blocks.spec import ComponentSpec, NormSpec
from jblock.blocks.spec_json import canonical_json, spec_to_json
from jblock.families import Plan
from jblock.zoo.ids import content_id
from jblock.zoo.records import Chain, NotFoundError, Step, check_name
from jblock.zoo.store import Zoo

SMALL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
# In a folder of small files: tensors that no model needs but an export writes again, deflated, as masks
# are the same few numbers over and over.
LEFT_OUT = "left_out.safetensors.z"


def convert(
    source_path: Path,
    zoo_path: str | Path,
    name: str,
    progress: Progress,
    origin: Mapping[str, Any] | None = None,
    activate: bool = True,
) -> tuple[Chain, bool]:
    """Adds the checkpoint in `source_path` to the zoo (made when absent) as model `name`.

    One component is in memory at a time. Whatever goes wrong, no chain changes. `origin` says where it comes
    from: see `Chain.origin`.

    Returns:
      The chain, and whether it is a new version (False: the zoo had it).

    Raises:
      CheckpointError, ConfigError, SpecError, ZooError: see `errors.BAD_INPUT`.
    """
    check_name(name)
    checkpoint = open_checkpoint(source_path)
    plan, source = checkpoint.plan, checkpoint.source
    eos, bos = (
        generation.ids(
            checkpoint.generation, checkpoint.config, f"{which}_token_id", plan.vocab_size
        )
        for which in ("eos", "bos")
    )
    tokenizer = checkpoint.tokenizer
    for note in checkpoint.notes:
        progress.note(f"{name}: {note}")
    note_tokenizer(tokenizer, plan.vocab_size, source_path, progress)

    packed, given = checkpoint.packed, tokenizer.given if tokenizer else ()
    small = source.small_files(SMALL_FILES, given) | left_out(source, checkpoint.buffers)

    licensed = {"license": checkpoint.license} if checkpoint.license else {}

    zoo = Zoo.create(zoo_path)
    before = zoo.versions(name)

    def add() -> Chain:
        with zoo.writer(source.key()) as writer:
            owners: dict[str, tuple[str, str]] = {}  # checkpoint tensor -> (component, tensor)
            steps: dict[int, Step] = {}
            whole: dict[str, str] = {}
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
                            header = {"spec": spec_to_json(step.spec), "refs": {}}
                            whole[str(i)] = content_id(header, tensors)
                        del tensors
                    owners |= {step.tensors[t]: (id_, t) for t in own}
                    steps[i] = Step(
                        component=id_, deltas=deltas, fused_with_previous=step.fused_with_previous
                    )
                    advance(sum(source.tensors[step.tensors[t]].nbytes for t in own))
            chain = Chain(
                name=name,
                family=checkpoint.family.name,
                steps=tuple(steps[i] for i in sorted(steps)),
                tokenizer=None
                if tokenizer is None
                else writer.put_files("tokenizers", tokenizer.served),
                tokenizer_files=None
                if tokenizer is None
                else writer.put_files("sources", tokenizer.kept),
                max_position=plan.max_position,
                vocab_size=plan.vocab_size,
                eos_token_ids=eos,
                bos_token_id=bos[0] if bos else None,
                generation=generation.sampling(checkpoint.generation),
                source=checkpoint.described,
                # Packed weights are kept otherwise, so the same files cannot be written again.
                source_files=None if packed else writer.put_files("sources", small),
                derived={"packed": packed} if packed else {},
                origin={**(origin or {}), **licensed},
                whole=whole,
            )
            shared_steps = sum(bool(step.deltas) for step in chain.steps)
            if shared_steps:
                progress.note(
                    f"{name}: {shared_steps} components differ from known ones in biases and norms only, "
                    "and are stored as such"
                )
            progress.note(f"{name}: {writer.new_bytes} of {total} bytes are new to the zoo")
            return writer.publish(chain, activate)

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


def note_tokenizer(
    tokenizer: TokenizerFiles | None, vocab_size: int, path: Path, progress: Progress
) -> None:
    """Notes what a user of the tokenizer should know."""
    if tokenizer is None:
        progress.note(f"{path} has no tokenizer: the model can be served with token ids only")
        return
    for note in tokenizer.notes:
        progress.note(note)
    if tokenizer.largest_id >= vocab_size:
        # Usual for a padding token added after training, which no prompt contains.
        progress.note(
            f"the tokenizer has ids up to {tokenizer.largest_id}, the model only {vocab_size - 1}"
        )


def left_out(source: Source, names: Collection[str]) -> dict[str, bytes]:
    """Tensors that no model needs, kept aside so that an export can write them again."""
    tensors = {n: source.tensors[n].read_unchecked() for n in names}
    return {LEFT_OUT: zlib.compress(pack_tensors(tensors), 1)} if tensors else {}
