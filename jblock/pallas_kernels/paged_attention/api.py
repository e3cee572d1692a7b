"""Ragged paged attention: one call writes a batch's new KV and attends over everything cached.

A backend is a module with `abstract_pages` and `paged_attention` of the signatures below, less `backend`.
Each backend owns the physical layout of its pages; nothing outside it may assume one, except that
every array has the page id first and that a page of zeros is an empty one.
"""

from types import ModuleType

import jax
import jax.numpy as jnp

from jblock.pallas_kernels import backends
from jblock.pallas_kernels.backends import BACKENDS, backend_of
from jblock.pallas_kernels.paged_attention.quantize import is_scaled
from jblock.pallas_kernels.paged_attention.ragged import Ragged

__all__ = [
    "BACKENDS",
    "KvPages",
    "abstract_pages",
    "backend_of",
    "joins_rows",
    "module",
    "paged_attention",
]

KvPages = tuple[jax.Array, ...]
"""The page arrays of one layer, as abstract_pages shapes them."""


def module(backend: str | None = None) -> ModuleType:
    """See `backends.module`."""
    return backends.module("paged_attention", backend)


def abstract_pages(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: jax.typing.DTypeLike = "float32",
    backend: str | None = None,
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arrays that hold one layer's pages: shapes and dtypes, page id first.

    Page 0 is the null page: always zeros, never written, named by the unused entries of a page table.

    Args:
      num_pages: pages, the null page included.
      page_size: tokens of a page.
      num_kv_heads: key/value heads.
      head_dim: width of a head.
      dtype: one of quantize.KV_DTYPES.
      backend: one of BACKENDS; None: the one for the platform jax computes on.

    Raises:
      ValueError: a dtype KV cannot have.
    """
    is_scaled(dtype)
    return module(backend).abstract_pages(
        num_pages, page_size, num_kv_heads, head_dim, jnp.dtype(dtype)
    )


def joins_rows(backend: str | None = None) -> bool:
    """Whether rows of a grid of one row a sequence may be neighboring tokens of one sequence."""
    return getattr(module(backend), "JOINS_ROWS", False)


@jax.named_scope("paged_attention")
def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: KvPages,
    ragged: Ragged,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    backend: str | None = None,
    device_kind: str | None = None,
) -> tuple[jax.Array, KvPages]:
    """Causal grouped-query attention of a batch over its pages.

    A query at position p sees positions 0 .. p of its own sequence (p - sliding_window + 1 .. p with a
    window). Pages a sequence does not own cannot reach its output, whatever they hold. Its own pages
    must be finite past its last token too, which the engine ensures by zeroing a page when it
    changes hands.

    Args:
      q: [T, heads, d] queries, rope applied, not scaled.
      k: [T, kv_heads, d] new keys, rope applied.
      v: [T, kv_heads, d] new values.
      kv_pages: the arrays of this layer, as abstract_pages says (donated by the caller). Keys and values
        are rounded to their dtype before anything is computed, those of this call too.
      ragged: which rows are whose, and the page table.
      sliding_window: tokens visible to a query, itself included; None sees all.
      softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv 2408.00118); None: none.
      scale: factor of the scores, before the soft cap; None: 1 / sqrt(d).
      backend: one of BACKENDS; None: the one for the platform jax computes on.
      device_kind: whose tuned block sizes a backend takes that has some; None: those of the first device.

    Returns:
      [T, heads, d] in q's dtype, whose padding rows are unspecified, and the updated arrays.

    Raises:
      ValueError: shapes that do not fit together, a window under 1, a softcap or a number of
        sequences that is no use.
    """
    _check(q, k, v, ragged, sliding_window, softcap)
    attend = module(backend)
    tuned = {"device_kind": device_kind} if hasattr(attend, "TUNING") else {}
    return attend.paged_attention(
        q,
        k,
        v,
        kv_pages,
        ragged,
        sliding_window=sliding_window,
        softcap=softcap,
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
        **tuned,
    )


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ragged: Ragged,
    sliding_window: int | None,
    softcap: float | None,
) -> None:
    rows, heads, d = q.shape
    if k.shape != v.shape or k.shape[0] != rows or k.shape[2] != d or heads % k.shape[1]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: want [T, heads, d] and twice "
            "[T, kv_heads, d], kv_heads a divisor of heads"
        )
    if ragged.is_grid and rows != ragged.num_seqs * ragged.max_q_len:
        raise ValueError(
            f"a grid of {ragged.num_seqs} x {ragged.max_q_len} has no {rows} rows; use Ragged.packed"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}; give 1 or more, or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; give a number over 0, or None")
