"""From items to the static grids and index arrays programs take."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jblock.engine.config import Bucket
from jblock.engine.graph.graph import Segment
from jblock.engine.kv_cache.spec import PageShape, RowShape
from jblock.engine.programs.constraints import mask_words
from jblock.engine.programs.forward import INDEX_COLUMNS
from jblock.engine.programs.penalties import BIAS_COLUMNS, CONTROL_COLUMNS, FIXED_COLUMNS
from jblock.engine.programs.sampling import OPTION_COLUMNS
from jblock.engine.scheduling.sequence import WorkItem

MIN_TEMPERATURE = 1e-5


@dataclasses.dataclass(frozen=True)
class Batch:
    """Items that share one call.

    Attributes:
      bucket: grid of the call.
      items: at most bucket.num_seqs of them, each of chunk bucket.q_len.
    """

    bucket: Bucket
    items: tuple[WorkItem, ...]

    @property
    def is_constrained(self) -> bool:
        """Whether a row that samples keeps to a grammar."""
        return any(i.samples and i.sequence.constraint is not None for i in self.items)

    @property
    def num_rows(self) -> int:
        """Real rows, padding not counted."""
        return sum(item.q_len for item in self.items)

    @property
    def first_layer(self) -> int:
        """Of the block its items stand at, the layer they begin with."""
        return self.items[0].first_layer if self.items else 0


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
            # Those of one adapter lie together, for kernels that read an adapter once a run of rows.
            together = sorted(group[:size], key=lambda item: item.sequence.adapter_slot)
            yield Batch(Bucket(size, chunk), tuple(together))
            group = group[size:]


def _smallest(sizes: Sequence[int]) -> Callable[[int, int], Sequence[int]]:
    def cover(chunk: int, count: int) -> Sequence[int]:
        full, rest = divmod(count, sizes[-1])
        return [sizes[-1]] * full + [s for s in sizes if s >= rest > 0][:1]

    return cover


def index_array(batch: Batch, num_rows: int) -> np.ndarray:
    """int32 [S, 4 + 2Q] as programs.py describes; padding names register row `num_rows`."""
    q = batch.bucket.q_len
    index = np.zeros((batch.bucket.num_seqs, INDEX_COLUMNS + 2 * q), np.int32)
    index[:, INDEX_COLUMNS : INDEX_COLUMNS + q] = num_rows
    for i, item in enumerate(batch.items):
        sequence = item.sequence
        index[i, :INDEX_COLUMNS] = (
            item.start,
            item.q_len,
            sequence.adapter_slot,
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
      table: `KVCacheManager.tables` of the segment's KV shape; None where no sequence has pages yet.
      segment: some layers of the block.
      columns: pages of the longest sequence.
    """
    size, layers, shape = batch.bucket.num_seqs, segment.kv_layers, segment.kv_shape
    if table is None or not batch.items or shape is None:
        return np.zeros((layers, size, columns), np.int32)
    slots = np.full(size, table.shape[1] - 1, np.intp)  # the last row is that of padding
    slots[: len(batch.items)] = [item.sequence.seq_slot for item in batch.items]
    firsts = [item.stage.kv_first.get(shape, 0) for item in batch.items]
    first = firsts[0] + segment.kv_first
    if len(set(firsts)) == 1:
        return table[first : first + layers].take(slots, axis=1)
    # The block stands at several depths of the chains that meet here.
    at = np.zeros(size, np.intp)
    at[: len(firsts)] = firsts
    return table[at + segment.kv_first + np.arange(layers)[:, None], slots]


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


def row_moves(
    batch: Batch, tables: Mapping[PageShape, np.ndarray], columns: int
) -> dict[int, list[RowMove]]:
    """What is read or written in front of each layer of a block.

    Args:
      batch: whose items stand at the block.
      tables: `KVCacheManager.tables`.
      columns: pages of the longest sequence.
    """
    found: dict[tuple[int, RowShape, str], np.ndarray] = {}
    for i, item in enumerate(batch.items if batch.bucket.q_len > 1 else ()):
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
