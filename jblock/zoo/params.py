"""The tensors of one component on disk: an orbax checkpoint without compression.

Orbax then keeps every tensor as one raw file, so its size is known beforehand: a missing, cut or
foreign file is told before anything is read.
"""

import functools
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jblock.zoo.ids import DTYPES
from jblock.zoo.records import TensorRecord, ZooError


@functools.cache
def _orbax() -> tuple[Any, Any]:
    # Imported late: `list` and `inspect` read no tensor and should not wait for jax.
    import orbax.checkpoint as ocp

    # Orbax tells a dozen things about every component it touches; its warnings stay.
    logging.getLogger("absl").addFilter(_not_chatter)
    # The handler without the Checkpointer around it: the zoo has its own atomic rename, and a
    # second one, with its marker files, costs half of the time of a small component.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)
    return ocp, handler


def _not_chatter(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or "orbax" not in record.pathname


def save(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `tensors` into the new folder `folder`."""
    ocp, handler = _orbax()
    folder.mkdir()
    handler.save(folder, args=ocp.args.PyTreeSave(dict(tensors)))


def load(folder: Path, records: Mapping[str, TensorRecord]) -> dict[str, np.ndarray]:
    """Reads the tensors `records` names, on the host.

    Raises:
      ZooError: a file is missing, is no regular file, or has another size, shape or dtype.
    """
    for name, record in records.items():
        _check_file(folder, name, record)
    ocp, handler = _orbax()
    args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in records}
    try:
        restored = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=args))
    except Exception as e:
        raise ZooError(f"{folder} cannot be read ({e}): the zoo is damaged; run fsck") from e
    for name, record in records.items():
        value = restored.get(name)
        if (
            not isinstance(value, np.ndarray)
            or value.shape != record.shape
            or value.dtype != DTYPES[record.dtype]
        ):
            raise ZooError(f"{folder} does not hold {name!r} as recorded: the zoo is damaged")
    return {name: restored[name] for name in records}


def _check_file(folder: Path, name: str, record: TensorRecord) -> None:
    path = folder / name / ".".join("0" for _ in record.shape)
    expected = DTYPES[record.dtype].itemsize * int(np.prod(record.shape, dtype=np.int64))
    try:
        if stat.S_ISLNK(os.lstat(path.parent).st_mode):
            raise ZooError(f"{path.parent} is a link: a zoo holds its tensors itself; run fsck")
        found = os.lstat(path)
    except OSError as e:
        raise ZooError(f"{path} cannot be read ({e.strerror}): the zoo is damaged") from e
    if not stat.S_ISREG(found.st_mode) or found.st_size != expected:
        raise ZooError(
            f"{path} has {found.st_size} bytes, expected a file of {expected}: the zoo is damaged; "
            "run fsck and convert the model again"
        )
