"""The slot tables of one component on the device, written in place while they are used."""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from jblock.blocks.slots import PIECE_RANK
from jblock.engine.adapters.compose import SlotContent
from jblock.engine.adapters.slot_layout import (
    bit_shapes,
    piece_widths,
    put_rows,
    table_structs,
    vector_widths,
)
from jblock.engine.signature import MAX_TURNS, TableForm
from jblock.parallel.placement import SINGLE, Placement

# Pieces one call writes; a chain takes as many calls of each size as it needs, largest first.
WRITE_SIZES = (4, 1)

Arrays = Mapping[str, jax.Array]
_Table = tuple[str, tuple[int, ...]]  # its name and shape
Update = Callable[[Arrays, Arrays, jax.Array], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Writes:
    """What one chain puts into the tables of one component, on the device already.

    Attributes:
      parts: its pieces, cut as `cut` says: float32 [n, PIECE_RANK, width] by table.
      count: pieces in all parts together.
      vectors: float32 [1, width] of every table of vectors, NaN where it has none of its own.
      bits: [1, out, ...] of every table of few bits, zeros where it has none; empty where it has none in any.
      virtual: virtual tokens its sequences begin with.
    """

    parts: Sequence[Arrays] = ()
    count: int = 0
    vectors: Arrays = dataclasses.field(default_factory=dict)
    bits: Arrays = dataclasses.field(default_factory=dict)
    virtual: int = 0


@dataclasses.dataclass(frozen=True)
class Updates:
    """Compiled programs that write tables: for n pieces, for vectors, for codes of few bits."""

    pieces: Callable[[int], Update]
    vectors: Callable[[], Update]
    bits: Callable[[], Update]


class Tables:
    """Slot tables of one component, as blocks/slots.py describes them. They are never copied whole: a
    write donates them to a program that returns them with some rows replaced. The device takes calls in
    order, so a step that was enqueued before still reads what was there before.

    Several forms are there at a time while requests of two graphs run. Tables of one name and shape are the
    same ones; those of another number of pieces or places are others, for other adapters."""

    def __init__(self, spec, form: TableForm, placement: Placement = SINGLE):
        self._spec, self._placement = spec, placement
        self._arrays: dict[_Table, jax.Array] = {}
        # Small, and kept by the host: what slots hold by slot.
        self._host = {
            "pieces": np.zeros((form.slots, MAX_TURNS), np.int32),
            "virtual": np.zeros(form.slots, np.int32),
            "places": np.zeros(form.slots, np.int32),
        }
        self._views: dict[TableForm, dict[str, jax.Array]] = {}
        self._lock = threading.Lock()  # a view may be asked for by another thread than writes

    def view(self, form: TableForm) -> dict[str, jax.Array]:
        """The tables of a form by name, in a dict that stays up to date; empty until `make`."""
        with self._lock:
            return self._views.setdefault(form, {})

    def make(self, form: TableForm) -> None:
        """Allocates what a form lacks, as tables of nobody."""
        with self._lock:
            vectors = vector_widths(self._spec, form)
            for name, struct in self._structs(form).items():
                if name not in self._host and (name, struct.shape) not in self._arrays:
                    nobody = np.nan if name in vectors else 0.0
                    self._arrays[name, struct.shape] = self._placement.full(struct, nobody)
            self._views.setdefault(form, {})
            self._refresh()

    def drop(self, form: TableForm) -> None:
        """Frees what only this form has; its view is not to be used any more."""
        with self._lock:
            self._views.pop(form, {}).clear()
            kept = {(n, s.shape) for f in self._views for n, s in self._structs(f).items()}
            for table in self._arrays.keys() - kept:
                del self._arrays[table]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        with self._lock:
            host = sum(a.nbytes for a in self._host.values())
            return host + sum(a.nbytes for a in self._arrays.values())

    def write(
        self,
        slot: int,
        place: int,
        pieces: Sequence[int],
        form: TableForm,
        writes: Writes,
        updates: Updates,
    ) -> None:
        """Gives a slot what is its own.

        Args:
          slot: whose; nobody may be using it.
          place: of its codes of few bits; 0 where it has none on any component.
          pieces: ids of the pieces it names from now on; none where it leaves the component as it is.
          form: whose targets are written.
          writes: what the pieces hold, and its vectors.
          updates: the programs that write.

        Raises:
          ValueError: it has codes and no place for them.
        """
        if writes.bits and not place:
            raise ValueError("codes of few bits came without a place: load the model anew")
        with self._lock:
            first = 0
            for part, size in zip(writes.parts, cut(len(pieces)), strict=True):
                ids = self._placement.put(np.array(pieces[first : first + size], np.int32))
                self._update(form, updates.pieces(size), part, ids)
                first += size
            if writes.vectors:
                ids = self._placement.put(np.array([slot], np.int32))
                self._update(form, updates.vectors(), writes.vectors, ids)
            self._host["pieces"][slot] = 0
            self._host["pieces"][slot, : len(pieces)] = pieces
            self._host["virtual"][slot] = writes.virtual
            self._host["places"][slot] = place if writes.bits else 0
            if writes.bits:
                ids = self._placement.put(np.array([place], np.int32))
                self._update(form, updates.bits(), writes.bits, ids)
            self._refresh()

    def _update(self, form: TableForm, program: Update, rows: Arrays, ids: jax.Array) -> None:
        view = self._views[form]
        for name, array in program({name: view[name] for name in rows}, rows, ids).items():
            view[name] = self._arrays[name, array.shape] = array

    def _structs(self, form: TableForm) -> dict[str, jax.ShapeDtypeStruct]:
        return table_structs(self._spec, form, self._placement)

    def _refresh(self) -> None:
        small: dict[_Table, jax.Array] = {}
        for form, view in self._views.items():
            for name, struct in self._structs(form).items():
                table = name, struct.shape
                if name in self._host and table not in small:
                    part = self._host[name][tuple(slice(n) for n in struct.shape)]
                    # A copy: on CPU the device would go on reading the host's own array.
                    small[table] = self._placement.put(part.copy())
                array = small.get(table, self._arrays.get(table))
                if array is not None:  # or it was not made yet
                    view[name] = array


def writes_of(
    spec, form: TableForm, content: SlotContent | None, placement: Placement = SINGLE
) -> Writes:
    """What a chain's content becomes for `Tables.write`: filled up with zeros and NaN for targets that it
    leaves as they are; no content leaves all of them so."""
    vectors = {}
    for name, width in vector_widths(spec, form).items():
        own = content.vectors.get(name) if content else None
        row = np.full(width, np.nan, np.float32) if own is None else own
        vectors[name] = put_rows(spec, name, row[None], placement)
    bits = {}
    own_bits = content.bits if content else {}
    for name, (shape, dtype) in bit_shapes(spec, form).items() if own_bits else ():
        mine = own_bits.get(name)
        entry = np.zeros(shape, dtype) if mine is None else np.ascontiguousarray(mine)
        bits[name] = placement.put(entry[None])
    count = content.num_pieces if content else 0
    parts, first = [], 0
    for size in cut(count):
        part = {}
        for name, width in piece_widths(spec, form).items():
            own = content.pieces.get(name) if content else None
            if own is None:
                own = np.zeros((count, PIECE_RANK, width), np.float32)
            part[name] = put_rows(spec, name, own[first : first + size], placement)
        parts.append(part)
        first += size
    return Writes(parts, count, vectors, bits, content.virtual if content else 0)


def cut(count: int) -> list[int]:
    """The sizes in which `count` pieces are written."""
    sizes = []
    for size in WRITE_SIZES:
        sizes += [size] * (count // size)
        count %= size
    return sizes


@jax.named_scope("write_adapter")
def update_program(tables: Arrays, rows: Arrays, ids: jax.Array) -> dict[str, jax.Array]:
    """Replaces entries of tables along their first axis.

    Args:
      tables: [entries, ..., width] by name (donated).
      rows: [n, ..., width] by name.
      ids: int32 [n], which entries they become.
    """

    def replaced(table: jax.Array, part: jax.Array) -> jax.Array:
        for i in range(part.shape[0]):
            table = jax.lax.dynamic_update_slice_in_dim(table, part[i : i + 1], ids[i], axis=0)
        return table

    return {name: replaced(table, rows[name]) for name, table in tables.items()}
