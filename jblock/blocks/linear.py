"""Projections, with an optional low-rank delta per sequence."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jblock.blocks.rows import Rows

_BF16_ROWS = 8


def matmul(x: jax.Array, weight: jax.Array, *, transposed: bool = False) -> jax.Array:
    """`x [T, in] @ weight [in, out]` in the weight's dtype, accumulated and returned in float32.

    The accumulation type is stated because XLA's CPU backend takes its AVX-512 bf16 path only then,
    and fewer than 8 bf16 rows are padded to 8, because below it falls back to a far slower loop.

    Args:
      x: [T, in].
      weight: [in, out], or [out, in] when transposed.
      transposed: how the weight lies.
    """
    count = x.shape[0]
    if weight.dtype == jnp.bfloat16 and count < _BF16_ROWS:
        x = jnp.pad(x, ((0, _BF16_ROWS - count), (0, 0)))
    y = jax.lax.dot_general(
        x.astype(weight.dtype),
        weight,
        (((1,), (1 if transposed else 0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return y[:count]


class Linear(nnx.Module):
    """`y = x @ weight + bias`, and `+ (x @ a[slot]) @ b[slot]` where the projection has LoRA slots.

    Attributes:
      weight: [in, out].
      bias: [out] or None.
      lora_a: [slots, in, rank] or None; slot 0 is all zeros. The scale is folded into lora_b.
      lora_b: [slots, rank, out] or None.
    """

    def __init__(self, params: Mapping[str, jax.Array], deltas: Mapping[str, jax.Array], name: str):
        """Takes `name`.weight, `name`.bias, `name`.a and `name`.b from the given tensors."""
        self.weight = nnx.Param(params[f"{name}.weight"])
        self.bias = nnx.Param(params[f"{name}.bias"]) if f"{name}.bias" in params else None
        self.lora_a = nnx.Param(deltas[f"{name}.a"]) if f"{name}.a" in deltas else None
        self.lora_b = nnx.Param(deltas[f"{name}.b"]) if f"{name}.b" in deltas else None

    def __call__(self, x: jax.Array, rows: Rows) -> jax.Array:
        """[T, in] -> [T, out], float32."""
        y = matmul(x, self.weight[...])
        if self.bias is not None:
            y = y + self.bias[...]
        if self.lora_a is not None and self.lora_b is not None:
            xs = rows.by_sequence(x)
            inner = jnp.einsum("sqi,sir->sqr", xs, self.lora_a[...][rows.slots])
            y = y + rows.flat(jnp.einsum("sqr,sro->sqo", inner, self.lora_b[...][rows.slots]))
        return y
