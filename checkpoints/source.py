"""A checkpoint folder in Hugging Face form: its JSON files, and its tensors over all shards."""

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.safetensors_file import TensorInfo, read_header

# In a folder of small files: names of the tokenizer files that were there, a JSON list.
TOKENIZER_LIST = "tokenizer_files.json"
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened checkpoint: headers read and checked, tensors still on disk.

    Attributes:
      path: the folder.
      tensors: every tensor, by name.
      headers: weight file -> its header, byte by byte.
      notes: what is odd about the files, though they can be read.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    headers: dict[str, bytes]
    notes: tuple[str, ...] = ()

    @property
    def made(self) -> Collection[str]:
        """Names of tensors that are worked out when they are read, in dtypes of their own."""
        return ()

    def read(self, name: str) -> np.ndarray:
        """One tensor; see `TensorInfo.read`."""
        return self.tensors[name].read()

    def holds(self, name: str, value: np.ndarray) -> bool:
        """Whether a tensor is `value` bit by bit, where dtype and shape are the same."""
        if name in self.made:
            return self.read(name).tobytes() == value.tobytes()
        return self.tensors[name].holds(value)

    def key(self) -> str:
        """64 hexadecimal digits that change when a file was exchanged or written to."""
        parts: list[Any] = [str(self.path.resolve())]
        for file, raw in sorted(self.headers.items()):
            stat = (self.path / file).stat()
            header = hashlib.sha256(raw).hexdigest()
            parts.append([file, stat.st_size, stat.st_mtime_ns, stat.st_ino, header])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same bit by bit, without holding either in memory."""
        a, b = self.tensors[one], self.tensors[other]
        same = (a.dtype, a.shape) == (b.dtype, b.shape)
        return same and all(x == y for x, y in zip(a.chunks(), b.chunks(), strict=True))

    def small_files(
        self, names: tuple[str, ...], tokenizer_files: tuple[str, ...]
    ) -> dict[str, bytes]:
        """What an export needs beside tensors and the tokenizer.

        Returns:
          Those of the named files that are there, byte by byte; the header of every weight file as
          `<file>.header`; and which tokenizer files there were, as TOKENIZER_LIST.
        """
        files = {f"{name}.header": raw for name, raw in self.headers.items()}
        files[TOKENIZER_LIST] = json.dumps(tokenizer_files).encode()
        return files | {n: (self.path / n).read_bytes() for n in names if (self.path / n).is_file()}


def open_source(
    path: Path, stem: str = "model", save: str = "transformers: save_pretrained"
) -> Source:
    """Opens the safetensors weights of a folder.

    Args:
      path: the folder.
      stem: what its weight files are called: "model", or for an adapter of PEFT "adapter_model".
      save: how to save it so, said where only pickled weights are there.

    Raises:
      CheckpointError: no weights, pickled weights only, or shards that do not fit their index.
    """
    single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    weight_map = _weight_map(index) if index.is_file() else None
    if single.is_file() and weight_map is not None and set(weight_map.values()) != {single.name}:
        raise CheckpointError(
            f"{path} has {single.name}, and {index.name} names other files: remove the one that is out "
            "of date"
        )
    if weight_map is not None:
        files = sorted(set(weight_map.values()))
    elif single.is_file():
        files = [single.name]
    else:
        raise CheckpointError(_no_weights(path, stem, save))
    tensors: dict[str, TensorInfo] = {}
    headers = {}
    for file in files:
        if not (path / file).is_file():
            raise CheckpointError(f"{path} lacks {file}, which {index.name} names: download it")
        headers[file], found = read_header(path / file)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                f"{path}: tensor {twice[0]!r} is in {tensors[twice[0]].path.name} and in {file}: which is "
                "meant is not known; save the checkpoint again"
            )
        tensors |= found
    notes = () if weight_map is None else _notes_on(index, weight_map, tensors)
    return Source(path=path, tensors=tensors, headers=headers, notes=notes)


def _notes_on(
    index: Path, weight_map: dict[str, str], tensors: Mapping[str, TensorInfo]
) -> tuple[str, ...]:
    """How an index differs from its shards. Only the files that it names are taken from it, as transformers
    does: every tensor of theirs is read, and none that is only a row."""
    odd = [
        name
        for name in sorted(weight_map.keys() | tensors.keys())
        if name not in tensors or tensors[name].path.name != weight_map.get(name)
    ]
    if not odd:
        return ()
    return (
        f"{index.name} disagrees with its files on {len(odd)} tensors ({odd[0]!r} first): the files are "
        "followed",
    )


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """The object in a JSON file; {} when it is absent and not required.

    Raises:
      CheckpointError: absent though required, malformed, or no object.
    """
    if not path.exists() and not required:
        return {}
    if path.exists() and not path.is_file():
        # Reading a pipe or a device might never end.
        raise CheckpointError(f"{path} is no regular file: give a complete checkpoint")
    try:
        data = json.loads(path.read_bytes(), parse_constant=_refuse_constant, parse_float=_finite)
    except FileNotFoundError as e:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: give a complete checkpoint"
        ) from e
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be read ({e}): download it again") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, expected an object")
    return data


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: download it again")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and os.path.basename(file) == file
        if not plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to be in {file!r}; only safetensors files of "
                "the same folder are read"
            )
    return weight_map


def _no_weights(path: Path, stem: str, save: str) -> str:
    """Why a folder has no weights that can be read, and what to do."""
    wanted, files = f"{stem}.safetensors", sorted(os.listdir(path))
    shards = [f for f in files if re.fullmatch(rf"{stem}-\d+-of-\d+\.safetensors", f)]
    if shards:
        return (
            f"{path} has {len(shards)} shards ({shards[0]} first) but no {wanted}.index.json, which says "
            "what belongs together: download it too, or save the model again"
        )
    others = [f for f in files if f.endswith(".safetensors")]
    if others:
        return (
            f"{path} has {others[0]} but no {wanted}: rename it if it holds the model's weights in the "
            f"layout of transformers, or save it so ({save})"
        )
    gguf = [f for f in files if f.endswith(".gguf")]
    if gguf:
        return (
            f"{path} has {gguf[0]}, which is not read by this command: take the safetensors files"
        )
    pickled = [f for f in files if f.endswith(_PICKLE)]
    if pickled:
        return (
            f"{path}: {pickled[0]} is a pickle, which can run code when loaded, so it is never "
            f"read: save it as {wanted} ({save})"
        )
    return f"{path} has no {wanted} and no {wanted}.index.json: give a checkpoint in safetensors"


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is over what a float holds")
    return value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")
