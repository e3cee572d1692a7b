"""Projections, with an optional low-rank delta per sequence."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jblock.blocks.platform import Platform
from jblock.blocks.quant_spec import CODES, ORDER, SCALES, ZEROS
from jblock.blocks.rows import Rows
from jblock.pallas_kernels.backends import backend_of
from jblock.pallas_kernels.quantised_matmul.api import quantised_matmul

PIECE_RANK = 8
_BF16_ROWS = 8


def matmul(
    x: jax.Array, weight: jax.Array, platform: Platform, *, transposed: bool | None = None
) -> jax.Array:
    """`x [T, in] @ weight` in the weight's dtype, accumulated and returned in float32.

    The accumulation type is stated because XLA's CPU backend takes its bf16 path only then, and there
    fewer than 8 bf16 rows are padded to 8, because below it falls back to a far slower loop.

    Args:
      x: [T, in].
      weight: [in, out], or [out, in] when transposed.
      platform: what it is compiled for.
      transposed: how the weight lies; None: as projections do there (`Platform.out_in`).
    """
    transposed = platform.out_in if transposed is None else transposed
    if platform.amx and transposed and weight.dtype == jnp.float32:
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


class Quantised(nnx.Module):
    """A weight of few bits; see QuantSpec.

    Attributes:
      codes: int8 or int4 [out, in].
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
        zeros = None if self.zeros is None else self.zeros[...]
        return quantised_matmul(
            x,
            self.codes[...],
            self.scales[...],
            zeros,
            backend=backend_of(platform.name),
            device_kind=platform.kind,
        )


class Linear(nnx.Module):
    """`y = x @ weight + bias`, and `+ b @ (a @ x)` of the row's own adapter where there are LoRA tables.

    Adapters lie in pieces of PIECE_RANK ranks, so that adapters of different ranks share a table and a
    batch reads what its own adapters hold: the k-th piece of every sequence is added in turn k, for as
    many turns as the longest adapter present has pieces.

    Attributes:
      weight: [out, in] or [in, out], as `Platform.out_in` of what it is compiled for says;
        or a Quantised one.
      bias: [out] or None.
      lora_a: [pieces, PIECE_RANK, in] or None; piece 0 is all zeros.
      lora_b: [pieces, PIECE_RANK, out] or None; the scale is folded in.
      pieces: int32 [slots, turns], the pieces of each adapter slot, 0 where it has no more.
    """

    def __init__(
        self,
        params: Mapping[str, jax.Array],
        deltas: Mapping[str, jax.Array],
        name: str,
        *,
        partial: bool = False,
    ):
        """Takes `name`.weight, or what stands for it, and .bias from params, `name`.a, .b and "pieces"
        from deltas.

        Args:
          params: tensors of the component.
          deltas: its slot tables.
          name: of the projection.
          partial: its input is what a split block computes, so that each device of the mesh has a
            part of the sum.
        """
        self.partial = partial
        quantised = f"{name}.{CODES}" in params
        self.weight = Quantised(params, name) if quantised else nnx.Param(params[f"{name}.weight"])
        self.bias = nnx.Param(params[f"{name}.bias"]) if f"{name}.bias" in params else None
        adapted = f"{name}.a" in deltas
        self.lora_a = nnx.Param(deltas[f"{name}.a"]) if adapted else None
        self.lora_b = nnx.Param(deltas[f"{name}.b"]) if adapted else None
        self.pieces = nnx.Param(deltas["pieces"]) if adapted else None

    def __call__(self, x: jax.Array, rows: Rows) -> jax.Array:
        """[T, in] -> [T, out], float32."""
        if isinstance(self.weight, Quantised):
            y = self.weight(x, rows.platform)
        else:
            y = matmul(x, self.weight[...], rows.platform)
        y = self._add_lora(y, x, rows)
        if self.partial and rows.mesh_axes:
            y = jax.lax.psum(y, rows.mesh_axes)
        return y if self.bias is None else y + self.bias[...]

    def _add_lora(self, y: jax.Array, x: jax.Array, rows: Rows) -> jax.Array:
        if self.lora_a is None or self.lora_b is None or self.pieces is None:
            return y
        a, b, pieces = self.lora_a[...], self.lora_b[...], self.pieces[...][rows.slots]
        xs = rows.by_sequence(x)

        def add(turn: jax.Array, ys: jax.Array) -> jax.Array:
            piece = jax.lax.dynamic_index_in_dim(pieces, turn, axis=1, keepdims=False)
            inner = jnp.einsum("sqi,sri->sqr", xs, a[piece])
            if rows.q_len == 1:
                # One row a sequence: a fused sum beats a batch of tiny matmuls.
                return ys + jnp.sum(inner[:, 0, :, None] * b[piece], axis=1)[:, None, :]
            return ys + jnp.einsum("sqr,sro->sqo", inner, b[piece])

        turns = jnp.max(jnp.sum(pieces > 0, axis=1))
        return rows.flat(jax.lax.fori_loop(0, turns, add, rows.by_sequence(y)))
