"""Kernels measured one by one: what each op must offer to `python -m bench kernels`.

An op is a module here with

* `backend() -> str`, what serves it on the present device;
* `cases(quick) -> list[Case]`;
* `tunes(case) -> list[Any]`, the block sizes worth trying on the present device, empty if its backend
  has none to choose;
* where it has some, `describe(blocks) -> dict[str, int]` for the report, and `save(best) -> Path`, which
  keeps what was found for each case where the backend looks for it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

OPS = (
    "paged_attention",
    "grouped_delta_matmul",
    "grouped_block_matmul",
    "quantized_matmul",
    "projection",
    "mixture",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of an op.

    Attributes:
      name: model, batch and dtype.
      moved: bytes that must move.
      flops: that must be done.
      make: arguments on the device, and the function of the arguments and of one of the op's `tunes`
        (None: the backend's own choice) that gives the results.
      shape: what the op tunes by.
      donated: the argument that is donated and that result 1 replaces; None: none is.
    """

    name: str
    moved: int
    flops: int
    make: Callable[[], tuple[list[Any], Callable[..., Any]]]
    shape: Any
    donated: int | None = None
