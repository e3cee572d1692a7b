"""Runs the Hopper kernels in jax's Mosaic GPU interpreter, in a process of its own.

The interpreter gives every warpgroup a thread, each of which blocks one of XLA's: with the pool of a
small machine they wait for each other for ever. The pool's size is read when jax starts (NPROC), so the
cases run in a worker that was started with enough.

What of the kernels the interpreter (jax 0.10 and 0.12) cannot run is in `jblock/.../hopper.py` and is
replaced here: register layouts (there are none), matmuls with an operand in registers or a transposed
one, products summed in registers across matmuls, transposed stores, and what one warp of a warpgroup does
alone; `mosaic_gpu_copies` counts copies and adds those that add to what is there. Copies, barriers, loops
over pages, masks and warp specialization run as they stand.
"""

import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from tests.pallas_kernels import attention_cases
from tests.pallas_kernels.attention_cases import Case

THREADS = 8


def served(case: Case) -> Case:
    """The case itself, or the nearest one within what the kernel serves, which is: pages of bfloat16 or 8
    bits (sm_90 has no float32 matmul: that is the XLA backend's), of 8 tokens or more, with 8 bits 64; heads
    of 16 or more, with 8 bits 32. Rows for pages of fp8 come in float32: those of bfloat16 often lie just
    between two of its values, and an ulp of the scale, which XLA and numpy may round apart, decides."""
    wide = case.kv in ("float32", "bfloat16")
    return dataclasses.replace(
        case,
        kv="bfloat16" if wide else case.kv,
        q="float32" if case.kv == "float8_e4m3fn" else case.q,
        page_size=max(case.page_size, 8 if wide else 64),
        head_dim=max(case.head_dim, 16 if wide else 32),
    )


def served_grouped(cases: Iterable[Any]) -> list[Any]:
    """Cases of the grouped matmuls, or the nearest the kernels serve: bfloat16, widths in whole 64."""
    changed = (
        dataclasses.replace(c, dtype="bfloat16", width=_up(c.width), out=_up(c.out)) for c in cases
    )
    return list(dict.fromkeys(changed))


def served_quantized(cases: Iterable[Any]) -> list[Any]:
    """Likewise of the quantized one: rows of bfloat16, groups and columns in whole 64."""
    changed = []
    for c in cases:
        groups = c.width // (c.group or c.width)
        group = _up(c.width // groups)
        changed.append(
            dataclasses.replace(c, x="bfloat16", group=group, width=groups * group, out=_up(c.out))
        )
    return list(dict.fromkeys(changed))


def _up(n: int) -> int:
    return -(-n // 64) * 64


def start() -> ProcessPoolExecutor:
    """A pool of one worker whose jax has THREADS threads."""
    before = {name: os.environ.get(name) for name in ("NPROC", "JAX_PLATFORMS")}
    os.environ.update(NPROC=str(THREADS), JAX_PLATFORMS="cpu")
    try:
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(_prepare).result()
        return pool
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@dataclasses.dataclass
class Result:
    """What `run` found.

    Attributes:
      got: output of the kernel.
      wanted: of the reference.
      races: whether two warpgroups were seen to race; None if not looked for.
      read: bytes that the last call's TMA copies brought into shared memory.
      written: bytes that they took out of it.
      flops: of its matmuls.
    """

    got: np.ndarray
    wanted: np.ndarray
    races: bool | None
    read: int
    written: int
    flops: int


_COUNTS = {"read": 0, "written": 0, "flops": 0}
_COUNTING = threading.Lock()
"""In the worker: what the interpreted kernel has done so far."""


def run(
    case: Case,
    plan: dict[str, Any] | None = None,
    detect_races: bool = False,
    rounded: bool = False,
) -> Result:
    """In the worker: puts a case to the kernel, and counts what its call did.

    Cached tokens are written without the kernel; that the kernel writes new ones where they belong, and
    nothing else, is seen in the pages after its call.

    Args:
      case: what to compute; see `served`.
      plan: fields of gpu_kernel.Plan to set otherwise than make_plan does.
      detect_races: whether to look for races.
      rounded: as of attention_cases.run.
    """
    import jax
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    from jblock.pallas_kernels.paged_attention import mosaic_gpu

    attend = _attend(tuple(sorted((plan or {}).items())), detect_races)
    to_fill = any(cached for cached, _ in case.sequences)

    def counted(q, k, v, pages, ragged, **options):
        nonlocal to_fill
        wanted = _written(k, v, pages, ragged)
        if to_fill:
            to_fill = False
            return q, wanted
        _COUNTS.update(read=0, written=0, flops=0)
        # A grid, whose new rows may stay where they are, would be another program.
        ragged = dataclasses.replace(ragged, is_grid=False)
        out, pages = jax.block_until_ready(attend(q, k, v, pages, ragged, **options))
        _check_pages(pages, wanted)
        return out, pages

    got, wanted = attention_cases.run(case, mosaic_gpu.abstract_pages, counted, rounded=rounded)
    races = gpu_callbacks.get_races().races_found if detect_races else None
    return Result(got, wanted, races, **_COUNTS)


@functools.cache
def _attend(plan: tuple[tuple[str, Any], ...], detect_races: bool) -> Callable[..., Any]:
    """The op in the interpreter, with some fields of its plan set."""
    import jax
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    from jblock.pallas_kernels.paged_attention import mosaic_gpu

    params = InterpretGPUParams(
        detect_races=detect_races, uninitialized_memory="nan", out_of_bounds_reads="uninitialized"
    )

    @functools.partial(jax.jit, static_argnames=("sliding_window", "softcap", "scale"))
    def attend(q, k, v, pages, ragged, *, scale, **options):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        made = mosaic_gpu.plan_of(q, k, pages, ragged, scale=scale, **options)
        made = dataclasses.replace(made, **dict(plan))
        return mosaic_gpu.run(made, q, k, v, pages, ragged, interpret=params)

    return attend


def run_op(
    op: str,
    case: Any,
    plan: dict[str, Any] | None = None,
    detect_races: bool = False,
    **options: Any,
) -> dict[str, int]:
    """In the worker: holds the Mosaic GPU backend of another op to a case; returns what was counted.

    Args:
      op: one that `holds` knows.
      case: of that op's table, in bfloat16.
      plan: fields of the op's Plan to set otherwise than its make_plan does.
      detect_races: whether to fail where two warpgroups race.
      options: of what holds it.
    """
    import jax
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    from tests.pallas_kernels import grouped_cases, quantized_cases

    holds = {
        "grouped_block_matmul": grouped_cases.hold_block,
        "grouped_delta_matmul": grouped_cases.hold_delta,
        "quantized_matmul": quantized_cases.hold,
    }
    multiply = _multiply(op, tuple(sorted((plan or {}).items())), detect_races)

    def counted(*args):
        _COUNTS.update(read=0, written=0, flops=0)
        return jax.block_until_ready(multiply(*args))

    holds[op](case, counted, **options)
    assert not (detect_races and gpu_callbacks.get_races().races_found)
    return dict(_COUNTS)


@functools.cache
def _multiply(op: str, plan: tuple[tuple[str, Any], ...], detect_races: bool) -> Callable[..., Any]:
    """A matmul in the interpreter, with some fields of its plan set."""
    import importlib

    import jax
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    module = importlib.import_module(f"jblock.pallas_kernels.{op}.mosaic_gpu")
    params = InterpretGPUParams(
        detect_races=detect_races, uninitialized_memory="nan", out_of_bounds_reads="uninitialized"
    )

    @jax.jit
    def multiply(*args):
        if not plan:
            return getattr(module, op)(*args, interpret=params)
        made = module.make_plan
        module.make_plan = lambda **shape: dataclasses.replace(made(**shape), **dict(plan))
        try:
            return getattr(module, op)(*args, interpret=params)
        finally:
            module.make_plan = made

    return multiply


def _written(k: Any, v: Any, pages: Any, ragged: Any) -> tuple[np.ndarray, ...]:
    """Pages with the rows of a call's new tokens in their places, written one by one."""
    import jax

    from jblock.pallas_kernels.paged_attention.quantize import quantize

    filled, stored = [], (k, v)
    if len(pages) > 2:
        split = jax.jit(quantize, static_argnums=1)
        (k, k_scale), (v, v_scale) = (split(a, pages[0].dtype) for a in stored)
        stored = (k, v, k_scale, v_scale)
    table = np.asarray(ragged.page_table)
    starts = np.asarray(ragged.row_starts), np.asarray(ragged.kv_lens - ragged.q_lens)
    for rows, old in zip(stored, pages, strict=True):
        new = np.array(old)
        rows = np.asarray(rows).astype(new.dtype)
        for s, n in enumerate(ragged.q_lens.tolist()):
            for i in range(n):
                page, slot = divmod(starts[1][s] + i, new.shape[2])
                new[table[s, page], :, slot] = rows[starts[0][s] + i]
        filled.append(new)
    return tuple(filled)


def _check_pages(got: Any, wanted: tuple[np.ndarray, ...]) -> None:
    """Fails unless a call left these pages. Values of 8 bits may be one step off in one of a hundred: a scale
    rounded apart by an ulp decides between two."""
    for a, b in zip(map(np.asarray, got), wanted, strict=True):
        if a.itemsize > 1:
            tolerance = 1e-6 if a.dtype == np.float32 else 0
            np.testing.assert_allclose(
                a.astype(np.float32), b.astype(np.float32), rtol=tolerance, err_msg="pages"
            )
            continue
        steps = np.abs(a.view(np.int8).astype(int) - b.view(np.int8).astype(int))
        assert steps.max() <= 1 and (steps > 0).mean() <= 0.01, "pages"


def _prepare() -> None:
    """Puts plain array operations in the place of what the interpreter lacks, and counts what it does."""
    import jax
    from jax._src import callback
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    from tests.pallas_kernels.mosaic_gpu_copies import count_copies

    # Its callbacks take a dozen numbers apart one by one. With jax arrays, as they come, each of these is a
    # program that is run: most of the time of a block.
    callback.io_callback_impl = lambda *args, callback, **_: [
        np.asarray(r) for r in callback(*map(np.asarray, args))
    ]
    # jax 0.12 takes numbers of jax arrays alone. (0.10 has no such function, and asks for none.)
    shared_memory._to_int = lambda n: n if isinstance(n, jax.core.Tracer) else int(n)
    count_copies(_count)
    _replace_operations()
    _compile_once()


def _count(what: str, amount: int) -> None:
    with _COUNTING:
        _COUNTS[what] += amount


def _replace_operations() -> None:
    """Those of `hopper.py`, by plain ones on arrays."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jblock.pallas_kernels import hopper

    def matmul(a, b, *, transpose_b=False, then=None):
        if then is not None:
            then()
        # The tensor cores may read as late as when the product is awaited.
        a = a[...]
        b = b[...].T if transpose_b else b[...]
        plgpu.commit_smem()
        flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        jax.debug.callback(lambda: _count("flops", flops))
        return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")

    def sum_of_products(shape, steps, arrived, operands, read):
        # Waiting until one product is outstanding frees the operands of the one before it. Those of the
        # outstanding one may be read as late as here, after the next one's have come.
        def step(i, total):
            arrived(i)
            return jax.lax.cond(i > 0, lambda t: finish(i - 1, t), lambda t: t, total)

        def finish(i, total):
            a, b = operands(i)
            total += matmul(a, b, transpose_b=True)
            read(i)
            return total

        total = jax.lax.fori_loop(0, steps, step, jnp.zeros(shape, jnp.float32))
        return jax.lax.cond(steps > 0, lambda t: finish(steps - 1, t), lambda t: t, total)

    hopper.matmul = matmul
    hopper.add_product = lambda total, a, b, then=None: total + matmul(a, b, then=then)
    hopper.sum_of_products = sum_of_products
    hopper.by_one_warp = lambda act: act()
    hopper.accumulator = lambda shape, value: jnp.full(shape, value, jnp.float32)
    hopper.per_row = lambda rows, value: jnp.full((rows,), value, jnp.float32)
    hopper.iota = lambda shape, dimension: jax.lax.broadcasted_iota(jnp.int32, shape, dimension)
    hopper.row_indices = lambda rows: jnp.arange(rows, dtype=jnp.int32)
    hopper.column_indices = hopper.row_indices
    hopper.load = hopper.load_rows = hopper.load_columns = lambda ref: ref[...]
    hopper.load_8_bits = hopper.load_widened = lambda ref: ref[...].astype(jnp.bfloat16)

    def store_transposed(ref, value):
        ref[...] = value.T

    hopper.store_transposed = store_transposed


def _compile_once() -> None:
    """Keeps the compiled bodies of kernels."""
    import jax
    from jax._src.pallas.mosaic.interpret import thread_map

    # The interpreter compiles the kernel's body anew for every block and warpgroup; once does.
    compiled: dict[int, Any] = {}
    compiling = threading.Lock()

    def run_jaxpr(jaxpr, consts, *args):
        with compiling:
            if id(jaxpr) not in compiled:
                evaluate = jax.jit(lambda c, *a: jax.core.eval_jaxpr(jaxpr, c, *a) and None)
                options = {"xla_backend_optimization_level": 0}
                program = evaluate.lower(consts, *args).compile(compiler_options=options)
                compiled[id(jaxpr)] = jaxpr, program
        compiled[id(jaxpr)][1](consts, *args)

    thread_map._run_jaxpr = run_jaxpr
