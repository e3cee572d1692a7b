"""A checkpoint folder in Hugging Face form: its JSON files, and its tensors over all shards."""

import hashlib
import json
import math
import os
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
    """

    path: Path
    tensors: dict[str, TensorInfo]
    headers: dict[str, bytes]

    def read(self, name: str) -> np.ndarray:
        """One tensor; see `TensorInfo.read`."""
        return self.tensors[name].read()

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
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder: give a checkpoint as saved by transformers")
    single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{path} has both {single.name} and {index.name}: remove the one that is out of date"
        )
    if single.is_file():
        files, weight_map = [single.name], None
    elif index.is_file():
        weight_map = _weight_map(index)
        files = sorted(set(weight_map.values()))
    else:
        raise CheckpointError(_no_weights(path, single.name, save))
    tensors: dict[str, TensorInfo] = {}
    headers = {}
    for file in files:
        if not (path / file).is_file():
            raise CheckpointError(f"{path} lacks {file}, which {index.name} names: download it")
        headers[file], found = read_header(path / file)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise CheckpointError(f"{path}: tensor {twice[0]!r} is in more than one shard")
        tensors |= found
    if weight_map is not None:
        for name in sorted(weight_map.keys() | tensors.keys()):
            held = tensors[name].path.name if name in tensors else None
            if held != weight_map.get(name):
                raise CheckpointError(
                    f"{path}: {index.name} puts tensor {name!r} in {weight_map.get(name)}, but it "
                    f"is in {held}: download both again"
                )
    return Source(path=path, tensors=tensors, headers=headers)


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


def _no_weights(path: Path, wanted: str, save: str) -> str:
    pickled = sorted(f for f in os.listdir(path) if f.endswith(_PICKLE))
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
