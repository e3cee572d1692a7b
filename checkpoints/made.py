"""A checkpoint that no folder holds: its tensors are made when they are read, its files on export only.

What is not in Hugging Face form (GGUF, orbax) is opened as the checkpoint it stands for. It so converts,
verifies and plans like any other, and exports as a folder that transformers loads.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from checkpoints.safetensors_file import TensorInfo, check_finite, header_of
from checkpoints.source import TOKENIZER_LIST, Source
from jblock.zoo.ids import raw_bytes

WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeTensor(TensorInfo):
    """A tensor that `make` makes; where it would lie in a file means nothing."""

    make: Callable[[], np.ndarray]

    @classmethod
    def of(
        cls,
        name: str,
        path: Path,
        dtype: np.dtype,
        shape: tuple[int, ...],
        make: Callable[[], np.ndarray],
    ) -> "MadeTensor":
        """A tensor of this dtype and shape; `path` is the file to name in errors."""
        size = math.prod(shape) * dtype.itemsize
        return cls(name=name, path=path, dtype=dtype, shape=shape, start=0, end=size, make=make)

    def chunks(self) -> Iterator[bytes]:
        """The raw bytes, all at once."""
        yield raw_bytes(self.read_unchecked()).tobytes()

    def read_unchecked(self) -> np.ndarray:
        """The tensor, in memory of its own, whatever its numbers are."""
        return self.make()

    def read(self) -> np.ndarray:
        """The tensor, in memory of its own.

        Raises:
          CheckpointError: it cannot be read, or holds NaN or Inf.
        """
        value = self.make()
        check_finite(self.name, value)
        return value


@dataclasses.dataclass(frozen=True)
class MadeSource(Source):
    """A checkpoint of made tensors.

    Attributes:
      stamp: changes when what the tensors are made from changes.
      files: small files by name, as transformers would write them.
    """

    stamp: str
    files: Mapping[str, bytes]

    @classmethod
    def of(
        cls,
        path: Path,
        tensors: Mapping[str, MadeTensor],
        stamp: str,
        files: Mapping[str, bytes],
        notes: Collection[str] = (),
    ) -> "MadeSource":
        """A checkpoint with these tensors, which exports to one weight file."""
        return cls(
            path=path,
            tensors=dict(tensors),
            headers={WEIGHTS: header_of(tensors.values())},
            notes=tuple(notes),
            stamp=stamp,
            files=files,
        )

    def key(self) -> str:
        """64 hexadecimal digits that change when what it is made from changes."""
        parts = [
            str(self.path.resolve()),
            self.stamp,
            hashlib.sha256(self.headers[WEIGHTS]).hexdigest(),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def small_files(
        self, names: tuple[str, ...], tokenizer_files: tuple[str, ...]
    ) -> dict[str, bytes]:
        """See `Source.small_files`."""
        return {
            f"{WEIGHTS}.header": self.headers[WEIGHTS],
            TOKENIZER_LIST: json.dumps(tokenizer_files).encode(),
            **{n: self.files[n] for n in names if n in self.files},
        }
