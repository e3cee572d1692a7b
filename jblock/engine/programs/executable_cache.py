"""Compiled programs on disk, so that the next start loads what this one compiled.

An entry is native code inside a pickle: loading one runs it. So the folder belongs to the service's own
user, nobody else may write to it, it lies outside every zoo, and nothing ever copies it. The key holds
everything that decides the machine code; an entry that is damaged, stale or fails to load is rebuilt.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
from absl import logging
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from jblock.cpu_kernels import targets
from jblock.pallas_kernels import backends
from jblock.user_cache import UserCacheError, cache_folder, make_private

MAX_ENTRIES = 4096
_CODE = ("blocks", "pallas_kernels", "cpu_kernels", "parallel", "engine")
# What compiles for a platform beside jaxlib; one that is not installed counts as "-".
_COMPILERS = {
    "tpu": ("libtpu",),
    "gpu": tuple(f"jax-cuda{v}-{part}" for v in (12, 13) for part in ("plugin", "pjrt")),
}


class ExecutableCache:
    """Programs by key in one folder.

    Attributes:
      folder: where; made with permissions 0700.
      loaded: programs read from it since start.
      stored: programs written to it since start.
    """

    def __init__(self, folder: Path, devices: Sequence[jax.Device] = ()):
        """Opens or makes the folder, for programs of these devices; none: of those jax computes on.

        Raises:
          ValueError: it cannot be made, belongs to another user, or others may write to it.
        """
        try:
            make_private(folder)
        except UserCacheError as e:
            raise ValueError(f"executable cache, whose files are run as code: {e}") from e
        # A program out of jax's own cache cannot be serialized again: what was stored of it would load
        # and then fail when it is called. This cache stands in for that one.
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        self.folder = folder
        self.loaded = self.stored = 0
        self._environment = environment(tuple(devices))

    def load(self, key: str, devices: Sequence[jax.Device] = ()) -> Any | None:
        """The program stored under a key, ready to call; None when there is none that works.

        Args:
          key: all that decides the program beside the environment.
          devices: it runs on; none: jax's default device.
        """
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, body = data[:32], data[32:]
        if _seal(path, body) != digest:
            logging.warning("executable cache entry %s is damaged; it is rebuilt", path.name)
            path.unlink(missing_ok=True)
            return None
        try:
            targets.prepare_named(body)
            devices = tuple(devices) or (jax.local_devices()[0],)
            serialized, in_tree, out_tree = pickle.loads(body)
            program = serialize_executable.deserialize_and_load(
                serialized,
                in_tree,
                out_tree,
                backend=devices[0].client,
                execution_devices=devices,
            )
        except Exception as e:
            logging.warning("executable cache entry %s does not load (%s); rebuilt", path.name, e)
            path.unlink(missing_ok=True)
            return None
        self.loaded += 1
        return program

    def store(self, key: str, program: Any) -> None:
        """Keeps a program for the next start. A full disk or a backend that cannot serialize costs
        the entry, never the service."""
        try:
            body = pickle.dumps(serialize_executable.serialize(program))
            handle, name = tempfile.mkstemp(dir=self.folder, prefix="tmp-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_seal(self._path(key), body))
                    file.write(body)
                os.replace(name, self._path(key))
                self.stored += 1
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except Exception as e:
            logging.warning("program %s could not be kept for the next start: %s", key[:80], e)

    def is_noted(self, key: str) -> bool:
        """Whether `note` was called with a key by this start or an earlier one, in the same environment."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            return path.read_bytes() == _seal(path, b"")
        return False

    def note(self, key: str) -> None:
        """Keeps for later starts that something holds in this environment."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            path.write_bytes(_seal(path, b""))

    def prune(self) -> None:
        """Drops the entries written longest ago beyond MAX_ENTRIES, and writers' leftovers."""
        entries = sorted(self.folder.glob("*.xla"), key=lambda p: p.stat().st_mtime, reverse=True)
        for path in [*entries[MAX_ENTRIES:], *self.folder.glob("tmp-*")]:
            with contextlib.suppress(OSError):
                path.unlink()

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(f"{self._environment}\n{key}".encode()).hexdigest()
        return self.folder / f"{digest}.xla"


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/jblock/executables`, or below ~/.cache."""
    return cache_folder("executables")


def _seal(path: Path, body: bytes) -> bytes:
    """Digest of an entry and of the name it has: one under another's name is not that one."""
    return hashlib.sha256(path.stem.encode() + body).digest()


@functools.cache
def environment(devices: tuple[jax.Device, ...] = ()) -> str:
    """All that decides machine code beside the program: versions, flags, device, CPU, our own code.

    It is the same whether the devices are here or only compiled for, so that what was built ahead for them
    counts exactly where jax, jaxlib and the compiler of the platform have the same versions.

    Args:
      devices: all that the host of the programs has; none: those jax computes on.
    """
    devices = devices or tuple(jax.local_devices())
    platform = devices[0].platform
    return "\n".join(
        (
            jax.__version__,
            jaxlib.__version__,
            *(f"{name} {_version(name)}" for name in _COMPILERS.get(platform, ())),
            platform,
            devices[0].device_kind,
            str(len(devices)),
            os.environ.get("XLA_FLAGS", ""),
            os.environ.get("LIBTPU_INIT_ARGS", ""),
            str(
                {
                    n: getattr(jax.config, n)
                    for n in ("jax_enable_x64", "jax_default_matmul_precision")
                }
            ),
            _cpu_features() if platform == "cpu" else "",
            *backends.replaced(),
            backends.chosen(),
            _CODE_DIGEST,
        )
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _cpu_features() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return ""


def _code_digest() -> str:
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for part in _CODE:
        for path in sorted((root / part).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# Taken when the code is loaded: what is edited later is not what compiled the programs.
_CODE_DIGEST = _code_digest()
