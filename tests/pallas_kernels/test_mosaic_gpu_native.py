"""The Hopper kernels on a Hopper GPU, on the shared cases: what no other machine can show.

`JAX_PLATFORMS=cuda,cpu python -m pytest` of this file, or `python -m bench gpu`, which runs it. Which cases
run as their nearest neighbor is in `mosaic_gpu_worker.py`.
"""

import dataclasses
import functools
import os

import jax
import pytest

from tests.pallas_kernels import attention_cases, grouped_cases, quantized_cases
from tests.pallas_kernels import mosaic_gpu_worker as worker

_WANTED = "a Hopper GPU, and JAX_PLATFORMS=cuda,cpu"
if "cuda" not in os.environ.get("JAX_PLATFORMS", ""):
    pytest.skip(f"NOT RUN: wants {_WANTED}", allow_module_level=True)

from jblock.pallas_kernels.grouped_block_matmul import mosaic_gpu as block_gpu  # noqa: E402
from jblock.pallas_kernels.grouped_delta_matmul import mosaic_gpu as delta_gpu  # noqa: E402
from jblock.pallas_kernels.paged_attention import mosaic_gpu as attention_gpu  # noqa: E402
from jblock.pallas_kernels.quantized_matmul import mosaic_gpu as quantized_gpu  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def hopper():
    if getattr(jax.devices()[0], "compute_capability", "") != "9.0":
        pytest.fail(f"wants {_WANTED}; jax computes on {jax.devices()[0].device_kind}")


ATTEND = jax.jit(
    attention_gpu.paged_attention, static_argnames=("sliding_window", "softcap", "scale")
)
BLOCK = jax.jit(block_gpu.grouped_block_matmul)
QUANTIZED = jax.jit(quantized_gpu.quantized_matmul)


@pytest.mark.parametrize(
    "case", list(dict.fromkeys(map(worker.served, attention_cases.CASES))), ids=str
)
def test_attention(case):
    def attend(*args, scale, **options):
        scale = case.head_dim**-0.5 if scale is None else scale
        return ATTEND(*args, scale=scale, **options)

    got, wanted = attention_cases.run(case, attention_gpu.abstract_pages, attend)
    attention_cases.check(case, got, wanted, 1e-2)


@pytest.mark.parametrize("case", worker.served_grouped(grouped_cases.BLOCK_CASES), ids=str)
def test_grouped_block_matmul(case):
    grouped_cases.hold_block(case, BLOCK)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", worker.served_grouped(grouped_cases.DELTA_CASES), ids=str)
def test_grouped_delta_matmul(case, fused):
    multiply = delta_gpu.grouped_delta_matmul
    if fused:
        total, groups = sum(n for n, _ in case.groups) + case.padding, len(case.groups)
        shape = dict(rows=total, groups=groups, width=case.width, out=case.out, rank=case.rank)
        turns = max(1, max(p for _, p in case.groups) + case.slack)
        plan = delta_gpu.make_plan(turns=turns, **shape)
        multiply = functools.partial(
            multiply, plan=dataclasses.replace(plan, input_parts=1, column_parts=1)
        )
    grouped_cases.hold_delta(case, jax.jit(multiply))


@pytest.mark.parametrize("case", worker.served_quantized(quantized_cases.CASES), ids=str)
def test_quantized_matmul(case):
    quantized_cases.hold(case, QUANTIZED)
