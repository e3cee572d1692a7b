"""`jblock convert peft`: a PEFT or AdapterHub adapter becomes a chain of deltas on a chain's components."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.adapters.adapter import SMALL_FILES, base_named_by, open_adapter, plan_adapter
from checkpoints.adapters.adapter_plan import AdapterPlan, component_tensors
from checkpoints.errors import CheckpointError
from checkpoints.hf import again_if_gone, left_out, note_tokenizer
from checkpoints.progress import Progress
from checkpoints.source import Source
from checkpoints.tokenizer import read_tokenizer
from jblock.zoo.records import Chain, Step, check_name
from jblock.zoo.store import Zoo
from jblock.zoo.writer import Writer


def convert(
    source_path: Path,
    zoo_path: str | Path,
    base_name: str,
    name: str,
    progress: Progress,
    origin: Mapping[str, Any] | None = None,
    activate: bool = True,
) -> tuple[Chain, bool]:
    """Adds the adapter in `source_path` as model `name`, on a version of a model, which its record pins by
    its digest.

    Args:
      source_path: folder of the adapter.
      zoo_path: the zoo.
      base_name: NAME, its active version, or NAME@VERSION.
      name: of the new model.
      progress: told how far it is.
      activate: make it the active version of its name.

    `origin` says where it comes from: see `Chain.origin`.

    Returns:
      The chain, and whether it is a new version (False: the zoo had it).

    Raises:
      CheckpointError, ConfigError, SpecError, ZooError: see `errors.BAD_INPUT`.
    """
    check_name(name)
    zoo = Zoo.open(zoo_path)
    base = zoo.checked_chain(base_name)
    config, source = open_adapter(source_path)
    if name == base.name:
        raise CheckpointError(f"--name {name!r} is the base itself: give the adapter its own name")
    _check_base(zoo, base, base_named_by(config), progress)
    planned = plan_adapter(zoo, base, config, source)
    tokenizer = read_tokenizer(source_path)
    small = source.small_files(SMALL_FILES, tokenizer.given if tokenizer else ())
    if planned.left_out:
        small |= left_out(source, planned.left_out)
        progress.note(
            f"{name}: {len(planned.left_out)} tensors are left out, which adapt the vision part of a "
            f"multimodal model: {planned.left_out[0]!r} first"
        )
    if tokenizer is not None:
        note_tokenizer(tokenizer, planned.vocab_size or base.vocab_size, source_path, progress)

    before = zoo.versions(name)

    def add() -> Chain:
        with zoo.writer() as writer:
            total = sum(t.nbytes for t in source.tensors.values())
            with progress.bar(f"{name}: deltas", total) as advance:
                steps = []
                for index in range(len(base.steps)):
                    steps.append(_put_step(zoo, writer, base, index, planned, source))
                    names = {t.name for d in planned.on(index) for t in d.tensors.values()}
                    names |= set(planned.replaced.get(index, {}).values())
                    advance(sum(source.tensors[n].nbytes for n in names))
            chain = dataclasses.replace(
                base,
                name=name,
                version=0,
                steps=tuple(steps),
                base=f"{base.name}@{base.version}",
                base_digest=base.digest,
                vocab_size=planned.vocab_size or base.vocab_size,
                whole={},
                adapter=config,
                source_files=writer.put_files("sources", small),
                origin=dict(origin or {}),
            )
            if tokenizer is not None:
                chain = dataclasses.replace(
                    chain,
                    tokenizer=writer.put_files("tokenizers", tokenizer.served),
                    tokenizer_files=writer.put_files("sources", tokenizer.kept),
                )
            progress.note(f"{name}: {writer.new_bytes} of {total} bytes are new to the zoo")
            return writer.publish(chain, activate)

    published = again_if_gone(add)
    return published, published.version not in before


def _put_step(
    zoo: Zoo, writer: Writer, base: Chain, index: int, planned: AdapterPlan, source: Source
) -> Step:
    """One step of the adapter's chain: the base's component or another, and deltas on it."""
    step = base.steps[index]
    if index in planned.replaced:
        stored = zoo.load_component(step.component)
        tensors = component_tensors(stored, planned.replaced[index], source)
        if tensors is not None:
            if step.deltas:
                raise CheckpointError(
                    f"the adapter has {min(planned.replaced[index].values())!r} whole, where "
                    f"{base.name} is itself changed by deltas: merge one of them"
                )
            spec = planned.spec(zoo.component(step.component).spec)
            step = dataclasses.replace(step, component=writer.put_component(spec, tensors))
    deltas = tuple(
        writer.put_delta(
            delta.spec,
            step.component,
            {t: taken.read(source) for t, taken in delta.tensors.items()},
        )
        for delta in planned.on(index)
    )
    return dataclasses.replace(step, deltas=step.deltas + deltas)


def _check_base(zoo: Zoo, base: Chain, named: str, progress: Progress) -> None:
    """Refuses a base of another name than the adapter says, if the zoo has one of that; tells where nothing
    says that the base is the one that the adapter was made for."""
    declared = named.rstrip("/").rsplit("/", 1)[-1]
    if declared != base.name and declared in zoo.chains():
        raise CheckpointError(
            f"adapter_config.json: the base is {named!r}, which this zoo "
            f"holds as {declared!r}, but --base is {base.name!r}: give --base {declared}"
        )
    came_from = str(base.origin.get("source", "")).rstrip("/")
    if declared not in ("", base.name, came_from.rsplit("/", 1)[-1]):
        progress.note(
            f"adapter_config.json: the base is {named!r}, and {base.name}@{base.version} came from "
            f"{came_from!r}: nothing says that they are the same model"
        )
