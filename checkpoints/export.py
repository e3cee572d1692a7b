"""`jblock convert export`: a model of the zoo becomes the files it was made from, byte by byte.

The zoo keeps the headers of the weight files as they were, which say where every tensor lies. So the
files are laid out first, and every component is then read once, checked, and written to its places.
"""

import json
import os
import re
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from checkpoints import layouts, tokenizer_identity
from checkpoints.adapters.adapter import SMALL_FILES as ADAPTER_FILES
from checkpoints.adapters.adapter import plan_adapter
from checkpoints.bitfit import with_vectors
from checkpoints.errors import CheckpointError, fitting
from checkpoints.hf import LEFT_OUT, SMALL_FILES
from checkpoints.progress import Progress
from checkpoints.safetensors_file import TensorInfo, parse_header, unpack_tensors
from checkpoints.source import TOKENIZER_LIST, Source
from checkpoints.tokenizer import FILES as TOKENIZER_FILES
from jblock.families import Plan, families
from jblock.zoo import codec, disk
from jblock.zoo.ids import raw_bytes
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

_HEADER = ".header"
_MOST_LEFT_OUT = 1 << 30  # bytes of masks and rope tables that an export writes again
_WEIGHTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")


def export(
    zoo_path: str | Path,
    name: str,
    out: Path,
    progress: Progress,
    version: int | str | None = None,
) -> list[str]:
    """Writes a model as a Hugging Face checkpoint, or an adapter in the form it came in.

    Args:
      zoo_path: the zoo.
      name: the model.
      out: folder to make; it may exist if it is empty.
      progress: told how far it is.
      version: which version; None: the active one.

    Returns:
      Names of the files written, sorted.

    Raises:
      CheckpointError: `out` holds something, or the model was not made from such files.
      ZooError: no such model, or the zoo is damaged.
    """
    zoo = Zoo.open(zoo_path)
    chain = zoo.checked_chain(name, version)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there and not empty: give a new folder")
    if chain.base is None and chain.derived:  # an adapter on such a model is what it was
        raise CheckpointError(_why_not(chain))
    if chain.source_files is None:
        raise CheckpointError(
            f"{chain.name}@{chain.version} was not made from files (or by an early version), so "
            "there are none to write again"
        )
    with fitting(f"{chain.name}@{chain.version}"):
        return _export(zoo, chain, out, progress)


def _export(zoo: Zoo, chain: Chain, out: Path, progress: Progress) -> list[str]:
    kept = zoo.files("sources", chain.source_files or "")
    headers = {n.removesuffix(_HEADER): raw for n, raw in kept.items() if n.endswith(_HEADER)}
    small = {n: b for n, b in kept.items() if not n.endswith(_HEADER)}
    left_out = _left_out(small)
    small |= _tokenizer(zoo, chain, small)
    _check_names(chain, headers, small)
    _check_config(chain, small)
    for file in sorted(small):
        if file.endswith("config.json") and b'"auto_map"' in small[file]:
            progress.note(
                f"{file} names code (auto_map), as the file that it is made from does; no code is "
                "written, and what loads it should not be told to trust any"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    with disk.disk_errors(out):
        aside.mkdir()
        try:
            source = _lay_out(aside, headers)
            plan = None
            if chain.base is None:
                plan, source = layouts.fit(families()[chain.family].plan(chain.source), source)
            for file, data in small.items():
                (aside / file).write_bytes(data)
            total = sum(t.nbytes for t in source.tensors.values())
            with progress.bar(f"{chain.name}: writing", total) as advance:
                missing = set(source.tensors)
                for values in (left_out, *_values(zoo, chain, plan, source)):
                    for tensor in values.keys() & missing:
                        advance(_write(source.tensors[tensor], values[tensor]))
                    missing -= values.keys()
            if missing:
                raise CheckpointError(
                    f"{chain.name}@{chain.version} lacks {min(missing)!r}, which its files had: it "
                    "is no longer what it was made from"
                )
            disk.fsync_trees([aside])
            os.rename(aside, out)  # over an empty folder too
            disk.fsync_path(out.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return sorted(os.listdir(out))


def _check_names(chain: Chain, headers: Mapping[str, bytes], small: Mapping[str, bytes]) -> None:
    """Refuses files that no converted checkpoint had: a zoo may come from anywhere, and Python files or
    pickles beside weights are run by what loads them."""
    allowed = {*SMALL_FILES, *ADAPTER_FILES, *TOKENIZER_FILES}
    bad = sorted(
        {n for n in small if n not in allowed} | {n for n in headers if not _WEIGHTS.fullmatch(n)}
    )
    if bad:
        raise CheckpointError(
            f"{chain.name}@{chain.version} keeps a file {bad[0]!r}, which is not of a checkpoint: nothing "
            "was written; do not trust this zoo"
        )


def _check_config(chain: Chain, small: Mapping[str, bytes]) -> None:
    """Refuses a configuration that is not the one the model was made from."""
    name, expected = (
        ("config.json", chain.source)
        if chain.base is None
        else ("adapter_config.json", chain.adapter)
    )
    if name not in small:
        return
    found = codec.parse_json(small[name], f"{name} of {chain.name}@{chain.version}")
    if found != expected:
        raise CheckpointError(
            f"{chain.name}@{chain.version} keeps another {name} than it was made from: nothing was written; "
            "do not trust this zoo"
        )


def _why_not(chain: Chain) -> str:
    """Why a chain is not what some files were."""
    if "packed" in chain.derived:
        return (
            f"{chain.name}@{chain.version} was packed by {chain.derived['packed'].get('quant_method')}; "
            "the zoo keeps its weights, not that packing: copy the checkpoint it was made from"
        )
    original = chain.derived.get("chain", "a model it was made from")
    return (
        f"{chain.name}@{chain.version} was made from {original} by "
        f"'{chain.derived.get('command')}', which loses something: it is no checkpoint; export {original}"
    )


def _left_out(small: dict[str, bytes]) -> dict[str, np.ndarray]:
    """The tensors that the model does not need; takes them out of `small`."""
    if LEFT_OUT in small:
        try:
            inflater = zlib.decompressobj()
            data = inflater.decompress(small.pop(LEFT_OUT), _MOST_LEFT_OUT)
        except zlib.error as e:
            raise CheckpointError(f"{LEFT_OUT} of the zoo cannot be inflated: {e}") from e
        if inflater.unconsumed_tail:
            raise CheckpointError(f"{LEFT_OUT} of the zoo has over {_MOST_LEFT_OUT} bytes inflated")
        return unpack_tensors(data)
    # As earlier versions kept them.
    plain = small.pop("left_out.safetensors", None)
    return {} if plain is None else unpack_tensors(plain)


def _lay_out(folder: Path, headers: Mapping[str, bytes]) -> Source:
    """Weight files of their full length, with their headers and nothing else yet."""
    tensors: dict[str, TensorInfo] = {}
    for file, raw in headers.items():
        found = parse_header(folder / file, raw)
        with open(folder / file, "xb") as f:
            f.write(struct.pack("<Q", len(raw)) + raw)
            f.truncate(8 + len(raw) + sum(t.nbytes for t in found.values()))
        tensors |= found
    return Source(path=folder, tensors=tensors, headers=dict(headers))


def _write(info: TensorInfo, value: np.ndarray) -> int:
    if (value.dtype, value.shape) != (info.dtype, info.shape):
        raise CheckpointError(
            f"tensor {info.name!r} is {value.dtype} {list(value.shape)}, its file had {info.dtype} "
            f"{list(info.shape)}: it is no longer what it was made from"
        )
    with open(info.path, "r+b") as f:
        f.seek(info.start)
        f.write(raw_bytes(value).data)
    return info.nbytes


def _tokenizer(zoo: Zoo, chain: Chain, small: dict[str, bytes]) -> dict[str, bytes]:
    """The tokenizer files that the source had; takes the list of them out of `small`."""
    listed = small.pop(TOKENIZER_LIST, None)
    if chain.tokenizer is None:
        return {}
    files = tokenizer_files(zoo, chain)
    if listed is not None:
        try:
            return {n: files[n] for n in json.loads(listed)}
        except (KeyError, TypeError, ValueError, RecursionError) as e:
            raise CheckpointError(
                f"{chain.name}@{chain.version} lists tokenizer files that it does not have: {e}"
            ) from e
    # Models of zoos that hold no such list: adapters mostly have none of their own.
    return files if chain.base is None else {}


def tokenizer_files(zoo: Zoo, chain: Chain) -> dict[str, bytes]:
    """The files of a model's tokenizer as they came, and its tokenizer.json; {} when it has none.

    Raises:
      CheckpointError: what the zoo keeps does not lead back to tokenizer.json.
    """
    if chain.tokenizer is None:
        return {}
    files = zoo.files("tokenizers", chain.tokenizer)
    if chain.tokenizer_files is None:
        return files
    kept = zoo.files("sources", chain.tokenizer_files)
    try:
        raw = tokenizer_identity.file_of(kept, files[TOKENIZER_FILES[0]])
    except (KeyError, ValueError) as e:
        raise CheckpointError(
            f"{chain.name}@{chain.version}: its tokenizer.json cannot be written again ({e}): run fsck"
        ) from e
    ways = (tokenizer_identity.FORM, tokenizer_identity.DEFLATED)
    return {n: b for n, b in kept.items() if n not in ways} | {TOKENIZER_FILES[0]: raw}


def _values(
    zoo: Zoo, chain: Chain, plan: Plan | None, source: Source
) -> Iterator[dict[str, np.ndarray]]:
    """The tensors by their names in the files, those of one component or delta at a time."""
    if plan is None:
        yield from _adapter(zoo, chain, source)
        return
    if len(plan.steps) != len(chain.steps):
        raise CheckpointError(
            f"{chain.name} has {len(chain.steps)} components, its config.json makes "
            f"{len(plan.steps)}: it is no longer what it was made from"
        )
    copies: dict[str, list[str]] = {}
    for copy, original in plan.copies.items():
        copies.setdefault(original, []).append(copy)
    for planned, step in zip(plan.steps, chain.steps, strict=True):
        stored = with_vectors(zoo, step.component, step.deltas)
        values = {file_name: stored[name] for name, file_name in planned.tensors.items()}
        yield values | {c: values[n] for n in values for c in copies.get(n, ())}


def _adapter(zoo: Zoo, chain: Chain, source: Source) -> Iterator[dict[str, np.ndarray]]:
    base_name, _, version = (chain.base or "").rpartition("@")
    base = zoo.checked_chain(base_name, int(version))
    planned = plan_adapter(zoo, base, chain.adapter, source)
    columns: dict[str, dict[int, np.ndarray]] = {}  # of tensors that several deltas share
    for i, (step, under) in enumerate(zip(chain.steps, base.steps, strict=True)):
        if i in planned.replaced:
            whole = zoo.load_component(step.component, verify=True)
            yield {taken: whole[name] for name, taken in planned.replaced[i].items()}
        for delta, id_ in zip(planned.on(i), step.deltas[len(under.deltas) :], strict=True):
            stored = zoo.load_delta(id_, verify=True)
            for name, part in delta.tensors.items():
                if part.columns is None:
                    yield {part.name: stored[name]}
                else:
                    columns.setdefault(part.name, {})[part.columns[0]] = stored[name]
    for name, parts in columns.items():
        yield {name: np.concatenate([parts[begin] for begin in sorted(parts)], axis=1)}
