"""How KV is stored: as it is, or as 8 bits a value with one float32 scale a token and head.

Scales per token and head need no calibration, and a page can be filled token by token without ever
touching what is there (a scale per page would have to be raised, and the page rewritten).
"""

import jax
import jax.numpy as jnp

KV_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int8")
_LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}


def is_scaled(dtype: jax.typing.DTypeLike) -> bool:
    """Whether KV of this dtype has scales. Raises ValueError for a dtype that KV cannot have."""
    name = jnp.dtype(dtype).name
    if name not in KV_DTYPES:
        raise ValueError(f"KV dtype {name!r} is not known; give one of {', '.join(KV_DTYPES)}")
    return name in _LARGEST


def quantize(x: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Rows in 8 bits: the largest value of each maps to the largest of the dtype.

    Args:
      x: [..., d].
      dtype: int8 or float8_e4m3fn.

    Returns:
      [..., d] of that dtype, and float32 [...] such that values * scale is x within rounding. A row of
      zeros has scale 0.
    """
    x = x.astype(jnp.float32)
    largest = _LARGEST[jnp.dtype(dtype).name]
    scale = jnp.max(jnp.abs(x), axis=-1) / largest
    values = x / jnp.where(scale > 0, scale, 1.0)[..., None]
    # A quotient may pass the largest by an ulp, which an fp8 cast would turn into NaN.
    values = jnp.clip(values, -largest, largest)
    if jnp.dtype(dtype) == jnp.int8:
        values = jnp.round(values)
    return values.astype(dtype), scale
