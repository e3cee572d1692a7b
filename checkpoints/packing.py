"""What every way of packing weights has to answer: which projections are packed, and what they stand for."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.source import Source
from jblock.blocks.quant_spec import QuantSpec

FIELD = "quantization_config"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedModule:
    """One packed projection as the zoo keeps it.

    Attributes:
      quant: how it is quantized.
      tensors: by the last parts of the names in QuantSpec: "codes", "scales" and so on. Codes of 4 bits in
        the form "int" are int8, one to an element.
    """

    quant: QuantSpec
    tensors: Mapping[str, np.ndarray]


class Packing(Protocol):
    """How a checkpoint says its weights are packed."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Ends of names of a packed module's tensors, behind the module's name."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of weights packed so."""
        ...

    def packs(self, source: Source, module: str) -> bool:
        """Whether a module of the checkpoint is packed."""
        ...

    def read(self, source: Source, module: str, out: int, inner: int) -> PackedModule:
        """One packed projection.

        Raises:
          CheckpointError: a tensor is missing or of another shape or dtype, or means what is not known.
        """
        ...


def codes_of(words: np.ndarray, bits: int) -> np.ndarray:
    """[rows, columns] of int32 -> uint8 [rows, columns, 32 / bits], lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)).astype(np.uint8)


def order_of(source: Source, name: str, g_idx: np.ndarray, group: int) -> np.ndarray | None:
    """Inputs sorted by their group in `g_idx`; None where they lie so.

    Raises:
      CheckpointError: groups are not of equal size.
    """
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    if (g_idx[order] != np.arange(len(g_idx)) // group).any():
        raise CheckpointError(
            f"{source.path}: {name!r} does not give {group} inputs to each group: what its "
            "scales belong to is not known"
        )
    return None if (order == np.arange(len(order))).all() else order


def tensor(source: Source, name: str, shape: tuple[int, ...] | None, *dtypes: str) -> np.ndarray:
    """A tensor of the checkpoint that has to have this shape (None: any) and one of these dtypes.

    Raises:
      CheckpointError: it is missing or another one.
    """
    info = source.tensors.get(name)
    if info is None:
        raise CheckpointError(
            f"{source.path}: tensor {name!r} is missing: give the whole checkpoint"
        )
    if (shape is not None and info.shape != shape) or info.dtype.name not in dtypes:
        wanted = "" if shape is None else f" {list(shape)}"
        raise CheckpointError(
            f"{source.path}: tensor {name!r} is {info.dtype.name} {list(info.shape)}, {FIELD} makes it "
            f"{' or '.join(dtypes)}{wanted}: one of the two is of another packing"
        )
    return source.read(name)
