"""The Hopper kernels of the matmuls in the Mosaic GPU interpreter, on the shared cases in bfloat16.

What of the kernels the interpreter cannot run is in `mosaic_gpu_worker.py`. That they compile for an H200 is
shown by `test_mosaic_gpu_compiles`. `make test` runs one case, `make test-long` all.
"""

import dataclasses

import jax.numpy as jnp
import pytest

from jblock.pallas_kernels.grouped_block_matmul import mosaic_gpu as block_gpu
from tests.pallas_kernels import mosaic_gpu_worker as worker
from tests.pallas_kernels.grouped_cases import BLOCK_CASES, BlockCase


def served(cases):
    """Those cases in bfloat16; widths are rounded up to multiples of 64."""
    up = lambda n: -(-n // 64) * 64
    return list(
        dict.fromkeys(
            dataclasses.replace(c, dtype="bfloat16", width=up(c.width), out=up(c.out))
            for c in cases
        )
    )


@pytest.fixture(scope="module")
def pool():
    with worker.start() as pool:
        yield pool


def put(pool, op, case):
    return pool.submit(worker.run_op, op, case).result(timeout=600)


QUICK_BLOCK = BlockCase((3, 0, 70), 192, 64, "bfloat16", padding=2)


def test_block_matches_reference(pool):
    put(pool, "grouped_block_matmul", QUICK_BLOCK)


@pytest.mark.long
@pytest.mark.parametrize("case", served(BLOCK_CASES), ids=str)
def test_block_matches_reference_on_every_case(pool, case):
    put(pool, "grouped_block_matmul", case)


@pytest.mark.parametrize(
    "shape, dtype", [((64, 64), jnp.float32), ((64, 72), jnp.bfloat16), ((72, 64), jnp.bfloat16)]
)
def test_weights_block_does_not_serve_are_refused(shape, dtype):
    w, x = jnp.zeros(shape, dtype), jnp.zeros((4, shape[1]), dtype)
    with pytest.raises(NotImplementedError, match="want bfloat16 of"):
        block_gpu.grouped_block_matmul(x, (w,), jnp.asarray([4], jnp.int32))
