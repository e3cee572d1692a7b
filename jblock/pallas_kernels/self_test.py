"""A small case of every kernel on the device at hand, against the reference, before anything is served.

Interpreters and compilers cannot show that a device computes what a kernel says: how registers are laid
out, in which order two nibbles of a byte are read, which number a stage of XLA's FFI has. So an engine
runs these cases at its start. A kernel that fails one is replaced by XLA's form of its op
(`backends.replace_by_xla`),
which is logged and counted (`EngineStats.kernels_replaced`).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import logging

from jblock.cpu_kernels.matmul import api as cpu_matmul
from jblock.pallas_kernels import backends
from jblock.pallas_kernels.grouped_block_matmul import api as grouped_block
from jblock.pallas_kernels.grouped_block_matmul import reference as grouped_block_reference
from jblock.pallas_kernels.grouped_delta_matmul import api as grouped_delta
from jblock.pallas_kernels.grouped_delta_matmul import reference as grouped_delta_reference
from jblock.pallas_kernels.paged_attention import api as attention
from jblock.pallas_kernels.paged_attention.ragged import Ragged
from jblock.pallas_kernels.paged_attention.reference import attention as attention_reference
from jblock.pallas_kernels.quantized_matmul import api as quantized
from jblock.pallas_kernels.quantized_matmul import reference as quantized_reference

# Largest difference from the reference, over the largest value: some ten times the rounding of the dtype.
_LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
      name: of the case, for the log.
      limit: largest difference that passes, over the largest value of `wanted`.
      call: gives (got, wanted), arrays of one shape.
    """

    name: str
    limit: float
    call: Callable[[], tuple[jax.typing.ArrayLike, np.ndarray]]


def run(kv_dtype: str) -> dict[str, str]:
    """Runs the cases of every op that has a kernel for the platform jax computes on.

    Args:
      kv_dtype: of the KV pages that will be served, one of quantize.KV_DTYPES.

    Returns:
      What failed, by the name of its op, and how. Those ops are XLA's from here on.
    """
    backend = backends.backend_of()
    failed: dict[str, str] = {}
    for op, cases in _CASES.items():
        if not _has_kernel(op, backend):
            continue
        if message := _first_failure(cases(backend, kv_dtype)):
            failed[op] = message
            backends.replace_by_xla(op, backend)
            if op == _CPU_MATMUL:
                cpu_matmul.disable()
            logging.error(
                "the %s kernel of %s is wrong on %s (%s): XLA's form serves instead",
                *(backend, op, jax.local_devices()[0].device_kind, message),
            )
    return failed


def _has_kernel(op: str, backend: str) -> bool:
    if op == _CPU_MATMUL:
        return backend == "cpu"
    return not backends.module(op, backend).__name__.endswith(".xla")


def _first_failure(cases: Iterator[Case]) -> str:
    """What is wrong with the first case that fails, "" if none does."""
    for case in cases:
        try:
            got, wanted = (np.asarray(a, np.float32) for a in case.call())
        except Exception as e:  # a compiler's or the device's own, of any kind
            return f"{case.name}: {type(e).__name__}: {e}"
        error = float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))
        if not error <= case.limit:  # NaN is none of either
            return f"{case.name}: off by {error:.2g} of the largest value, {case.limit:.0e} allowed"
    return ""


def _draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(np.dtype(getattr(ml_dtypes, dtype, dtype))).astype(np.float32)


def _dtype(backend: str) -> str:
    """Of what is multiplied: CPUs compute in float32, accelerators in bfloat16."""
    return "float32" if backend == "cpu" else "bfloat16"


def _attention(backend: str, kv_dtype: str) -> Iterator[Case]:
    # Pages of float32 and 8 bits hold exactly what is expected of them; rows may be rounded.
    limit = _LIMITS["bfloat16" if kv_dtype == "bfloat16" else _dtype(backend)]
    call = functools.partial(_attend, backend, kv_dtype)
    yield Case(f"prefill and decoding over {kv_dtype} pages", limit, call)


def _attend(backend: str, kv: str) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of 75 and 40 tokens, then one more token of each: both outputs together."""
    heads, kv_heads, lens = 4, 2, (75, 40)
    d, page = (
        (16, 48) if backend == "cpu" else (128, 64)
    )  # CPU code of small heads compiles sooner.
    dtype = _dtype(backend)
    # (sequence, token, head, d): the last token of each is the one decoded.
    q = _rounded(_draw(0, 2, max(lens) + 1, heads, d), dtype)
    k, v = (_rounded(_draw(i, 2, max(lens) + 1, kv_heads, d), dtype) for i in (1, 2))
    ints = lambda *values: jnp.asarray(np.asarray(values, np.int32))
    table = ints((3, 1), (4, 2))
    pages = tuple(
        np.zeros(a.shape, a.dtype)
        for a in attention.abstract_pages(5, page, kv_heads, d, dtype=kv, backend=backend)
    )

    @jax.jit
    def attend(rows, pages, ragged):  # type: ignore[no-untyped-def]
        q, k, v = (a.astype(dtype) for a in rows)
        return attention.paged_attention(q, k, v, pages, ragged, backend=backend)

    def packed(a: np.ndarray) -> np.ndarray:
        return np.concatenate([a[s, :n] for s, n in enumerate(lens)])

    prefill = Ragged(
        row_starts=ints(0, lens[0]),
        q_lens=ints(*lens),
        kv_lens=ints(*lens),
        page_table=table,
        max_q_len=max(lens),
    )
    first, pages = attend([packed(a) for a in (q, k, v)], pages, prefill)
    decode = Ragged(
        row_starts=ints(0, 1),
        q_lens=ints(1, 1),
        kv_lens=ints(*(n + 1 for n in lens)),
        page_table=table,
        max_q_len=1,
        is_grid=True,
    )
    last = [np.stack([a[s, n] for s, n in enumerate(lens)]) for a in (q, k, v)]
    second, _ = attend(last, pages, decode)

    k, v = (_stored(a, kv) for a in (k, v))
    wanted = [
        attention_reference(q[s, : n + 1], k[s, : n + 1], v[s, : n + 1], 0)
        for s, n in enumerate(lens)
    ]
    return (
        np.concatenate([np.asarray(first, np.float32), np.asarray(second, np.float32)]),
        np.concatenate([*(w[:-1] for w in wanted), *(w[-1:] for w in wanted)]),
    )


def _stored(x: np.ndarray, kv: str) -> np.ndarray:
    """Keys or values as pages of a dtype give them back; see `quantize.quantize`."""
    if kv in ("float32", "bfloat16"):
        return _rounded(x, kv)
    scales = np.abs(x).max(-1, keepdims=True) / np.float32(127 if kv == "int8" else 448)
    return (np.round(x / scales) if kv == "int8" else _rounded(x / scales, kv)) * scales


def _deltas(backend: str, _: str) -> Iterator[Case]:
    dtype = _dtype(backend)
    y, x = _draw(3, 24, 256), _rounded(_draw(4, 24, 128), dtype)
    a, b = _rounded(_draw(5, 5, 8, 128), dtype), _rounded(_draw(6, 5, 8, 256), dtype)
    pieces, sizes = np.asarray([[2, 4], [0, 0], [1, 0]], np.int32), np.asarray([9, 3, 11], np.int32)

    def call() -> tuple[jax.Array, np.ndarray]:
        got = jax.jit(lambda *args: grouped_delta.grouped_delta_matmul(*args, backend=backend))(
            jnp.asarray(y), *(jnp.asarray(z, dtype) for z in (x, a, b)), pieces, sizes
        )
        return got, grouped_delta_reference.grouped_delta_matmul(
            y, x, a, b, pieces.tolist(), sizes.tolist()
        )

    yield Case("adapters of 16 and 8 ranks beside rows without one", _LIMITS[dtype], call)


def _blocks(backend: str, _: str) -> Iterator[Case]:
    dtype, sizes = _dtype(backend), np.asarray([13, 0, 20], np.int32)
    x = _rounded(_draw(7, 33, 128), dtype)
    weights = [_rounded(_draw(8 + i, 256, 128), dtype) for i in range(3)]

    def call() -> tuple[jax.Array, np.ndarray]:
        got = jax.jit(lambda *args: grouped_block.grouped_block_matmul(*args, backend=backend))(
            jnp.asarray(x, dtype), tuple(jnp.asarray(w, dtype) for w in weights), sizes
        )
        return got, grouped_block_reference.grouped_block_matmul(x, weights, sizes.tolist())

    yield Case("three variants of a weight", _LIMITS[dtype], call)


def _few_bits(backend: str, _: str) -> Iterator[Case]:
    dtype = _dtype(backend)
    x, scales = _rounded(_draw(11, 20, 256), dtype), np.abs(_draw(12, 128, 2)) + 0.1

    def call(bits: int) -> tuple[jax.Array, np.ndarray]:
        most = 1 << (bits - 1)
        codes = np.random.default_rng(13).integers(-most, most, (128, 256))
        got = jax.jit(lambda *args: quantized.quantized_matmul(*args, backend=backend))(
            *(jnp.asarray(x, dtype), jnp.asarray(codes, f"int{bits}"), jnp.asarray(scales))
        )
        return got, quantized_reference.quantized_matmul(x, codes, scales)

    for bits in (8, 4):
        yield Case(f"weights of {bits} bits", _LIMITS[dtype], functools.partial(call, bits))


def _cpu_products(backend: str, _: str) -> Iterator[Case]:
    for dtype in ("bfloat16", "float32"):
        x, wide = _rounded(_draw(14, 5, 128), dtype), _rounded(_draw(15, 64, 128), dtype)
        weight = jnp.asarray(wide, dtype)

        def call(
            x: np.ndarray, wide: np.ndarray, weight: jax.Array
        ) -> tuple[jax.Array, np.ndarray]:
            product = jax.jit(lambda x, w: cpu_matmul.matmul(x, [w])[0])
            return product(jnp.asarray(x), weight), x @ wide.T

        if cpu_matmul.serves(5, [weight]):
            name = f"products by {dtype} weights"
            yield Case(name, _LIMITS[dtype], functools.partial(call, x, wide, weight))


_CPU_MATMUL = "matmul"
"""Not an op of this package: `jblock/cpu_kernels/matmul`."""

_CASES: dict[str, Callable[[str, str], Iterator[Case]]] = {
    "paged_attention": _attention,
    "grouped_delta_matmul": _deltas,
    "grouped_block_matmul": _blocks,
    "quantized_matmul": _few_bits,
    _CPU_MATMUL: _cpu_products,
}
