"""The Hopper kernel under the real compiler for an H200, which needs no GPU: jax's CUDA plugin and ptxas do.

`make test` compiles two programs, `make test-long` every kernel of `shapes.programs`.
"""

import dataclasses
import glob
import importlib.util
import re
import shutil

import jax
import pytest

from jblock.pallas_kernels.grouped_block_matmul import shapes as block_shapes
from jblock.pallas_kernels.models import MODELS as MATMUL_MODELS
from jblock.pallas_kernels.paged_attention import shapes

H200 = """
platform_name: "CUDA" device_description_str: "NVIDIA H200" dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4814000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 143000000000
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
"""
# Models of one shape share a kernel, which is compiled once in a process.
MODELS = {dataclasses.replace(m, name=""): m for m in reversed(shapes.MODELS)}
PROGRAMS = [
    pytest.param(
        model,
        batch,
        id=f"{model.name}-{batch.name}",
        marks=()
        if (model.name, batch.name) in {("llama-3-8b", "decode"), ("demo", "mixed")}
        else pytest.mark.long,
    )
    for model in MODELS.values()
    for batch in shapes.BATCHES
]


@pytest.fixture(scope="module")
def h200():
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs jax-cuda13-plugin and jax-cuda13-pjrt")
    if not shutil.which("ptxas") and not glob.glob("/usr/local/cuda*/bin/ptxas"):
        pytest.skip("needs ptxas of a CUDA toolkit")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=H200
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


@pytest.mark.parametrize("model, batch", PROGRAMS)
def test_compiles_for_h200(h200, model, batch, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    fn, args = shapes.program("mosaic_gpu", model, batch, "bfloat16")
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=h200), args)
    compiled = jax.jit(fn, donate_argnums=3).lower(*args).compile()
    said = "".join(capfd.readouterr())
    assert "sm_90a" in said
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", said)]
    # Heads of 256 do not fit the registers whole; a spill of a few words is outside the loops.
    assert max(spilled) <= (1024 if model.head_dim > 128 else 256)
    pages = sum(a.size * a.dtype.itemsize for a in args[3])
    assert compiled.memory_analysis().alias_size_in_bytes == pages, "pages are updated in place"


@pytest.mark.parametrize(
    "tokens, projection",
    [
        pytest.param(64, "up"),
        *(pytest.param(*p, marks=pytest.mark.long) for p in ((64, "down"), (2048, "up"))),
    ],
)
def test_grouped_blocks_compile_for_h200(h200, tokens, projection):
    fn, args = block_shapes.program("mosaic_gpu", MATMUL_MODELS[0], projection, tokens)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=h200), args)
    compiled = jax.jit(fn).lower(*args).compile()
    assert compiled.memory_analysis().output_size_in_bytes == tokens * 4 * args[1][0].shape[0]
