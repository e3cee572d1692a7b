"""What a program is compiled for, as far as a block's own program depends on it.

It is the target that decides, never the machine that compiles: a program for a TPU is the same whether a
TPU or a CPU host builds it.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class Platform:
    """A kind of device.

    Attributes:
      name: "cpu", "tpu" or "gpu", as jax names it.
      kind: jax's `device_kind`, by which kernels find the block sizes tuned for it.
      avx512: whether it is a CPU with AVX-512.
    """

    name: str
    kind: str
    avx512: bool = False

    @classmethod
    def of(cls, device: jax.Device) -> "Platform":
        """That of a device, be it here or one to compile for. A CPU's features are this machine's."""
        cpu = device.platform == "cpu"
        return cls(device.platform, device.device_kind, cpu and _cpu_has("avx512f"))

    @property
    def out_in(self) -> bool:
        """How projections lie: [out, in], as checkpoints have them, or [in, out].

        XLA's CPU matmuls read the one or the other faster, by CPU. With AVX-512, [out, in]: its rows are what
        the machine code for few rows reads (`cpu_kernels/matmul`), and beyond, float32 has a form that is
        faster on it (`linear._weight_first`) than any on [in, out]. Without, XLA's code is all there is, and
        reads [in, out] faster. For TPUs and GPUs XLA compiles the same product from both, without
        a copy, so there they lie as they come.
        """
        return self.name != "cpu" or self.avx512


@functools.cache
def here() -> Platform:
    """That of the devices jax computes on in this process."""
    return Platform.of(jax.local_devices()[0])


def _cpu_has(feature: str) -> bool:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return feature in line.split()
    return False
