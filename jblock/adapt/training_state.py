"""The state of a training run that was interrupted, kept in the user's own cache folder for a day.

Not in the zoo: the name of a run's state can be worked out by anybody, so another user of the zoo could put
weights of their own there.
"""

import contextlib
import io
import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jblock.user_cache import UserCacheError, private_folder
from jblock.zoo.records import ZooError

_KEPT_SECONDS = 24 * 3600.0


def write(work: str, done: int, arrays: Sequence[np.ndarray]) -> None:
    """Replaces the state of the run `work` (64 hexadecimal digits) in one step.

    Raises:
      ZooError: the user's cache folder cannot be used.
    """
    path = _path(work)
    buffer = io.BytesIO()
    named = {str(i): a for i, a in enumerate(arrays)}
    np.savez(buffer, allow_pickle=False, done=np.int64(done), **named)
    aside = path.with_suffix(f".{os.getpid()}.new")
    try:
        aside.write_bytes(buffer.getvalue())
        os.replace(aside, path)
    except OSError as e:
        raise ZooError(f"cannot write the state of training to {path}: {e}") from e
    finally:
        aside.unlink(missing_ok=True)


def read(work: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, list[np.ndarray]] | None:
    """Steps done and the arrays that `write` was given; None where there is no state, or it is damaged,
    older than a day, or not of these shapes."""
    path = _path(work)
    _remove_old(path.parent)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = [arrays[str(i)] for i in range(len(shapes))]
            done = int(arrays["done"])
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
    if done < 0 or any(a.shape != tuple(s) for a, s in zip(found, shapes, strict=True)):
        return None
    if not all(a.dtype == np.float32 and np.isfinite(a).all() for a in found):
        return None
    return done, found


def remove(work: str) -> None:
    """Removes the state of a run: call it when what was trained is in the zoo."""
    with contextlib.suppress(OSError):
        _path(work).unlink(missing_ok=True)


def _path(work: str) -> Path:
    try:
        return private_folder("training") / f"{work}.npz"
    except UserCacheError as e:
        raise ZooError(str(e)) from e


def _remove_old(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()
