"""Where the pages of every sequence lie: tables on the host, by sequence slot, updated in place."""

from collections.abc import Sequence

import numpy as np

from jblock.engine.kv_cache.spec import PageShape


class PageTables:
    """By shape, int32 [layers or boundaries, max_num_seqs + 1, max_pages]: the pages of the sequence in each
    slot, layer by layer of its chain; 0, the null page, elsewhere, and in the last row, which stands for
    padding."""

    def __init__(self, max_num_seqs: int, max_pages: int):
        """Without any page."""
        self._arrays: dict[PageShape, np.ndarray] = {}
        self._max_num_seqs, self._max_pages = max_num_seqs, max_pages
        self._changes = 0
        self._changed = np.zeros(max_num_seqs + 1, np.int64)

    def __getitem__(self, shape: PageShape) -> np.ndarray:
        """The table of a shape that pages were written for."""
        return self._arrays[shape]

    def get(self, shape: PageShape) -> np.ndarray | None:
        """The table of a shape; None where no sequence has had pages yet."""
        return self._arrays.get(shape)

    def table(self, shape: PageShape, layers: int) -> np.ndarray:
        """The table of a shape, with rows for so many layers at least."""
        table = self._arrays.get(shape)
        if table is None or len(table) < layers:
            wider = np.zeros((layers, self._max_num_seqs + 1, self._max_pages), np.int32)
            if table is not None:
                wider[: len(table)] = table
            self._arrays[shape] = table = wider
        return table

    def write(
        self, shape: PageShape, slot: int, layers: range, first: int, ids: Sequence[int]
    ) -> None:
        """Enters pages of some layers into a slot's row, page by page from `first` on."""
        if not ids:
            return
        new = np.array(ids, np.int32).reshape(-1, len(layers)).T
        table = self.table(shape, layers.stop)
        table[layers.start : layers.stop, slot, first : first + new.shape[1]] = new
        self._touch(slot)

    def ids(self, shape: PageShape, slot: int, layers: int, count: int) -> list[int]:
        """A slot's first `count` pages of every layer, page by page."""
        if not count:
            return []
        return self._arrays[shape][:layers, slot, :count].T.reshape(-1).tolist()

    def clear(self, shape: PageShape, slot: int, layers: int, count: int) -> None:
        """Forgets a slot's first `count` pages."""
        if shape in self._arrays:
            self._arrays[shape][:layers, slot, :count] = 0
            self._touch(slot)

    def renumber(self, shape: PageShape, new_id: np.ndarray) -> None:
        """Gives all pages of a shape other ids: `new_id` by the old one."""
        if shape in self._arrays:
            self._arrays[shape][:] = new_id[self._arrays[shape]]
            self._touch(slice(None))

    def remove(self, shape: PageShape) -> None:
        """Forgets a shape that no sequence holds pages of."""
        self._arrays.pop(shape, None)

    def changed(self, slots: np.ndarray) -> int:
        """The last change of the KV pages of any of these slots: as long as it is the same, so are they."""
        return int(self._changed[slots].max())

    def _touch(self, slots: int | slice) -> None:
        self._changes += 1
        self._changed[slots] = self._changes
