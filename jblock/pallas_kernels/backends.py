"""Which module of an op serves which platform: the choice all ops share."""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import jax

from jblock.cpu_kernels import targets

BACKENDS = ("xla", "cpu", "tpu", "mosaic_gpu")
"""Modules of an op's folder. One is imported when used: Pallas takes a while, and CPU needs none of it."""

# Not yet "gpu": the Mosaic GPU kernels are for Hopper only, and never met a device. `python -m bench gpu`
# runs them on one.
_OF_PLATFORM = {"tpu": "tpu"}

_replaced: set[tuple[str, str]] = set()
"""(op, backend) whose kernel failed its self-test in this process."""


def backend_of(platform: str | None = None) -> str:
    """The backend that serves a platform ("cpu", "tpu", "gpu"); None: the one jax computes on."""
    platform = platform or jax.default_backend()
    if platform == "cpu" and platform not in _OF_PLATFORM and targets.available():
        return "cpu"
    return _OF_PLATFORM.get(platform, "xla")


def serve(platform: str, backend: str) -> None:
    """Has a platform served by a backend from now on, in this process.

    Raises:
      ValueError: there is no such backend, or it is not for the platform.
    """
    own = {"cpu": ("xla", "cpu"), "tpu": ("xla", "tpu"), "gpu": ("xla", "mosaic_gpu")}
    fitting = own.get(platform, ("xla",))
    if backend not in fitting:
        raise ValueError(
            f"backend {backend!r} does not serve a {platform}; give one of {', '.join(fitting)}"
        )
    if backend == "cpu" and not targets.available():
        raise ValueError("backend 'cpu' has no kernels for this processor; give xla")
    _OF_PLATFORM[platform] = backend


def chosen() -> str:
    """What `serve` chose, where it is part of what decides a program."""
    return " ".join(f"{name}:{backend}" for name, backend in sorted(_OF_PLATFORM.items()))


@contextlib.contextmanager
def serving(platform: str, backend: str) -> Iterator[None]:
    """While inside, a platform is served by another backend than its own: for measuring one that is not, or
    not yet, the default."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not known; give one of {', '.join(BACKENDS)}")
    before = dict(_OF_PLATFORM)
    _OF_PLATFORM[platform] = backend
    try:
        yield
    finally:
        _OF_PLATFORM.clear()
        _OF_PLATFORM.update(before)


def replace_by_xla(op: str, backend: str) -> None:
    """Has XLA's form of an op stand for a backend's kernel from now on, in this process."""
    _replaced.add((op, backend))


def replaced() -> tuple[str, ...]:
    """Ops whose kernel XLA's form stands for, each as "op/backend"."""
    return tuple(sorted(f"{op}/{backend}" for op, backend in _replaced))


def module(op: str, backend: str | None = None) -> ModuleType:
    """The module of an op's backend; None: of the one for the platform jax computes on. An op that a
    backend has no module for, or that `replace_by_xla` named, is XLA's there.

    Raises:
      ValueError: there is no such backend.
    """
    backend = backend or backend_of()
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not known; give one of {', '.join(BACKENDS)}")
    name = f"jblock.pallas_kernels.{op}.{backend}"
    there = (op, backend) not in _replaced and importlib.util.find_spec(name) is not None
    return importlib.import_module(name if there else f"jblock.pallas_kernels.{op}.xla")
