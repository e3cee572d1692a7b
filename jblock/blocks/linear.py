"""Projections, with what each row's own delta makes of them."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jblock.blocks import grouped
from jblock.blocks.platform import Platform
from jblock.blocks.quant_spec import CODES, ORDER, SCALES, ZEROS
from jblock.blocks.rows import Rows
from jblock.blocks.slots import Slots
from jblock.cpu_kernels.matmul import api as cpu_matmul
from jblock.pallas_kernels.backends import backend_of
from jblock.pallas_kernels.quantized_matmul.api import quantized_matmul

_BF16_ROWS = 8


def matmul(
    x: jax.Array, weight: jax.Array, platform: Platform, *, transposed: bool | None = None
) -> jax.Array:
    """`x [T, in] @ weight` in the weight's dtype, accumulated and returned in float32.

    The accumulation type is stated because XLA's CPU backend takes its bf16 path only then, and there
    fewer than 8 bf16 rows are padded to 8, because below it falls back to a far slower loop. The precision
    is stated because otherwise TPUs multiply float32 as bfloat16, and GPUs as TensorFloat-32.

    Args:
      x: [T, in].
      weight: [in, out], or [out, in] when transposed.
      platform: what it is compiled for.
      transposed: how the weight lies; None: as projections do there (`Platform.out_in`).
    """
    transposed = platform.out_in if transposed is None else transposed
    if platform.avx512 and transposed and cpu_matmul.serves(x.shape[0], [weight]):
        return cpu_matmul.matmul(x, [weight])[0]
    return by_xla(x, weight, platform, transposed=transposed)


def by_xla(
    x: jax.Array, weight: jax.Array, platform: Platform, *, transposed: bool | None = None
) -> jax.Array:
    """`matmul` as XLA does it, whatever else there may be."""
    transposed = platform.out_in if transposed is None else transposed
    if platform.avx512 and transposed and weight.dtype == jnp.float32:
        return _weight_first(x, weight)
    padded = platform.name == "cpu" and weight.dtype == jnp.bfloat16
    return _rows_first(x, weight, transposed, _BF16_ROWS if padded else 1)


def _rows_first(x: jax.Array, weight: jax.Array, transposed: bool, least: int) -> jax.Array:
    count = x.shape[0]
    if count < least:
        x = jnp.pad(x, ((0, least - count), (0, 0)))
    y = jax.lax.dot_general(
        x.astype(weight.dtype),
        weight,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return y[:count]


def _weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`(weight [out, in] @ x.T).T` in float32, really computed in that order.

    Where the CPU has AMX it takes 0.5 of the time of `x @ weight.T` at 4 and 8 rows, 0.7 at 32 and 0.8 at
    64. The barriers keep XLA from moving the small transposes into the product, which turns it round.
    """
    xt = jax.lax.optimization_barrier(x.astype(weight.dtype).T)
    y = jax.lax.dot_general(weight, xt, (((1,), (0,)), ((), ())))
    return jax.lax.optimization_barrier(y).T


class Quantized(nnx.Module):
    """A weight of few bits; see QuantSpec.

    Attributes:
      codes: int8 or int4 [out, in], or two of 4 bits to a byte, uint8 [out, in / 2].
      scales: float32 [out, groups].
      zeros: float32 [out, groups] or None.
      order: int32 [in] or None.
    """

    def __init__(self, params: Mapping[str, jax.Array], name: str):
        def optional(part: str) -> nnx.Param | None:
            value = params.get(f"{name}.{part}")
            return None if value is None else nnx.Param(value)

        self.codes = nnx.Param(params[f"{name}.{CODES}"])
        self.scales = nnx.Param(params[f"{name}.{SCALES}"])
        self.zeros, self.order = optional(ZEROS), optional(ORDER)

    def __call__(self, x: jax.Array, platform: Platform) -> jax.Array:
        """[T, in] -> [T, out], float32."""
        if self.order is not None:
            x = jnp.take(x, self.order[...], axis=1)
        if grouped.has_kernels(platform):
            # Whole numbers of 8 bits are exact in it, so nothing but x is rounded.
            x = x.astype(jnp.bfloat16)
        zeros = None if self.zeros is None else self.zeros[...]
        return quantized_matmul(
            x,
            self.codes[...],
            self.scales[...],
            zeros,
            backend=backend_of(platform.name),
            device_kind=platform.kind,
        )


class Linear(nnx.Module):
    """`y = x @ weight + bias`, with what slot tables make of it for each row (blocks/slots.py):
    `scale * (x' @ weight + b @ (a @ x') + bits @ x') + bias` with `x' = in_scale * x`.

    Attributes:
      weight: [out, in] or [in, out], as `Platform.out_in` of what it is compiled for says;
        or a Quantized one.
      bias: [out] or None.
    """

    def __init__(
        self,
        params: Mapping[str, jax.Array],
        deltas: Mapping[str, jax.Array],
        name: str,
        *,
        partial: bool = False,
    ):
        """Takes `name`.weight, or what stands for it, and .bias from params.

        Args:
          params: tensors of the component.
          deltas: its slot tables.
          name: of the projection.
          partial: its input is what a split block computes, so that each device of the mesh has a
            part of the sum.
        """
        self.name, self.partial = name, partial
        quantized = f"{name}.{CODES}" in params
        self.weight = Quantized(params, name) if quantized else nnx.Param(params[f"{name}.weight"])
        self.bias = nnx.Param(params[f"{name}.bias"]) if f"{name}.bias" in params else None
        self.slots = Slots(deltas)

    @property
    def plain(self) -> bool:
        """Whether it is a matrix and nothing else."""
        few_bits = isinstance(self.weight, Quantized)
        return not few_bits and self.bias is None and self.slots.empty

    @property
    def scales_input(self) -> bool:
        """Whether a delta scales what it reads, for itself."""
        return f"{self.name}.in_scale" in self.slots

    def __call__(self, x: jax.Array, rows: Rows) -> jax.Array:
        """[T, in] -> [T, out], float32."""
        x = self.slots.scaled(f"{self.name}.in_scale", x, rows)
        if isinstance(self.weight, Quantized):
            y = self.weight(x, rows.platform)
        else:
            y = matmul(x, self.weight[...], rows.platform)
        return self._finished(y, x, rows)

    def _finished(self, y: jax.Array, x: jax.Array, rows: Rows) -> jax.Array:
        """The product of x and the weight, with all that comes on top."""
        name, slots = self.name, self.slots
        y = slots.add_bits(name, slots.add_lora(name, y, x, rows), x, rows)
        if self.partial and rows.mesh_axes:
            y = jax.lax.psum(y, rows.mesh_axes)
        y = slots.scaled(f"{name}.scale", y, rows)
        bias = slots.own(f"{name}.bias", None if self.bias is None else self.bias[...], rows)
        return y if bias is None else y + bias


def project(projections: Sequence[Linear], x: jax.Array, rows: Rows) -> list[jax.Array]:
    """What each of them makes of x [T, in]: one product of all their weights where there is code for it
    (`cpu_matmul`), so that threads are woken, and x is laid, once."""
    weights = [p.weight for p in projections]
    if rows.platform.avx512 and not any(p.scales_input for p in projections):
        arrays = [w[...] for w in weights if isinstance(w, nnx.Param)]
        if len(arrays) == len(weights) and cpu_matmul.serves(x.shape[0], arrays):
            products = cpu_matmul.matmul(x, arrays)
            return [p._finished(y, x, rows) for p, y in zip(projections, products, strict=True)]
    return [p(x, rows) for p in projections]
