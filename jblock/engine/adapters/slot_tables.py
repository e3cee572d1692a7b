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
from jblock.engine.signature import TableForm
from jblock.parallel.placement import SINGLE, Placement

# Pieces one call writes; a chain takes as many calls of each size as it needs, largest first.
WRITE_SIZES = (4, 1)

Arrays = Mapping[str, jax.Array]
Update = Callable[[Arrays, Arrays, jax.Array], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Writes:
    """What one chain puts into the tables of one component, on the device already.

    Attributes:
      parts: its pieces, cut as `cut` says: float32 [n, PIECE_RANK, width] by table.
      count: pieces in all parts together.
      vectors: float32 [1, width] of every table of vectors, NaN where it has none of its own; and
        [1, out, ...] of every table of few bits, zeros where it has none.
      virtual: virtual tokens its sequences begin with.
    """

    parts: Sequence[Arrays] = ()
    count: int = 0
    vectors: Arrays = dataclasses.field(default_factory=dict)
    virtual: int = 0


@dataclasses.dataclass(frozen=True)
class Updates:
    """Compiled programs that write tables: `update_pieces` for n pieces, `update_vectors`."""

    pieces: Callable[[int], Update]
    vectors: Callable[[], Update]


class Tables:
    """Slot tables of one component, as blocks/slots.py describes them. They are never copied whole: a
    write donates them to a program that returns them with some rows replaced. The device takes calls in
    order, so a step that was enqueued before still reads what was there before."""

    def __init__(self, spec, form: TableForm, placement: Placement = SINGLE):
        self._spec, self._placement = spec, placement
        self._arrays: dict[str, jax.Array] = {}
        # Small, and kept by the host: what slots hold by slot.
        self._host = {
            "pieces": np.zeros((form.slots, form.turns), np.int32),
            "virtual": np.zeros(form.slots, np.int32),
        }
        self._put_host()
        self._views: dict[TableForm, dict[str, jax.Array]] = {}
        self._lock = threading.Lock()  # a view may be asked for by another thread than writes

    def view(self, form: TableForm) -> dict[str, jax.Array]:
        """The tables of a form by name, of nobody where they are new. The dict stays up to date."""
        with self._lock:
            if form not in self._views:
                vectors = vector_widths(self._spec, form)
                for name, struct in table_structs(self._spec, form, self._placement).items():
                    if name not in self._arrays and name not in self._host:
                        nobody = np.nan if name in vectors else 0.0
                        self._arrays[name] = self._placement.full(struct, nobody)
                self._views[form] = {}
                self._refresh()
            return self._views[form]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        with self._lock:
            host = sum(a.nbytes for a in self._host.values())
            return host + sum(a.nbytes for a in self._arrays.values())

    def write(
        self, slot: int, pieces: Sequence[int], form: TableForm, writes: Writes, updates: Updates
    ) -> None:
        """Gives a slot what is its own.

        Args:
          slot: whose; nobody may be using it.
          pieces: ids of the pieces it names from now on; none where it leaves the component as it is.
          form: whose targets are written.
          writes: what the pieces hold, and its vectors.
          updates: the programs that write.
        """
        with self._lock:
            first = 0
            for part, size in zip(writes.parts, cut(len(pieces)), strict=True):
                ids = self._placement.put(np.array(pieces[first : first + size], np.int32))
                tables = {name: self._arrays[name] for name in piece_widths(self._spec, form)}
                self._arrays.update(updates.pieces(size)(tables, part, ids))
                first += size
            if writes.vectors:
                ids = self._placement.put(np.array([slot], np.int32))
                tables = {name: self._arrays[name] for name in writes.vectors}
                self._arrays.update(updates.vectors()(tables, writes.vectors, ids))
            self._host["pieces"][slot] = 0
            self._host["pieces"][slot, : len(pieces)] = pieces
            self._host["virtual"][slot] = writes.virtual
            self._put_host()
            self._refresh()

    def _put_host(self) -> None:
        # Copies: on CPU the device would go on reading the host's own arrays.
        self._small = {n: self._placement.put(a.copy()) for n, a in self._host.items()}

    def _refresh(self) -> None:
        for form, view in self._views.items():
            for name in table_structs(self._spec, form, self._placement):
                view[name] = self._small[name] if name in self._small else self._arrays[name]


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
    for name, (shape, dtype) in bit_shapes(spec, form).items():
        mine = content.bits.get(name) if content else None
        entry = np.zeros(shape, dtype) if mine is None else np.ascontiguousarray(mine)
        vectors[name] = placement.put(entry[None])
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
    return Writes(parts, count, vectors, content.virtual if content else 0)


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
