"""Compiled programs on disk, so that the next start loads what this one compiled.

An entry is native code inside a pickle: loading one runs it. So the folder belongs to the service's own
user, nobody else may write to it, it lies outside every zoo, and nothing ever copies it. The key holds
everything that decides the machine code; an entry that is damaged, stale or fails to load is rebuilt.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import stat
import tempfile
from pathlib import Path
from typing import Any

import jax
import jaxlib
from absl import logging
from jax.experimental import serialize_executable

MAX_ENTRIES = 4096
_CODE = ("blocks", "pallas_kernels", "engine")


class ExecutableCache:
    """Programs by key in one folder.

    Attributes:
      folder: where; made with permissions 0700.
      loaded: programs read from it since start.
    """

    def __init__(self, folder: Path):
        """Opens or makes the folder.

        Raises:
          ValueError: it cannot be made, belongs to another user, or others may write to it.
        """
        try:
            # mkdir gives the mode to the last folder only; who may write to one above it could
            # put another in its place.
            for above in reversed(folder.parents):
                above.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.stat()
        except OSError as e:
            raise ValueError(
                f"executable cache {str(folder)!r} cannot be made ({e.strerror}): set XDG_CACHE_HOME "
                "to a folder that the service may write to"
            ) from e
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
            raise ValueError(
                f"executable cache {str(folder)!r} is owned or writable by others, who could run code "
                "as this service: chown it to the service's user and chmod it to 700"
            )
        self.folder = folder
        self.loaded = 0

    def load(self, key: str) -> Any | None:
        """The program stored under a key, ready to call; None when there is none that works."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, body = data[:32], data[32:]
        if hashlib.sha256(body).digest() != digest:
            logging.warning("executable cache entry %s is damaged; it is rebuilt", path.name)
            path.unlink(missing_ok=True)
            return None
        try:
            program = serialize_executable.deserialize_and_load(*pickle.loads(body))
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
                    file.write(hashlib.sha256(body).digest())
                    file.write(body)
                os.replace(name, self._path(key))
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except Exception as e:
            logging.warning("program %s could not be kept for the next start: %s", key[:80], e)

    def prune(self) -> None:
        """Drops the entries written longest ago beyond MAX_ENTRIES, and writers' leftovers."""
        entries = sorted(self.folder.glob("*.xla"), key=lambda p: p.stat().st_mtime, reverse=True)
        for path in [*entries[MAX_ENTRIES:], *self.folder.glob("tmp-*")]:
            with contextlib.suppress(OSError):
                path.unlink()

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(f"{environment()}\n{key}".encode()).hexdigest()
        return self.folder / f"{digest}.xla"


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/jblock/executables`, or below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jblock" / "executables"


@functools.cache
def environment() -> str:
    """All that decides machine code beside the program: versions, flags, device, CPU, our own code."""
    device = jax.local_devices()[0]
    return "\n".join(
        (
            jax.__version__,
            jaxlib.__version__,
            device.client.platform_version,
            device.device_kind,
            str(jax.local_device_count()),
            os.environ.get("XLA_FLAGS", ""),
            os.environ.get("LIBTPU_INIT_ARGS", ""),
            str(
                {
                    n: getattr(jax.config, n)
                    for n in ("jax_enable_x64", "jax_default_matmul_precision")
                }
            ),
            _cpu_features(),
            _CODE_DIGEST,
        )
    )


def _cpu_features() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return ""


def _code_digest() -> str:
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for part in _CODE:
        for path in sorted((root / part).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# Taken when the code is loaded: what is edited later is not what compiled the programs.
_CODE_DIGEST = _code_digest()
