"""From items to the static grids and index arrays programs take."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jblock.engine.config import Bucket
from jblock.engine.graph.graph import BlockInstance, Segment
from jblock.engine.kv_cache.page_tables import PageTables
from jblock.engine.kv_cache.spec import KVShape, RowShape
from jblock.engine.programs.constraints import mask_words
from jblock.engine.programs.forward import INDEX_COLUMNS
from jblock.engine.programs.penalties import (
    BIAS_COLUMNS,
    CONTROL_COLUMNS,
    DRAFT_COLUMNS,
    FIXED_COLUMNS,
)
from jblock.engine.programs.sampling import OPTION_COLUMNS
from jblock.engine.runner.state import DeviceState
from jblock.engine.scheduling.sequence import WorkItem

MIN_TEMPERATURE = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Items that share one call. What is worked out of them holds for as long as they stand where they stood:
    one that decodes is the same item in every step, and so a batch lives as long as its company.

    Attributes:
      bucket: grid of the call.
      items: at most bucket.num_seqs of them, each of chunk bucket.q_len.
      page_tables: of segments of the block, and when they last changed.
    """

    bucket: Bucket
    items: tuple[WorkItem, ...]
    page_tables: dict[Segment, tuple[int, Any]] = dataclasses.field(
        init=False, repr=False, default_factory=dict
    )
    _index: np.ndarray | None = dataclasses.field(init=False, repr=False, default=None)

    @functools.cached_property
    def is_constrained(self) -> bool:
        """Whether a row that samples keeps to a grammar."""
        return any(i.samples and i.sequence.constraint is not None for i in self.items)

    @functools.cached_property
    def is_greedy(self) -> bool:
        """Whether every row picks the best token."""
        return all(i.sequence.request.sampling.temperature == 0 for i in self.items)

    @functools.cached_property
    def adjusts_logits(self) -> bool:
        """Whether a row has biases or penalties."""
        return any(i.sequence.adjusts_logits for i in self.items)

    @functools.cached_property
    def wants_top(self) -> bool:
        """Whether a row asks for the best tokens beside its own."""
        return any(i.sequence.request.sampling.top_logprobs for i in self.items)

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether the best token of each row is all that is asked for."""
        more = self.adjusts_logits or self.is_constrained or self.wants_top or self.scores
        return self.is_greedy and not (more or self.pools)

    @functools.cached_property
    def scores(self) -> bool:
        """Whether log-probabilities of prompt tokens are wanted."""
        return any(i.scores for i in self.items)

    @functools.cached_property
    def pools(self) -> bool:
        """Whether what the model makes of the tokens is wanted."""
        return any(i.pools for i in self.items)

    @functools.cached_property
    def num_rows(self) -> int:
        """Real rows, padding not counted."""
        return sum(item.q_len for item in self.items)

    @functools.cached_property
    def slots(self) -> np.ndarray:
        """int [S]: sequence slots; -1, the last row of page tables, for padding."""
        slots = np.full(self.bucket.num_seqs, -1, np.intp)
        slots[: len(self.items)] = [item.sequence.seq_slot for item in self.items]
        return slots

    @functools.cached_property
    def options(self) -> np.ndarray:
        """See `option_array`."""
        return option_array(self)

    @functools.cached_property
    def onward(self) -> Sequence[tuple[BlockInstance | None, Sequence[WorkItem]]]:
        """Where its items go from here; one whose logits nobody wants skips the head, and None is the end."""
        ways: dict[BlockInstance | None, list[WorkItem]] = {}
        for item in self.items:
            stages, after = item.sequence.route.stages, item.at + 1
            instance = stages[after].instance if after < len(stages) else None
            if instance is not None and instance.is_head:
                instance = instance if item.samples or item.scores or item.pools else None
            ways.setdefault(instance, []).append(item)
        return list(ways.items())

    @property
    def first_layer(self) -> int:
        """Of the block its items stand at, the layer they begin with."""
        return self.items[0].first_layer if self.items else 0

    def index(self, num_rows: int) -> np.ndarray:
        """int32 [S, 4 + 2Q] as forward.py describes; padding names register row `num_rows`."""
        if self._index is None:
            object.__setattr__(self, "_index", index_array(self, num_rows))
        assert self._index is not None
        # A new array every step: the device may still read the last one.
        index = self._index.copy()
        index[: len(self.items), 0] = [item.start for item in self.items]
        return index


class Cuts:
    """Batches that were cut in the last step, for the same items in this one."""

    def __init__(self) -> None:
        self._last: dict[tuple, tuple[list[int], list[Batch]]] = {}
        self._now = self._last
        self._buckets: Sequence[Bucket] = ()

    def begin_step(self, buckets: Sequence[Bucket]) -> None:
        """Forgets what was not cut in the last step, and all if other grids may be used."""
        self._last, self._now = (self._now if buckets is self._buckets else {}), {}
        self._buckets = buckets

    def batches(
        self,
        instance: BlockInstance,
        items: Sequence[WorkItem],
        cover: Callable[[int, int], Sequence[int]],
    ) -> list[Batch]:
        """See the function `batches`; for items that decode at a block."""
        key, places = (instance, *items), [item.at for item in items]
        known = self._last.get(key)
        if known is None or known[0] != places:
            known = places, list(batches(items, self._buckets, cover))
        self._now[key] = known
        return known[1]


def batches(
    items: Iterable[WorkItem],
    buckets: Sequence[Bucket],
    cover: Callable[[int, int], Sequence[int]] | None = None,
) -> Iterator[Batch]:
    """Groups items by chunk length and by the layer they begin with, decoding first, and cuts each group to
    the buckets.

    Args:
      items: of one block.
      buckets: the grids there are.
      cover: (chunk, count) -> the sizes of the calls that carry so many items; without it a group takes
        the smallest bucket that holds what is left of it, or the largest there is.
    """
    groups: dict[tuple[int, int], list[WorkItem]] = {}
    for item in items:
        groups.setdefault((item.chunk, item.first_layer), []).append(item)
    for (chunk, _), group in sorted(groups.items(), key=lambda g: g[0]):
        sizes = sorted(b.num_seqs for b in buckets if b.q_len == chunk)
        for size in (cover or _smallest(sizes))(chunk, len(group)):
            yield Batch(Bucket(size, chunk), tuple(sorted(group[:size], key=_neighbors)))
            group = group[size:]


def _neighbors(item: WorkItem) -> tuple[int, int]:
    """Rows of one adapter lie together, for kernels that read an adapter once a run of rows; and those of one
    sequence, its drafts behind its last token."""
    return item.adapter_slot, item.sequence.seq_slot


def _smallest(sizes: Sequence[int]) -> Callable[[int, int], Sequence[int]]:
    def cover(chunk: int, count: int) -> Sequence[int]:
        full, rest = divmod(count, sizes[-1])
        return [sizes[-1]] * full + [s for s in sizes if s >= rest > 0][:1]

    return cover


def index_array(batch: Batch, num_rows: int) -> np.ndarray:
    """See `Batch.index`."""
    q = batch.bucket.q_len
    index = np.zeros((batch.bucket.num_seqs, INDEX_COLUMNS + 2 * q), np.int32)
    index[:, INDEX_COLUMNS : INDEX_COLUMNS + q] = num_rows
    for i, item in enumerate(batch.items):
        sequence = item.sequence
        index[i, :INDEX_COLUMNS] = (
            item.start,
            item.q_len,
            item.adapter_slot,
            sequence.seq_slot,
        )
        index[i, INDEX_COLUMNS : INDEX_COLUMNS + item.q_len] = item.rows
        tokens = item.tokens or (-1,)
        index[i, INDEX_COLUMNS + q : INDEX_COLUMNS + q + item.q_len] = tokens
    return index


def page_tables(
    batch: Batch, table: np.ndarray | None, segment: Segment, columns: int
) -> np.ndarray:
    """int32 [L, S, columns]: the pages of a batch in each attention of a segment.

    Args:
      batch: whose items stand at the segment's block.
      table: that of the segment's KV shape; None where no sequence has pages yet.
      segment: some layers of the block.
      columns: pages of the longest sequence.
    """
    size, layers, shape = batch.bucket.num_seqs, segment.kv_layers, segment.kv_shape
    if table is None or not batch.items or shape is None:
        return np.zeros((layers, size, columns), np.int32)
    slots = batch.slots
    firsts = [item.stage.kv_first.get(shape, 0) for item in batch.items]
    first = firsts[0] + segment.kv_first
    if len(set(firsts)) == 1:
        return table[first : first + layers].take(slots, axis=1, mode="wrap")
    # The block stands at several depths of the chains that meet here.
    at = np.zeros(size, np.intp)
    at[: len(firsts)] = firsts
    return table[at + segment.kv_first + np.arange(layers)[:, None], slots]


class BatchArrays:
    """Those of one runner."""

    def __init__(self, state: DeviceState, num_rows: int, max_pages: int):
        """`num_rows` are those of a register, `max_pages` those of the longest sequence."""
        self._state, self._num_rows, self._max_pages = state, num_rows, max_pages
        self._indices: dict[tuple, jax.Array | np.ndarray] = {}

    def begin_step(self) -> None:
        """Forgets the index arrays of the step before."""
        self._indices.clear()

    def index(self, batch: Batch) -> jax.Array | np.ndarray:
        """The batch's index array, built once per group of rows and step."""
        key = batch.bucket, batch.items
        index = self._indices.get(key)
        if index is None:
            index = self._indices[key] = self._state.put(batch.index(self._num_rows))
        return index

    def page_tables(
        self, segment: Segment, shape: KVShape, batch: Batch, tables: PageTables | None
    ) -> jax.Array | np.ndarray:
        """The pages of a batch in a segment; the last ones as long as no row has others."""
        changed = tables.changed(batch.slots) if tables else 0
        known = batch.page_tables.get(segment)
        if known is None or known[0] != changed:
            table = tables.get(shape) if tables else None
            pages = page_tables(batch, table, segment, self._max_pages)
            known = batch.page_tables[segment] = changed, self._state.put(pages, None)
        return known[1]


class RowMove(NamedTuple):
    """Rows of a batch that prompts leave, or find, where chains part.

    Attributes:
      shape: of the pages.
      kind: "read_rows" or "write_rows".
      pages: int32 [S, columns]: of its sequences; 0 where the rows of one stay where they are.
    """

    shape: RowShape
    kind: str
    pages: np.ndarray


def row_moves(batch: Batch, tables: PageTables | None, columns: int) -> dict[int, list[RowMove]]:
    """What is read or written in front of each layer of a block.

    Args:
      batch: whose items stand at the block.
      tables: `KVCacheManager.tables`.
      columns: pages of the longest sequence.
    """
    found: dict[tuple[int, RowShape, str], np.ndarray] = {}
    if tables is None or batch.bucket.q_len == 1:
        return {}
    for i, item in enumerate(batch.items):
        for number, boundary in enumerate(item.sequence.route.boundaries):
            table = tables.get(boundary.shape)
            if boundary.stage != item.at or boundary.layer < item.first_layer or table is None:
                continue
            pages = table[number, item.sequence.seq_slot]
            if pages.any():
                what = "read_rows" if item.entry is boundary else "write_rows"
                key = (boundary.layer, boundary.shape, what)
                zeros = np.zeros((batch.bucket.num_seqs, columns), np.int32)
                found.setdefault(key, zeros)[i] = pages
    moves: dict[int, list[RowMove]] = {}
    for (layer, shape, kind), array in found.items():
        moves.setdefault(layer, []).append(RowMove(shape, kind, array))
    return moves


def stitch_positions(batch: Batch, segment: Segment) -> np.ndarray:
    """int32 [S]: for each item, which row of its position tables a stitch takes."""
    positions = np.zeros(batch.bucket.num_seqs, np.int32)
    positions[: len(batch.items)] = [i.stage.positions[segment.stitch] for i in batch.items]
    return positions


def option_array(batch: Batch) -> np.ndarray:
    """int32 [S, 5] of sampling options as sampling.sampled describes."""
    options = np.zeros((batch.bucket.num_seqs, OPTION_COLUMNS), np.int32)
    floats = options.view(np.float32)
    for i, item in enumerate(batch.items):
        sampling = item.sequence.request.sampling
        # Below it logits would overflow; the best token is what such a temperature means.
        temperature = sampling.temperature if sampling.temperature >= MIN_TEMPERATURE else 0.0
        # No vocabulary has 1e9 tokens, so the best one alone reaches it; much less is 0 in float32.
        top_p = max(sampling.top_p, 1e-9)
        floats[i, [0, 2, 4]] = temperature, top_p, sampling.min_p
        options[i, 1] = min(sampling.top_k, 2**31 - 1)
        options[i, 3:4].view(np.uint32)[0] = item.sequence.seed & 0xFFFFFFFF
    return options


def control_array(batch: Batch) -> np.ndarray:
    """int32 [S, CONTROL_COLUMNS] as adjust.py describes; neutral for rows that want nothing."""
    controls = np.zeros((batch.bucket.num_seqs, CONTROL_COLUMNS), np.int32)
    floats = controls.view(np.float32)
    floats[:, 0] = 1.0
    # Ids past every vocabulary are dropped.
    controls[:, FIXED_COLUMNS : FIXED_COLUMNS + BIAS_COLUMNS] = 2**31 - 1
    controls[:, -DRAFT_COLUMNS:] = 2**31 - 1
    for i, item in enumerate(batch.items):
        sequence = item.sequence
        sampling = sequence.request.sampling
        if not sequence.adjusts_logits:
            continue
        floats[i, :3] = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        # The token an item of the prompt ends with is counted with the prompt.
        controls[i, 3] = not item.tokens
        controls[i, CONTROL_COLUMNS - DRAFT_COLUMNS :][: len(item.drafted)] = item.drafted
        pairs = list(sampling.logit_bias)
        if item.start + item.q_len - sequence.prompt_len < sampling.min_tokens:
            pairs += [(token, -np.inf) for token in sequence.end_ids]
        for column, (token, value) in enumerate(pairs, FIXED_COLUMNS):
            controls[i, column] = token
            floats[i, column + BIAS_COLUMNS] = value
    return controls


def mask_array(batch: Batch, vocab_size: int) -> np.ndarray:
    """int32 [S, 1 + W] as constraints.constrain describes. Rows that are not to sample, and those of
    sequences that are over, sit out."""
    words = mask_words(vocab_size)
    masks = np.full((batch.bucket.num_seqs, 1 + words), -1, np.int32)
    masks[:, 0] = 0
    for i, item in enumerate(batch.items):
        constraint = item.sequence.constraint
        if constraint is None:
            continue
        mask = constraint.mask
        if mask is None or not item.samples or item.sequence.finished:
            masks[i, 0] = 1
        else:
            masks[i, 1:].view(np.uint32)[:] = mask[:words]
    return masks


def first_array(batch: Batch) -> np.ndarray:
    """int32 [S]: the first row of each item that is of the request's own tokens, and not virtual."""
    firsts = np.zeros(batch.bucket.num_seqs, np.int32)
    firsts[: len(batch.items)] = [max(i.sequence.virtual - i.start, 0) for i in batch.items]
    return firsts


def target_array(batch: Batch) -> np.ndarray:
    """int32 [S, Q]: the prompt token that follows each row; 0 where none does."""
    targets = np.zeros((batch.bucket.num_seqs, batch.bucket.q_len), np.int32)
    for i, item in enumerate(batch.items):
        prompt = item.sequence.all_token_ids[: item.sequence.prompt_len]
        following = prompt[item.start + 1 : item.start + 1 + item.q_len]
        targets[i, : len(following)] = following
    return targets
