"""From logits to tokens on their way from the device."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jblock.engine.config import Bucket
from jblock.engine.graph.graph import Layer
from jblock.engine.programs import needed
from jblock.engine.programs.executables import Executables
from jblock.engine.programs.keys import ProgramKey
from jblock.engine.programs.penalties import count_row
from jblock.engine.runner import batch as batching
from jblock.engine.runner.batch import Batch
from jblock.engine.runner.state import DeviceState


@dataclasses.dataclass(frozen=True)
class Read:
    """What came of a batch, row by row: as of `Sampled`, on the host.

    Attributes:
      tokens: picked.
      logprobs: of these.
      finite: 1 where all logits were finite.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    finite: Sequence[int]
    top: np.ndarray | None
    scores: np.ndarray | None
    pooled: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Tokens on their way from the device.

    Attributes:
      batch: whose.
      packed: int32 [S, 3] as sampling.py describes.
      top: int32 [S, 2K] as `top_logprobs` describes, if a row wants it.
      scores: int32 [S, Q, 3] as `prompt_logprobs_program` describes, if a row wants it.
      pooled: float32 [S, 2, hidden_size] as `pooling_program` describes, if a row wants it.
    """

    batch: Batch
    packed: jax.Array
    top: jax.Array | None = None
    scores: jax.Array | None = None
    pooled: jax.Array | None = None

    def read(self) -> Read:
        """Waits for it."""
        packed = np.asarray(self.packed)
        extras = (self.top, self.scores, self.pooled)
        return Read(
            packed[:, 0].tolist(),
            packed[:, 1].view(np.float32).tolist(),
            packed[:, 2].tolist(),
            *[None if array is None else np.asarray(array) for array in extras],
        )


@dataclasses.dataclass(frozen=True)
class Logits:
    """Of a batch with rows that keep to grammars, to be sampled once it is known what each may go on with.

    Attributes:
      batch: whose.
      logits: float32 [S, vocab].
      meta: int32 [S, 4], the leading columns of the batch's index array.
      scores: as of `Sampled`.
      pooled: as of `Sampled`.
    """

    batch: Batch
    logits: jax.Array
    meta: jax.Array
    scores: jax.Array | None = None
    pooled: jax.Array | None = None


class Sampler:
    """Picks tokens; what no row of a batch asks for is not run."""

    def __init__(self, state: DeviceState, executables: Executables):
        self._state, self._executables = state, executables
        self._programs: dict[tuple[str, int, int], Any] = {}
        self._heads: dict[tuple[Layer, Bucket], Any] = {}
        self._version = -1

    def run_head(self, layer: Layer, program: Any, index: Any, batch: Batch) -> Sampled | Logits:
        """Enqueues a head and sampling, by the programs that its batch asks for. Where that is the best
        tokens alone, one does both as soon as it is compiled.

        Args:
          layer: the head.
          program: of it.
          index: the batch's, on the device.
          batch: whose.
        """
        state, registers = self._state, self._state.registers[layer.width]
        both = self._greedy_head(layer, batch.bucket) if batch.is_plain else None
        if both is not None:
            state.last_tokens, packed = both(
                layer.params, layer.tables, registers, state.last_tokens, index
            )
            return Sampled(batch, packed)
        logits, meta = program(layer.params, layer.tables, registers, index)
        sampled: Sampled | Logits = Logits(batch, logits, meta)
        if not batch.is_constrained:
            sampled = self.sample(logits, meta, batch)
        if batch.scores:
            program = self._executables.get(needed.scoring_key(layer, batch.bucket))
            targets = state.put(batching.target_array(batch))
            scores = program(layer.params, layer.tables, registers, index, targets)
            sampled = dataclasses.replace(sampled, scores=scores)
        if batch.pools:
            program = self._executables.get(needed.pooling_key(layer, batch.bucket))
            firsts = state.put(batching.first_array(batch))
            pooled = program(layer.params, layer.tables, registers, index, firsts)
            sampled = dataclasses.replace(sampled, pooled=pooled)
        return sampled

    def _greedy_head(self, layer: Layer, bucket: Bucket) -> Any | None:
        """The program that runs a head and picks the best tokens; None where it is not compiled."""
        self._look()
        program = self._heads.get((layer, bucket), False)
        if program is False:
            key = needed.greedy_head_key(layer, bucket)
            program = self._executables.get(key) if key in self._executables else None
            self._heads[layer, bucket] = program
        return program

    def _look(self) -> None:
        """Forgets what was looked up before programs were added."""
        if self._version != self._executables.version:
            self._version = self._executables.version
            self._programs.clear()
            self._heads.clear()

    def sample(
        self, logits: jax.Array, meta: jax.Array, batch: Batch, masked: bool = False
    ) -> Sampled:
        """Enqueues sampling of one token a sequence.

        Args:
          logits: float32 [S, vocab].
          meta: int32 [S, 4], the leading columns of the batch's index array.
          batch: whose.
          masked: some rows keep to grammars, whose masks are there.
        """
        state = self._state
        adjusted = logits
        if masked:
            masks = state.put(batching.mask_array(batch, logits.shape[1]))
            adjusted, meta = self.program("constrain", logits)(logits, meta, masks)
        if batch.adjusts_logits:
            adjusted = self._adjust(adjusted, meta, batch)
        greedy = batch.is_greedy
        program = self.program("greedy" if greedy else "sampled", logits)
        options = () if greedy else (state.put(batch.options),)
        state.last_tokens, packed = program(logits, adjusted, state.last_tokens, meta, *options)
        top = None
        if batch.wants_top:
            top = self.program("top_logprobs", logits)(logits)
        return Sampled(batch, packed, top)

    def program(self, kind: str, logits: jax.Array) -> Any:
        """A program that works on logits of this shape."""
        size, vocab = logits.shape
        self._look()
        program = self._programs.get((kind, size, vocab))
        if program is None:
            key = ProgramKey(kind=kind, bucket=Bucket(size, 1), vocab_size=vocab)
            program = self._programs[kind, size, vocab] = self._executables.get(key)
        return program

    def _adjust(self, logits: jax.Array, meta: jax.Array, batch: Batch) -> jax.Array:
        """Logits with biases and penalties; sequences that begin here, or whose last token comes from the
        host, bring their counts."""
        state, vocab = self._state, logits.shape[1]
        counts = state.counts.pop(vocab, None)
        if counts is None:
            counts = state.zeros((self._executables.geometry.max_num_seqs, vocab), jnp.int32)
        for item in batch.items:
            sequence = item.sequence
            begins = item.of_prompt or (item.tokens and sequence.has_penalties)
            if begins and sequence.adjusts_logits and not item.is_draft:
                row = count_row(sequence.request.token_ids, sequence.generated, vocab)
                slot = np.array([sequence.seq_slot], np.int32)
                program = self._executables.get(ProgramKey(kind="set_counts", vocab_size=vocab))
                counts = program(counts, state.put(slot), self._executables.placement.put(row))
        controls = state.put(batching.control_array(batch))
        program = self.program("adjust", logits)
        adjusted, state.counts[vocab] = program(logits, counts, state.last_tokens, meta, controls)
        return adjusted
