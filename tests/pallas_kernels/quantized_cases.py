"""The cases every backend of the quantized matmul must get right, and how one is put to it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jblock.pallas_kernels.quantized_matmul import reference


@dataclasses.dataclass(frozen=True)
class Case:
    """One product.

    Attributes:
      rows: of x.
      out: columns of the result.
      width: inputs.
      group: inputs of a scale; 0: all.
      bits: of the weights, 8 or 4.
      x: dtype of x.
      zeros: whether there are any.
      padding: rows of x that hold NaN, at its end.
    """

    rows: int
    out: int = 256
    width: int = 256
    group: int = 128
    bits: int = 8
    x: str = "float32"
    zeros: bool = False
    padding: int = 0

    def __str__(self) -> str:
        name = f"{self.rows}+{self.padding}x{self.width}x{self.out}-group{self.group}-int{self.bits}-{self.x}"
        return name + "-zeros" * self.zeros

    @property
    def tolerance(self) -> float:
        """Error allowed, relative to the largest value."""
        return 2e-5 if self.x == "float32" else 1e-2


KINDS = [
    (bits, x, zeros) for bits in (8, 4) for x in ("float32", "bfloat16") for zeros in (False, True)
]

CASES = [
    # Every kind of weights: decoding, few rows with padding, many rows.
    *(
        Case(rows, bits=bits, x=x, zeros=zeros, padding=padding)
        for bits, x, zeros in KINDS
        for rows, padding in ((1, 0), (5, 3), (48, 0))
    ),
    # Groups from 32 inputs to a whole row.
    *(
        Case(8, 128, 512, group, bits=bits, x=x, zeros=group == 64)
        for group in (32, 64, 128, 256, 0)
        for bits, x in ((8, "float32"), (4, "bfloat16"))
    ),
    # Numbers of rows around tiles.
    *(Case(rows, 128, 128, x="bfloat16") for rows in (2, 7, 8, 9, 15, 16, 17, 31, 33)),
    *(Case(rows, 128, 256, 64, bits=4, zeros=True) for rows in (3, 63, 64, 65, 130)),
    *(Case(rows, 256, 128, 32, bits=4, x="bfloat16", padding=rows % 5) for rows in (1, 4, 12, 40)),
    # Widths that are no multiple of a tile.
    Case(4, 1, 128),
    Case(4, 8, 128),
    Case(4, 96, 128, 32),
    Case(4, 130, 256, bits=4),
    Case(4, 384, 640, 128, x="bfloat16"),
    Case(4, 200, 192, 64),
    Case(4, 72, 96, 32, bits=4, x="bfloat16", zeros=True),
    Case(3, 40, 24, 8),
    Case(2, 24, 20, 4, zeros=True),
    Case(2, 7, 9, 3),
    Case(1, 3, 5, 0, zeros=True),
    # Shapes of real layers, narrowed.
    Case(16, 1024, 1024, 128, x="bfloat16"),
    Case(16, 512, 2048, 128, bits=4, x="bfloat16"),
    Case(1, 2048, 512, 32, bits=4, x="bfloat16", padding=7),
    Case(130, 512, 384, 128, x="bfloat16", zeros=True, padding=6),
]


def make(case: Case, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """x, w_q, scales and zeros (or None) of a case; x's padding is NaN."""
    rng = np.random.default_rng(seed)
    shape = (case.out, case.width // (case.group or case.width))
    x = rng.standard_normal((case.rows + case.padding, case.width), np.float32)
    x[case.rows :] = np.nan
    least, most = (-128, 127) if case.bits == 8 else (-8, 7)
    w_q = rng.integers(least, most, (case.out, case.width), endpoint=True)
    scales = rng.uniform(0.5, 2.0, shape) / most * rng.choice([1.0, 30.0], shape)
    zeros = jnp.asarray(rng.integers(least, most, shape), jnp.float32) if case.zeros else None
    dtype = jnp.int8 if case.bits == 8 else jnp.int4
    return jnp.asarray(x, case.x), jnp.asarray(w_q, dtype), jnp.asarray(scales, jnp.float32), zeros


def hold(case: Case, multiply: Callable[..., Any], seed: int = 0) -> None:
    """Fails unless `multiply`, as api.quantized_matmul, agrees with the reference."""
    x, w_q, scales, zeros = make(case, seed)
    got = multiply(x, w_q, scales, zeros)
    assert got.shape == (case.rows + case.padding, case.out) and got.dtype == jnp.float32
    wanted = reference.quantized_matmul(
        np.asarray(x[: case.rows], np.float32), np.asarray(w_q.astype(jnp.int32)), scales, zeros
    )
    atol = case.tolerance * np.abs(wanted).max()
    np.testing.assert_allclose(np.asarray(got)[: case.rows], wanted, atol=atol, rtol=0)
