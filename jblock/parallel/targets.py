"""Devices that programs are compiled for without having them.

The real compilers run here: libtpu's for TPUs, and that of jax-cuda13-plugin for GPUs (the `compile`
extra has both, and ptxas and libdevice of CUDA, which the GPU's compiler calls).
"""

import dataclasses
import importlib.util
import math
import os
import re
import shutil
import sys
from pathlib import Path

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one chip has.

    Attributes:
      memory: bytes of device memory.
      bandwidth: bytes/s of it.
      flops: bf16 matmul operations a second.
      link: bytes/s a chip sends to its neighbors, all links together.
    """

    memory: int
    bandwidth: float
    flops: float
    link: float


# TPU: cloud.google.com/tpu/docs (v5e, v6e, v5p system pages). H200: NVIDIA's data sheet, dense bf16; its
# memory is what the driver leaves of 141 GB. "cpu" is a rough two-core machine, for estimates only.
CHIPS = {
    "v5e": Chip(memory=16 * GIB, bandwidth=819e9, flops=197e12, link=200e9),
    "v6e": Chip(memory=32 * GIB, bandwidth=1640e9, flops=918e12, link=448e9),
    "v5p": Chip(memory=95 * GIB, bandwidth=2765e9, flops=459e12, link=600e9),
    "h200": Chip(memory=143_000_000_000, bandwidth=4.8e12, flops=989e12, link=900e9),
    "cpu": Chip(memory=16 * GIB, bandwidth=40e9, flops=0.5e12, link=10e9),
}

_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4814000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 143000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device and how many.

    Attributes:
      platform: "tpu", "cuda" or "cpu".
      chip: key of CHIPS.
      grid: chips along each side, such as (2, 2).
    """

    platform: str
    chip: str
    grid: tuple[int, ...] = (1,)

    @classmethod
    def parse(cls, text: str) -> "Target":
        """A target from "tpu:v5e:2x2", "cuda:h200", "cuda:h200:4" or "cpu".

        Raises:
          ValueError: it is none of them.
        """
        if text == "cpu":
            return cls("cpu", "cpu")
        match = re.fullmatch(r"tpu:(v5e|v6e|v5p):(\d+(?:x\d+){1,2})|cuda:(h200)(?::(\d+))?", text)
        if match is None or (match[2] or match[4] or "1").startswith("0"):
            raise ValueError(
                f"target {text!r} is not known; give tpu:v5e:2x2 (v5e, v6e), tpu:v5p:2x2x1, "
                "cuda:h200, cuda:h200:4 or cpu"
            )
        if match[1]:
            return cls("tpu", match[1], tuple(map(int, match[2].split("x"))))
        return cls("cuda", match[3], (int(match[4] or 1),))

    def __str__(self) -> str:
        if self.platform == "cpu":
            return "cpu"
        grid = "x".join(map(str, self.grid))
        return f"{self.platform}:{self.chip}" + (f":{grid}" if grid != "1" else "")

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.grid)

    def devices(self) -> tuple[jax.Device, ...]:
        """Devices to compile for; nothing can run on them, except on cpu.

        Raises:
          ValueError: the target's compiler is not installed, or knows no such grid.
        """
        if self.platform == "cpu":
            return tuple(jax.local_devices(backend="cpu"))
        package = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}[self.platform]
        if not _installed(package):
            raise ValueError(
                f"target {self} needs the compiler in {package}: pip install 'jblock[compile]'"
            )
        if self.platform == "cuda" and ptxas() is None:
            raise ValueError(f"target {self} needs CUDA's ptxas: pip install 'jblock[compile]'")
        try:
            return tuple(self._topology().devices)
        except Exception as e:
            raise ValueError(f"the compiler has no topology for {self}: {e}") from e

    def _topology(self) -> topologies.TopologyDescription:
        if self.platform == "tpu":
            # Otherwise libtpu asks the metadata server of a cloud machine, and waits for it.
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            # It is used to compile only: other processes may, too.
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            options = {"chips_per_host_bounds": [1, 1, 1]} if self.chips == 1 else {}
            sides = "x".join(map(str, self.grid))
            return topologies.get_topology_desc(f"{self.chip}:{sides}", platform="tpu", **options)
        return topologies.get_topology_desc(
            "h200", platform="cuda", topology=f"1x1x{self.chips}", target_config=_H200
        )


def ptxas() -> str | None:
    """The assembler that jax calls for GPU programs: of the wheel nvidia-cuda-nvcc, or of a CUDA toolkit;
    None: there is none."""
    if _installed("nvidia.cu13"):
        spec = importlib.util.find_spec("nvidia.cu13")
        for folder in (spec and spec.submodule_search_locations) or ():
            if (found := Path(folder) / "bin" / "ptxas").exists():
                return str(found)
    toolkit = os.environ.get("CUDA_ROOT") or "/usr/local/cuda"
    return shutil.which("ptxas", path=f"{toolkit}/bin") or shutil.which("ptxas")


def _installed(package: str) -> bool:
    if package in sys.modules:
        return True
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
