"""Block sizes of a kernel: tuned for a device where somebody has measured, else by a heuristic."""

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import jax


class Shape(Protocol):
    """What block sizes depend on: a hashable value that has a name."""

    @property
    def key(self) -> str:
        """How a tuned file names the shape."""


B = TypeVar("B")


class Tuning(Generic[B]):
    """The tuned block sizes of one op's kernel, in `tuned/<device>.json` of the op's folder.

    Attributes:
      op: name of the op.
      blocks: dataclass of its block sizes.
      heuristic: block sizes of a shape that nobody measured.
      folder: where the files lie.
    """

    def __init__(self, op: str, blocks: Callable[..., B], heuristic: Callable[[Any], B]):
        self.op = op
        self.blocks = blocks
        self.heuristic = heuristic
        self.folder = Path(__file__).parent / op / "tuned"
        self._said: set[tuple[str, str]] = set()

    def blocks_for(self, shape: Shape, device_kind: str | None) -> B:
        """The tuned block sizes of a shape on a device (None: on the first one here), or the
        heuristic's, which is then said once."""
        kind = jax.devices()[0].device_kind if device_kind is None else device_kind
        tuned = self.measured(kind).get(shape.key)
        if tuned is not None:
            return tuned
        if (shape.key, kind) not in self._said:
            self._said.add((shape.key, kind))
            logging.getLogger(__name__).info(
                "%s %s is not tuned for %s: block sizes by heuristic; "
                "python -m bench kernels --tune measures them",
                self.op.replace("_", " "),
                shape.key,
                kind,
            )
        return self.heuristic(shape)

    def file(self, device_kind: str) -> Path:
        """Where the tuned block sizes of a device lie, whether or not there are any."""
        name = re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")
        return self.folder / f"{name}.json"

    def measured(self, device_kind: str) -> dict[str, B]:
        """By key of the shape, all that somebody has measured on a device."""
        entries = _read(self.file(device_kind))
        return {key: self.blocks(**entry["blocks"]) for key, entry in entries.items()}

    def save(self, device_kind: str, best: Mapping[Any, tuple[B, float]]) -> Path:
        """Adds measured shapes (the best blocks, and the seconds of a call with them) to a device's file."""
        path = self.file(device_kind)
        entries = dict(_read(path))
        for shape, (blocks, seconds) in best.items():
            entries[shape.key] = {
                "blocks": dataclasses.asdict(blocks),  # type: ignore[call-overload]
                "microseconds": round(seconds * 1e6, 1),
            }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
        _read.cache_clear()
        return path


@functools.cache
def _read(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def matrix_unit(device_kind: str | None) -> int:
    """Columns that a matrix unit of a TPU (None: of the first device) multiplies by: 256 from v6e on."""
    kind = jax.devices()[0].device_kind if device_kind is None else device_kind
    generation = re.match(r"TPU ?v?(\d+)", kind)
    return 256 if generation and int(generation[1]) >= 6 else 128
