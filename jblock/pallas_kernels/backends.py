"""Which module of an op serves which platform: the choice all ops share."""

import importlib
from types import ModuleType

import jax

from jblock.pallas_kernels.native import targets

BACKENDS = ("xla", "native", "tpu", "mosaic_gpu")
"""Modules of an op's folder. One is imported when used: Pallas takes a while, and CPU needs none of it."""

# Not yet "gpu": the Mosaic GPU kernels are for Hopper and bfloat16 only, and never met a device.
_OF_PLATFORM = {"tpu": "tpu"}
# Ops with machine code of our own for the CPU; the others take XLA's there.
_NATIVE = ("paged_attention",)


def backend_of(platform: str | None = None) -> str:
    """The backend that serves a platform ("cpu", "tpu", "gpu"); None: the one jax computes on."""
    platform = platform or jax.default_backend()
    if platform == "cpu" and targets.available():
        return "native"
    return _OF_PLATFORM.get(platform, "xla")


def module(op: str, backend: str | None = None) -> ModuleType:
    """The module of an op's backend; None: of the one for the platform jax computes on.

    Raises:
      ValueError: there is no such backend.
    """
    backend = backend or backend_of()
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not known; give one of {', '.join(BACKENDS)}")
    if backend == "native" and op not in _NATIVE:
        backend = "xla"
    return importlib.import_module(f"jblock.pallas_kernels.{op}.{backend}")
