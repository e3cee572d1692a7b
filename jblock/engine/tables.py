"""The LoRA tables of one component on the device, written in place while they are used."""

import threading
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from jblock.engine.params import table_structs
from jblock.engine.signature import LoraForm
from jblock.parallel.placement import SINGLE, Placement

# Pieces one call writes; an adapter takes as many calls of each size as it needs, largest first.
WRITE_SIZES = (4, 1)

Update = Callable[[dict, Mapping[str, jax.Array], jax.Array], dict]


class Tables:
    """Slot tables of one component, as blocks/linear.py describes them: rows of `pieces` name pieces of
    `TARGET.a` and `TARGET.b`. They are never copied whole: a write donates them to a program that
    returns them with some pieces replaced. The device takes calls in order, so a step that was enqueued
    before still reads what was there before."""

    def __init__(self, spec, form: LoraForm, placement: Placement = SINGLE):
        self._spec, self._placement = spec, placement
        self._arrays: dict[str, jax.Array] = {}
        self._pieces = np.zeros((form.slots, form.turns), np.int32)
        self._device_pieces = placement.put(self._pieces.copy())
        self._views: dict[LoraForm, dict[str, jax.Array]] = {}
        self._lock = threading.Lock()  # a view may be asked for by another thread than writes

    def view(self, form: LoraForm) -> dict[str, jax.Array]:
        """The tables of a form by name, zeros where they are new. The dict stays up to date."""
        with self._lock:
            if form not in self._views:
                for name, struct in table_structs(self._spec, form, self._placement).items():
                    if name != "pieces" and name not in self._arrays:
                        self._arrays[name] = self._placement.zeros(struct)
                self._views[form] = {}
                self._refresh()
            return self._views[form]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._pieces.nbytes + sum(a.nbytes for a in self._arrays.values())

    def write(
        self,
        slot: int,
        pieces: Sequence[int],
        form: LoraForm,
        parts: Sequence[Mapping[str, jax.Array]],
        update: Callable[[int], Update],
    ) -> None:
        """Gives a slot its pieces.

        Args:
          slot: row of `pieces`; nobody may be using it.
          pieces: ids of the pieces it names from now on; none where the adapter leaves the component
            as it is.
          form: whose targets are written.
          parts: what the pieces hold, cut as `cut` says: float32 [n, PIECE_RANK, width] by name.
          update: the program that writes n pieces.
        """
        with self._lock:
            names = [f"{t}.{side}" for t in form.targets for side in "ab"]
            first = 0
            for part, size in zip(parts, cut(len(pieces)), strict=True):
                ids = self._placement.put(np.array(pieces[first : first + size], np.int32))
                tables = {name: self._arrays[name] for name in names}
                self._arrays.update(update(size)(tables, part, ids))
                first += size
            self._pieces[slot] = 0
            self._pieces[slot, : len(pieces)] = pieces
            # A copy: on CPU the device would go on reading the host's own array.
            self._device_pieces = self._placement.put(self._pieces.copy())
            self._refresh()

    def _refresh(self) -> None:
        for form, view in self._views.items():
            view["pieces"] = self._device_pieces
            for target in form.targets:
                for name in (f"{target}.a", f"{target}.b"):
                    view[name] = self._arrays[name]


def cut(count: int) -> list[int]:
    """The sizes in which `count` pieces are written."""
    sizes = []
    for size in WRITE_SIZES:
        sizes += [size] * (count // size)
        count %= size
    return sizes


def update_program(
    tables: Mapping[str, jax.Array], parts: Mapping[str, jax.Array], ids: jax.Array
) -> dict[str, jax.Array]:
    """Replaces pieces of tables.

    Args:
      tables: float32 [pieces, PIECE_RANK, width] by name (donated).
      parts: float32 [n, PIECE_RANK, width] by name.
      ids: int32 [n], which pieces they become.
    """

    def replaced(table: jax.Array, part: jax.Array) -> jax.Array:
        for i in range(part.shape[0]):
            table = jax.lax.dynamic_update_slice_in_dim(table, part[i : i + 1], ids[i], axis=0)
        return table

    return {name: replaced(table, parts[name]) for name, table in tables.items()}
