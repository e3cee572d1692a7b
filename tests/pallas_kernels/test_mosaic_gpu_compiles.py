"""The Hopper kernels under the real compiler for an H200, which needs no GPU: jax's CUDA plugin and ptxas do.

Where the compilers are installed `make test` compiles a few programs; `make compilers` all of attention's
`shapes.programs`, and of the matmuls' one of each form: 27 differ in more than how often their loops run.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jblock.pallas_kernels.grouped_block_matmul import mosaic_gpu as block_gpu
from jblock.pallas_kernels.grouped_block_matmul import shapes as block_shapes
from jblock.pallas_kernels.grouped_delta_matmul import mosaic_gpu as delta_gpu
from jblock.pallas_kernels.grouped_delta_matmul import shapes as delta_shapes
from jblock.pallas_kernels.paged_attention import mosaic_gpu, shapes
from jblock.pallas_kernels.quantized_matmul import mosaic_gpu as quantized_gpu
from jblock.pallas_kernels.quantized_matmul import shapes as quantized_shapes
from jblock.parallel.targets import Target

QUICK = {
    ("llama-3-8b", "decode", "bfloat16"),
    ("demo", "mixed", "bfloat16"),
    ("llama-3-8b", "decode", "int8"),
}
PROGRAMS = [
    pytest.param(
        model,
        batch,
        dtype,
        id=f"{model.name}-{batch.name}-{dtype}",
        marks=() if (model.name, batch.name, dtype) in QUICK else pytest.mark.long,
    )
    for model in shapes.DISTINCT
    for batch in shapes.BATCHES
    for dtype in shapes.DTYPES
]


@pytest.fixture(scope="module")
def h200():
    try:
        return jax.sharding.SingleDeviceSharding(Target.parse("cuda:h200").devices()[0])
    except ValueError as e:
        pytest.skip(f"NOT RUN: {e}")


def compiled(h200, fn, args, donated=(), capfd=None):
    """The program for an H200, and bytes of registers that ptxas spilled, of all its kernels together."""
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=h200), args)
    program = jax.jit(fn, donate_argnums=donated).lower(*args).compile()
    said = "".join(capfd.readouterr())
    assert "sm_90a" in said
    spilled = sum(int(n) for n in re.findall(r"stack frame, (\d+) bytes spill stores", said))
    # Of what is spilled ptxas warns.
    assert spilled or "ptxas warning" not in said
    return program, spilled


@pytest.mark.parametrize("model, batch, dtype", PROGRAMS)
def test_attention_compiles_for_h200(h200, model, batch, dtype, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    fn, args = shapes.program("mosaic_gpu", model, batch, dtype)
    program, spilled = compiled(h200, fn, args, 3, capfd)
    assert spilled == 0
    pages = sum(a.size * a.dtype.itemsize for a in args[3])
    assert program.memory_analysis().alias_size_in_bytes == pages, "pages are updated in place"


@pytest.mark.parametrize("dtype, copies", [("bfloat16", 1), ("int8", 2)])
def test_a_step_takes_few_barrier_operations(dtype, copies):
    """Two arrivals of a warp for each copy: of the keys, the values, and with 8 bits the scales of each."""
    (model,) = (m for m in shapes.MODELS if m.name == "llama-3-8b")
    for batch in shapes.BATCHES:
        fn, (q, k, _, pages, ragged) = shapes.program("mosaic_gpu", model, batch, dtype)
        plan = mosaic_gpu.plan_of(q, k, pages, ragged, **fn.keywords)
        assert plan.barrier_ops == 2 * copies * 64 <= 300


OPS = {
    "grouped_block_matmul": block_shapes,
    "grouped_delta_matmul": delta_shapes,
    "quantized_matmul": quantized_shapes,
}
QUICK_OPS = {
    "grouped_block_matmul llama-3-8b up 64",
    "grouped_delta_matmul llama-3-8b up decode",
    "quantized_matmul llama-3-8b up 16 int8",
    "quantized_matmul llama-3-8b up 16 int4",
}


def quantized_plan(args: tuple[Any, ...]) -> quantized_gpu.Plan:
    """Of a program of the quantized matmul."""
    x, codes, scales = args[:3]
    return quantized_gpu.make_plan(
        rows=x.shape[0],
        width=x.shape[1],
        out=codes.shape[0],
        group=x.shape[1] // scales.shape[1],
        bits=4 if codes.dtype == jnp.int4 else 8,
    )


def form(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a program's code depends on: its plan less the numbers of blocks, steps and parts."""
    if op == "grouped_block_matmul":
        x, weights = args[:2]
        wide = x.shape[0] > 64 * len(weights), weights[0].shape[0] % 128 == 0
        return op, len(weights), *wide
    if op == "grouped_delta_matmul":
        y, x, a, _, pieces, _ = args
        plan = delta_gpu.make_plan(
            rows=x.shape[0],
            groups=pieces.shape[0],
            width=x.shape[1],
            out=y.shape[1],
            rank=a.shape[1],
            turns=pieces.shape[1],
        )
        # Expand's code has a copy and a sum for each part of the inputs.
        less = {"steps": 0, "column_blocks": 0, "column_parts": min(2, plan.column_parts)}
        return op, dataclasses.replace(plan, **less)
    plan = quantized_plan(args)
    less = {"steps": 0, "column_blocks": 0}
    less |= {"row_blocks": min(2, plan.row_blocks), "parts": min(2, plan.parts)}
    return op, args[1].dtype, dataclasses.replace(plan, **less)


def matmuls() -> Iterator[Any]:
    """One program of each form; that of QUICK_OPS where it has the form."""
    found: dict[tuple[Any, ...], tuple[str, str, Callable, tuple[Any, ...]]] = {}
    for op, module in OPS.items():
        for name, fn, args in module.programs("mosaic_gpu"):
            key = form(op, args)
            if key not in found or name in QUICK_OPS:
                found[key] = op, name, fn, args
    for op, name, fn, args in found.values():
        marks = () if name in QUICK_OPS else pytest.mark.long
        yield pytest.param(op, fn, args, id=name, marks=marks)


@pytest.mark.parametrize("op, fn, args", matmuls())
def test_matmuls_compile_for_h200(h200, op, fn, args, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    donated = (0,) if op == "grouped_delta_matmul" else ()
    program, spilled = compiled(h200, fn, args, donated, capfd)
    assert spilled == 0
    memory = program.memory_analysis()
    if donated:
        assert memory.alias_size_in_bytes == 4 * args[0].size, "y is updated in place"
    if op == "quantized_matmul":
        codes = args[1].size * (4 if args[1].dtype == jnp.int4 else 8) // 8
        plan = quantized_plan(args)
        sums = 4 * plan.parts * plan.rows * plan.row_blocks * args[1].shape[0]
        # The results of several parts are added up outside the kernel.
        temporary = memory.temp_size_in_bytes - (sums if plan.parts > 1 else 0)
        assert temporary < codes, "no copy of the weights"


def test_any_number_of_rows_is_taken_apart_into_tiles(h200):
    """12 rows, which tiles of 8 do not divide: the kernels are made, and not compiled, for an H200."""

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=h200)

    f32, bf16, i32 = jnp.float32, jnp.bfloat16, jnp.int32
    x, weight, sizes = array(bf16, 12, 256), array(bf16, 256, 256), array(i32, 2)
    jax.jit(block_gpu.grouped_block_matmul).lower(x, (weight, weight), sizes)
    jax.jit(quantized_gpu.quantized_matmul).lower(
        x, array(jnp.int8, 256, 256), array(f32, 256, 2), None
    )
    table = array(bf16, 5, 8, 256)
    jax.jit(delta_gpu.grouped_delta_matmul).lower(
        array(f32, 12, 256), x, table, table, array(i32, 2, 2), sizes
    )
    model = shapes.Model(name="", heads=4, kv_heads=2, head_dim=64)
    batch = shapes.Batch(name="", num_seqs=3, rows=12, max_q_len=6, max_len=256)
    fn, args = shapes.program("mosaic_gpu", model, batch, "bfloat16")
    args = jax.tree.map(lambda a: array(a.dtype, *a.shape), args)
    jax.jit(fn).lower(*args)
