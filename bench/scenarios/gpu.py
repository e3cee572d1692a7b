"""What an NVIDIA Hopper GPU makes of the kernels, and of decoding through blocks. Without one it says so.

The kernels that no default uses yet serve while this runs. Beside each of ours are XLA's form of the op and
jax's own kernels, in the same run.
"""

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench import timing
from bench.kernels import Case, grouped_delta_matmul, paged_attention, quantized_matmul
from bench.models import DEMO_3M, ModelShape
from bench.report import progress
from bench.scenarios import block_tax
from jblock.pallas_kernels import backends
from jblock.pallas_kernels.models import MODELS
from jblock.pallas_kernels.paged_attention import shapes as attention_shapes

LLAMA_8B = ModelShape(
    layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)
BATCHES = (1, 16, 64)
PARTS = ("tests", "attention", "matmuls", "step")
_TESTS = Path(__file__).parents[2] / "tests/pallas_kernels/test_mosaic_gpu_native.py"
_BOTH = ("mosaic_gpu", "xla")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This scenario's flags."""
    parser.add_argument("--part", choices=PARTS, help="only this one")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`gpu {tests, attention, matmuls, step}`, or `{not_run: why}` without a Hopper GPU."""
    why = absent()
    if why:
        progress(f"NOT RUN: {why}")
        return {"gpu": {"not_run": why}}
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {
        "tests": _tests,
        "attention": lambda args: attention(args.quick),
        "matmuls": lambda args: matmuls(args.quick),
        "step": _step,
    }
    result: dict[str, Any] = {}
    with backends.serving("gpu", "mosaic_gpu"):
        for name in [args.part] if args.part else PARTS:
            progress(f"part {name}")
            result[name] = attempt(lambda name=name: parts[name](args))
    device = jax.devices()[0]
    return {
        "gpu": result,
        "device": device.device_kind,
        "driver": getattr(device.client, "platform_version", ""),
    }


def absent() -> str | None:
    """Why there is no Hopper GPU here; None: there is one, and jax computes on it."""
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        return f"jax found no device: {str(error).splitlines()[0]}"
    if device.platform != "gpu":
        return f"there is no GPU here: jax computes on {device.device_kind}"
    if getattr(device, "compute_capability", "") != "9.0":
        return f"{device.device_kind} is no Hopper GPU (compute capability 9.0)"
    return None


def attempt(measure: Callable[[], Any]) -> Any:
    """What it gives, or `{failed: why}`, so that one kernel's failure leaves the others' figures."""
    try:
        return measure()
    except Exception as error:  # a compiler's or a driver's own, of any kind
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def _tests(args: argparse.Namespace) -> dict[str, Any]:
    """The shared tables of cases on the GPU, in a process of its own: a kernel that hangs or faults takes
    no figure with it."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x" if args.quick else "--tb=line",
        str(_TESTS),
    ]
    # Two processes share the memory of the device.
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=480)
    return {"passed": done.returncode == 0, "said": done.stdout.strip().splitlines()[-8:]}


def attention(quick: bool) -> dict[str, Any]:
    """`of_copy` of decoding 64 sequences of 4096 tokens, `of_matmul` of a prompt of 8192."""
    copied, matmul = timing.copy_rate(quick), timing.matmul_rate(quick)
    result: dict[str, Any] = {
        "copy_gb_s": round(copied / 1e9, 1),
        "matmul_tflops": round(matmul / 1e12, 3),
    }
    model = attention_shapes.MODELS[-1 if quick else 0]
    seqs, cached, prompt = (4, 256, 256) if quick else (64, 4096, 8192)
    page_size = attention_shapes.PAGE_SIZE
    for dtype in attention_shapes.DTYPES:
        for count, new, total in ((seqs, 1, cached), (1, prompt, prompt)):
            make = functools.partial(
                paged_attention.case_of, model, count, new, total, page_size, dtype
            )
            name = f"{model.name} {count}x{new} of {total} {dtype}"
            result[name] = _by_backend(make, copied, matmul, quick)
    result["jax"] = {
        "decode, triton": attempt(lambda: _microseconds(_jax_decode(model, seqs, cached), quick)),
        "prefill, mosaic": attempt(lambda: _microseconds(_jax_prefill(model, prompt), quick)),
    }
    return result


def matmuls(quick: bool) -> dict[str, Any]:
    """Deltas of 32 adapters beside their base projection, and quantized weights beside bfloat16 ones."""
    copied, matmul = timing.copy_rate(quick), timing.matmul_rate(quick)
    model, many, result = MODELS[-1 if quick else 0], 256 if quick else 2048, {}
    for projection in ("q", "up", "down"):
        base = _microseconds(_base(model.projections[projection], 64), quick)
        for pieces in (1, 2):
            make = functools.partial(
                grouped_delta_matmul.case_of, model, projection, 64, 32, pieces
            )
            figures = _by_backend(make, copied, matmul, quick) | {"base_us": base}
            result[f"{projection}, 64 rows, 32 adapters of rank {8 * pieces}"] = figures
    for rows in (16, many):
        base = _microseconds(_base(model.projections["up"], rows), quick)
        for bits in (8, 4):
            make = functools.partial(quantized_matmul.case_of, model, "up", rows, bits)
            figures = _by_backend(make, copied, matmul, quick) | {"bfloat16_us": base}
            result[f"up, {rows} rows, int{bits}"] = figures
    result["jax"] = {
        f"up, {many} rows, int8, mosaic": attempt(
            lambda: _microseconds(_jax_mixed(model.projections["up"], many), quick)
        )
    }
    return result


def _step(args: argparse.Namespace) -> dict[str, Any]:
    """A decode step through blocks over one fused program, and over the time to read its weights."""
    shape = DEMO_3M if args.quick else LLAMA_8B
    read = timing.read_rate(args.quick)
    flags = argparse.Namespace(**vars(args), dtype="bfloat16", rounds=15)
    ratios, detail, _ = block_tax.measure(shape, flags, 4, BATCHES, kv_dtype="int8")
    weights = 2 * (shape.layers * shape.layer_weights + shape.head_weights)
    return {
        f"batch {n}": {
            "over_fused": ratio,
            "over_floor": round(detail[f"b{n}"]["blocks_ms"]["median"] * 1e-3 * read / weights, 3),
            "floor_ms": round(weights / read * 1e3, 3),
            **{k: detail[f"b{n}"][k] for k in ("blocks_ms", "fused_ms")},
        }
        for n, ratio in ratios.items()
    }


def _by_backend(
    make: Callable[[], Case], copied: float, matmul: float, quick: bool
) -> dict[str, Any]:
    """By backend: `us`, `of_copy` and `of_matmul` as `bench kernels` has them."""
    result = {}
    for backend in _BOTH:

        def measure(backend: str = backend) -> dict[str, float]:
            with backends.serving("gpu", backend):
                case = make()
                seconds = timing.seconds_of(case, None, quick)
            return {
                "us": round(seconds * 1e6, 1),
                "of_copy": round(case.moved / seconds / copied, 3),
                "of_matmul": round(case.flops / seconds / matmul, 3),
            }

        result[backend] = attempt(measure)
        progress(f"{backend}: {result[backend]}")
    return result


def _microseconds(call: Callable[[], Any], quick: bool) -> float:
    return round(timing.median_seconds(call, quick) * 1e6, 1)


def _normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, dtype)


def _base(projection: tuple[int, int], rows: int) -> Callable[[], jax.Array]:
    """The product of the rows with a bfloat16 weight, by XLA."""
    width, out = projection
    x, w = _normal(rows, width), _normal(out, width)
    multiply = jax.jit(
        lambda x, w: jnp.einsum("ti,oi->to", x, w, preferred_element_type=jnp.float32)
    )
    return lambda: multiply(x, w)


def _jax_decode(model: Any, seqs: int, total: int) -> Callable[[], jax.Array]:
    """jax's paged attention (Triton, which jax is removing) on the shape of ours."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as theirs

    page_size = attention_shapes.PAGE_SIZE
    pages = total // page_size
    q = _normal(seqs, model.heads, model.head_dim)
    kv = _normal(model.kv_heads, seqs * pages, page_size, model.head_dim)
    table = jnp.arange(seqs * pages, dtype=jnp.int32).reshape(seqs, pages)
    attend, lengths = jax.jit(theirs), jnp.full(seqs, total, jnp.int32)
    return lambda: attend(q, kv, kv, table, lengths)


def _jax_prefill(model: Any, prompt: int) -> Callable[[], jax.Array]:
    """jax's causal attention for Hopper."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu as theirs

    q = _normal(1, prompt, model.heads, model.head_dim)
    kv = _normal(1, prompt, model.kv_heads, model.head_dim)
    config = theirs.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    attend = jax.jit(lambda q, k, v: theirs.attention(q, k, v, config))
    return lambda: attend(q, kv, kv)


def _jax_mixed(projection: tuple[int, int], rows: int) -> Callable[[], jax.Array]:
    """jax's product of int8 and bfloat16, which knows no scales."""
    from jax.experimental.pallas.ops.gpu import hopper_mixed_type_matmul_mgpu as theirs

    width, out = projection
    w = jax.random.randint(jax.random.key(1), (out, width), -128, 128, jnp.int8)
    x = _normal(width, rows)
    config = theirs.TuningConfig(tile_m=64, tile_n=128, tile_k=64, max_concurrent_steps=4)
    multiply = jax.jit(
        lambda w, x: theirs.mixed_matmul_kernel(w, x, out_dtype=jnp.bfloat16, config=config)
    )
    return lambda: multiply(w, x)
