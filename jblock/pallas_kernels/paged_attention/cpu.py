"""Paged attention by `jblock/cpu_kernels`: the backend for CPU where llvmlite is installed.

Pages lie as in the XLA backend, which serves what this one has no code for (8-bit floats). What is
computed how is in `jblock/cpu_kernels/paged_attention`.
"""

import jax
import jax.numpy as jnp

from jblock.cpu_kernels import targets
from jblock.cpu_kernels.paged_attention.form import BYTES, Form, rows_at_once
from jblock.pallas_kernels.paged_attention import xla
from jblock.pallas_kernels.paged_attention.ragged import Ragged

abstract_pages = xla.abstract_pages
JOINS_ROWS = True


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: tuple[jax.Array, ...],
    ragged: Ragged,
    *,
    sliding_window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """See `api.paged_attention`."""
    k_pages = kv_pages[0]
    _, kv_heads, d, page_size = k_pages.shape
    kv = xla.value_dtype(k_pages).name
    if kv not in BYTES or d % 4 or page_size % 4:
        return xla.paged_attention(
            q,
            k,
            v,
            kv_pages,
            ragged,
            sliding_window=sliding_window,
            softcap=softcap,
            scale=scale,
        )
    form = Form(
        kv=kv,
        d=d,
        groups=q.shape[1] // kv_heads,
        page=page_size,
        grid=ragged.is_grid,
        rows=rows_at_once(q.shape[1] // kv_heads, ragged.max_q_len),
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        scale=scale,
    )

    arrays = [a.astype(jnp.float32) for a in (q, k, v)]
    arrays += [ragged.row_starts, ragged.q_lens, ragged.kv_lens, ragged.page_table]
    results = [jax.ShapeDtypeStruct(q.shape, jnp.float32)]
    results += [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in kv_pages]
    call = jax.ffi.ffi_call(
        targets.target("attend", *form.fields),
        results,
        input_output_aliases={len(arrays) + i: 1 + i for i in range(len(kv_pages))},
    )
    out, *updated = call(*arrays, *kv_pages)
    return out.astype(q.dtype), tuple(updated)
