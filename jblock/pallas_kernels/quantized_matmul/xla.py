"""Quantized matmul in plain XLA: the backend that runs everywhere, arranged for CPU.

Weights are widened a block of output columns at a time, small enough to stay in a core's cache: only
their 8 or 4 bits come from memory. Measured on two cores with AVX-512, three 4096 x 4096 matrices in
milliseconds at 1 / 8 / 32 / 256 rows: int8 in blocks 17 / 19 / 28 / 146, products in bfloat16
23 / 17 / 24 / 57, all widened at once 90 / 57 / 69 / 159, float32 weights 14 / 16 / 39 / 107.

4 bits are as fast as 8 when they come two to a byte (uint8): both halves of a block of bytes are widened by
whole vectors, and multiplied by the even inputs and the odd ones. An array that XLA knows as int4 it takes
apart one number at a time, in up to five times the time; docs/kernels.md has figures.
"""

import jax
import jax.numpy as jnp

_BLOCK_VALUES = 2**19  # 2 MB of float32


def quantized_matmul(
    x: jax.Array,
    w_q: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    device_kind: str | None = None,
) -> jax.Array:
    """See `api.quantized_matmul`; nothing here depends on the device's kind."""
    out, width = w_q.shape[0], x.shape[1]
    size = min(out, max(16, _BLOCK_VALUES // width // 16 * 16))

    def block(first: jax.Array | int, count: int) -> jax.Array:
        def cut(a: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(a, first, count)

        return at_once(x, cut(w_q), cut(scales), None if zeros is None else cut(zeros))

    def add(i: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(y, block(i * size, size), i * size, axis=1)

    whole = out // size
    y = jax.lax.fori_loop(0, whole, add, jnp.zeros((x.shape[0], out), jnp.float32))
    if out % size:
        y = y.at[:, whole * size :].set(block(whole * size, out % size))
    return y


def at_once(x: jax.Array, w_q: jax.Array, scales: jax.Array, zeros: jax.Array | None) -> jax.Array:
    """The same with all weights widened first, which many rows make up for."""
    if w_q.dtype != jnp.uint8:
        return _product(x, w_q, scales, zeros)
    low, high = ((w_q & 15).astype(jnp.int8) ^ 8) - 8, w_q.astype(jnp.int8) >> 4
    if x.shape[1] // scales.shape[1] % 2:  # neighbors in a byte may be of two groups
        codes = jnp.stack([low, high], axis=-1).reshape(w_q.shape[0], x.shape[1])
        return _product(x, codes, scales, zeros)
    even, odd = x[:, ::2], x[:, 1::2]
    return _product(even, low, scales, zeros) + _product(odd, high, scales, zeros)


def _product(x: jax.Array, w_q: jax.Array, scales: jax.Array, zeros: jax.Array | None) -> jax.Array:
    """[T, in] by [out, in] codes -> float32 [T, out]."""
    groups = w_q.astype(jnp.float32).reshape(*scales.shape, -1)
    if zeros is not None:
        groups -= zeros[..., None]
    w = (groups * scales[..., None]).reshape(w_q.shape)
    return jax.lax.dot_general(
        x,
        w.astype(x.dtype),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
