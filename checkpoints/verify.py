"""`jblock convert verify`: is a model of the zoo, bit by bit, the checkpoint it was made from?"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from checkpoints.adapters.adapter import open_adapter, plan_adapter
from checkpoints.bitfit import with_vectors
from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import fitting
from checkpoints.folders import is_adapter
from checkpoints.hf import LEFT_OUT
from checkpoints.multimodal import TextSource
from checkpoints.opening import kind_of, open_checkpoint
from checkpoints.progress import Progress
from checkpoints.source import TOKENIZER_LIST, Source
from checkpoints.tokenizer import TokenizerFiles, read_tokenizer
from jblock.zoo.ids import files_id
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

_HEADER = ".header"
_MADE = (TOKENIZER_LIST, LEFT_OUT, "left_out.safetensors")  # by the converter


def verify(zoo_path: str | Path, name: str, source_path: Path, progress: Progress) -> list[str]:
    """Differences between a model (NAME or NAME@VERSION) and the checkpoint or adapter, one line each.

    Raises:
      CheckpointError, ConfigError, SpecError, ZooError: either side cannot be read.
    """
    zoo = Zoo.open(zoo_path)
    chain = zoo.chain(name)
    with fitting(f"{chain.name}@{chain.version}"):
        return _differences(zoo, chain, source_path, progress)


def _differences(zoo: Zoo, chain: Chain, source_path: Path, progress: Progress) -> list[str]:
    made: Mapping[str, bytes] = {}
    if is_adapter(source_path):
        differences = _adapter(zoo, chain, source_path, progress)
        tokenizer = read_tokenizer(source_path)
    else:
        checkpoint = open_checkpoint(source_path)
        differences = _checkpoint(zoo, chain, checkpoint, progress)
        tokenizer = checkpoint.tokenizer
        if isinstance(checkpoint.source, TextSource):
            headers = checkpoint.source.headers
            made = {**checkpoint.source.replaced} | {f"{f}{_HEADER}": h for f, h in headers.items()}
    if kind_of(source_path) == "hf":  # of others the zoo keeps what was made of their files
        differences += _kept_files(zoo, chain, source_path, made)
    if tokenizer is not None and not _same_tokenizer(chain, tokenizer):
        differences.append("the tokenizer files differ")
    if tokenizer is None and chain.tokenizer is not None and chain.base is None:
        differences.append(f"{source_path} has no tokenizer, the zoo has one")
    return differences


def _same_tokenizer(chain: Chain, found: TokenizerFiles) -> bool:
    if chain.tokenizer_files is None:  # as earlier versions kept all files together
        return chain.tokenizer == files_id(found.files)
    ids = (files_id(found.served), files_id(found.kept))
    return (chain.tokenizer, chain.tokenizer_files) == ids


def _kept_files(zoo: Zoo, chain: Chain, path: Path, made: Mapping[str, bytes]) -> list[str]:
    """Files that the zoo keeps for an export, and that are not those of the source; `made` are those that
    the text model inside a wrapper has in place of the wrapper's."""
    if chain.source_files is None:
        return []
    differences = []
    for name, data in zoo.files("sources", chain.source_files).items():
        if name in _MADE:
            continue
        if name in made:
            if made[name] != data:
                differences.append(f"{name} differs from the one the zoo keeps")
            continue
        file, header = path / name.removesuffix(_HEADER), name.endswith(_HEADER)
        try:
            with open(file, "rb") as f:
                if header:
                    f.seek(8)
                    found = f.read(len(data))
                else:
                    found = f.read(len(data) + 1)
        except OSError:
            found = b""
        if found != data:
            what = f"the header of {file.name}" if header else file.name
            differences.append(f"{what} differs from the one the zoo keeps")
    return differences


def _checkpoint(zoo: Zoo, chain: Chain, checkpoint: Checkpoint, progress: Progress) -> list[str]:
    if chain.base is not None:
        return [f"{chain.name} is an adapter on {chain.base}, {checkpoint.path} a whole model"]
    plan, source = checkpoint.plan, checkpoint.source
    packed = chain.derived.get("packed")
    same = checkpoint.described == chain.source and checkpoint.packed == packed
    differences = [] if same else ["config.json differs"]
    if len(plan.steps) != len(chain.steps):
        return [*differences, f"{len(plan.steps)} components, the zoo has {len(chain.steps)}"]
    total = sum(t.nbytes for t in source.tensors.values())
    with progress.bar(f"{chain.name}: comparing", total) as advance:
        for planned, step in zip(plan.steps, chain.steps, strict=True):
            if planned.spec != zoo.component(step.component).spec:
                differences.append(f"component {step.component} has another spec")
                continue
            stored = with_vectors(zoo, step.component, step.deltas)
            differences += _compare(source, planned.tensors, stored)
            advance(sum(value.nbytes for value in stored.values()))
    return differences


def _adapter(zoo: Zoo, chain: Chain, path: Path, progress: Progress) -> list[str]:
    config, source = open_adapter(path)
    if chain.base is None:
        return [f"{chain.name} is a whole model, {path} an adapter"]
    base_name, _, version = chain.base.rpartition("@")
    base = zoo.checked_chain(base_name, int(version))
    planned = plan_adapter(zoo, base, config, source)
    differences = [] if config == chain.adapter else ["adapter_config.json differs"]
    total = sum(t.nbytes for t in source.tensors.values())
    with progress.bar(f"{chain.name}: comparing", total) as advance:
        for i, (step, under) in enumerate(zip(chain.steps, base.steps, strict=True)):
            ids, wanted = step.deltas[len(under.deltas) :], planned.on(i)
            replaced = planned.replaced.get(i, {})
            if len(ids) != len(wanted) or (step.component != under.component and not replaced):
                differences.append(f"step {i} has other components or deltas")
                continue
            if replaced:
                whole = zoo.load_component(step.component)
                differences += _compare(source, replaced, whole)
                advance(sum(whole[name].nbytes for name in replaced))
            for id_, delta in zip(ids, wanted, strict=True):
                if zoo.delta(id_).spec != delta.spec:
                    differences.append(f"step {i} has other ranks or scales")
                    continue
                stored = zoo.load_delta(id_)
                for name, taken in delta.tensors.items():
                    value = taken.read(source)
                    if (value.dtype, value.tobytes()) != (
                        stored[name].dtype,
                        stored[name].tobytes(),
                    ):
                        differences.append(f"tensor {taken.name!r} differs")
                advance(sum(value.nbytes for value in stored.values()))
    return differences


def _compare(
    source: Source, names: Mapping[str, str], stored: Mapping[str, np.ndarray]
) -> list[str]:
    out = []
    for name, source_name in names.items():
        info, value = source.tensors[source_name], stored[name]
        if (info.dtype, info.shape) != (value.dtype, value.shape):
            out.append(f"tensor {source_name!r} has another dtype or shape")
        elif not source.holds(source_name, value):
            out.append(f"tensor {source_name!r} differs")
    return out
