"""The arrays of an orbax checkpoint, by name, each read when it is needed, or a part of it.

Orbax writes a description of the tree (`_METADATA`, JSON) and the arrays through TensorStore (zarr, in files
of their own or in one OCDBT database). Both are read as they lie: the model's own classes are not needed, and
of an array that holds a whole stack of layers only the layer that is asked for.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.source import read_json

_DESCRIPTION = "_METADATA"
# What orbax calls the folder of the tree within the folder of a step.
_INNER = ("items", "default", "state", "params", "model", "model_params")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of a checkpoint: its `name` (the keys to it, joined by dots), `shape` and `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path
    store: Any

    def read(self, axis: int | None = None, index: int = 0) -> np.ndarray:
        """The array in memory of its own, or what lies at `index` of one axis.

        Raises:
          CheckpointError: it is damaged.
        """
        part = self.store
        if axis is not None:
            part = part[(slice(None),) * axis + (index,)]
        try:
            return np.array(part.read().result())
        except Exception as e:  # TensorStore raises ValueError and others for what it cannot decode
            raise CheckpointError(
                f"{self.path}: {self.name!r} cannot be read ({str(e)[:200]}): copy the checkpoint again"
            ) from e


def is_orbax(path: Path) -> bool:
    """Whether a folder is an orbax checkpoint, or the folder of a step that has one in it."""
    return path.is_dir() and _folder(path) is not None


def read_tree(path: Path) -> dict[str, Leaf]:
    """Every array of the checkpoint in `path`, by name; none is read yet.

    Raises:
      CheckpointError: no checkpoint, or a damaged one.
    """
    folder = _folder(path)
    if folder is None:
        raise CheckpointError(
            f"{path} is no orbax checkpoint: give the folder of one step, which has {_DESCRIPTION} in it or "
            f"in one of {', '.join(_INNER)}"
        )
    description = read_json(folder / _DESCRIPTION)
    tree = description.get("tree_metadata")
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"{folder / _DESCRIPTION} has no tree_metadata: copy the checkpoint again"
        )
    leaves = {}
    for entry in tree.values():
        try:
            keys = [str(part["key"]) for part in entry["key_metadata"]]
            kind = entry["value_metadata"]["value_type"]
        except (TypeError, KeyError) as e:
            raise CheckpointError(
                f"{folder / _DESCRIPTION} is malformed ({e}): copy the checkpoint again"
            ) from e
        if kind in ("jax.Array", "np.ndarray"):
            leaf = _open(folder, ".".join(keys), description)
            leaves[leaf.name] = leaf
    return leaves


def _folder(path: Path) -> Path | None:
    for folder in (path, *(path / name for name in _INNER)):
        if (folder / _DESCRIPTION).is_file():
            return folder
    return None


def _open(folder: Path, name: str, description: Mapping[str, Any]) -> Leaf:
    import tensorstore

    driver = "zarr3" if description.get("use_zarr3") else "zarr"
    if description.get("use_ocdbt"):
        store = {"driver": "ocdbt", "base": f"file://{folder.resolve()}/", "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{folder.resolve() / name}/"}
    try:
        opened = tensorstore.open(
            {"driver": driver, "kvstore": store}, open=True, read=True
        ).result()
    except Exception as e:  # TensorStore raises ValueError and others for what it cannot open
        raise CheckpointError(
            f"{folder}: {name!r} cannot be opened ({str(e)[:200]}): copy the checkpoint again"
        ) from e
    return Leaf(
        name=name,
        shape=tuple(opened.shape),
        dtype=np.dtype(opened.dtype.numpy_dtype),
        path=folder,
        store=opened,
    )


def stamp(path: Path) -> str:
    """What changes when a file of the checkpoint was exchanged or written to."""
    folder = _folder(path) or path
    parts = []
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        stat = file.stat()
        parts.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    return json.dumps(parts)
