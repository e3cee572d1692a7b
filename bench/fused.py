"""The rival of blocks: one whole decode step of one model as a single XLA program.

Made of the same modules and the same paged attention as the blocks, over the same weights; the
hidden rows never leave the program, KV pages and last tokens are donated.
"""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jblock.blocks.attention import Attention
from jblock.blocks.embedding import Embedding, Head
from jblock.blocks.ffn import Ffn
from jblock.blocks.platform import here
from jblock.blocks.rows import Rows
from jblock.blocks.spec import AttentionSpec, EmbeddingSpec, FfnSpec, NormSpec, UnembeddingSpec
from jblock.engine.graph.graph import Route
from jblock.pallas_kernels.paged_attention.api import abstract_pages, paged_attention
from jblock.pallas_kernels.paged_attention.ragged import Ragged


class FusedDecode:
    """Decodes `num_seqs` sequences of one chain, all of them at every step.

    Like the engine it enqueues a step before it reads the tokens of the one before.
    """

    def __init__(
        self,
        route: Route,
        num_seqs: int,
        page_size: int,
        max_len: int,
        kv_dtype: str = "float32",
    ):
        """Compiles the step.

        Args:
          route: the chain, resident on an agent; its weights are used in place.
          num_seqs: rows of the step.
          page_size: tokens of a KV page.
          max_len: tokens the pages of one sequence hold.
          kv_dtype: of the pages.
        """
        units = [u for i in route.instances for u in i.layers]
        self._specs = tuple(s for u in units for s in u.signature.specs)
        self._params = tuple(p for u in units for p in u.params)
        self._tied = units[-1].signature.tied
        self.num_seqs, self._max_pages = num_seqs, -(-max_len // page_size)
        attentions = [s for s in self._specs if isinstance(s, AttentionSpec)]
        self._pools = tuple(
            tuple(
                jnp.zeros(a.shape, a.dtype)
                for a in abstract_pages(
                    1 + num_seqs * self._max_pages,
                    page_size,
                    s.num_kv_heads,
                    s.head_dim,
                    dtype=kv_dtype,
                )
            )
            for s in attentions
        )
        table = 1 + np.arange(num_seqs * self._max_pages, dtype=np.int32)
        self._page_table = jax.device_put(table.reshape(num_seqs, self._max_pages))
        self._tokens = jnp.zeros((num_seqs,), jnp.int32)
        self._limit = self._max_pages * page_size
        self.position = 0
        self._packed: jax.Array | None = None
        starts = jax.device_put(np.zeros(num_seqs, np.int32))
        self._program = (
            jax.jit(self._decode, donate_argnums=(1, 2))
            .lower(self._params, self._pools, self._tokens, starts, self._page_table)
            .compile()
        )

    def steps(self, count: int) -> float:
        """Seconds of `count` whole steps, from idle to idle device."""
        begin = time.perf_counter()
        for _ in range(count):
            previous = self._packed
            self._enqueue()
            if previous is not None:
                np.asarray(previous)
        jax.block_until_ready(self._packed)
        return time.perf_counter() - begin

    def lone_step(self) -> tuple[float, float]:
        """One step with nothing overlapped: seconds until enqueued, seconds until its tokens were
        ready."""
        begin = time.perf_counter()
        self._enqueue()
        enqueued = time.perf_counter()
        jax.block_until_ready(self._packed)
        return enqueued - begin, time.perf_counter() - begin

    def _enqueue(self) -> None:
        if self.position >= self._limit:
            raise ValueError(f"position {self.position} is past the {self._limit} tokens held")
        starts = jax.device_put(np.full(self.num_seqs, self.position, np.int32))
        self._pools, self._tokens, self._packed = self._program(
            self._params, self._pools, self._tokens, starts, self._page_table
        )
        self.position += 1

    def _decode(self, params: Sequence, pools, tokens, starts, page_table):
        rows = Rows(
            num_seqs=self.num_seqs,
            q_len=1,
            starts=starts,
            q_lens=jnp.ones(self.num_seqs, jnp.int32),
            slots=jnp.zeros(self.num_seqs, jnp.int32),
        )
        ragged = Ragged.grid(starts, rows.q_lens, page_table, rows.q_len)
        x = logits = None
        updated: list = []
        norm: tuple | None = None
        for spec, tensors in zip(self._specs, params, strict=True):
            if isinstance(spec, EmbeddingSpec):
                x = Embedding(spec, tensors, "float32")(tokens, starts)
            elif isinstance(spec, AttentionSpec):
                pages = pools[len(updated)]

                def attend(q, k, v, pages=pages, window=spec.sliding_window):
                    q, k, v = rows.flat(q), rows.flat(k), rows.flat(v)
                    out, new = paged_attention(q, k, v, pages, ragged, sliding_window=window)
                    updated.append(new)
                    return rows.by_sequence(out)

                x = Attention(spec, tensors, {})(x, rows, attend)
            elif isinstance(spec, FfnSpec):
                x = Ffn(spec, tensors, {})(x, rows)
            elif isinstance(spec, NormSpec):
                norm = spec, tensors
            elif isinstance(spec, UnembeddingSpec) and norm is not None:
                logits = Head((norm[0], spec), (norm[1], tensors), here(), tied=self._tied)(x)
        if logits is None:
            raise ValueError("a chain to fuse ends with a norm and an unembedding")
        return tuple(updated), *_greedy(logits)


def _greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Best tokens int32 [S], and what the host reads of a step, as the engine's sampler packs it:
    token, log-probability, all logits finite."""
    tokens = jnp.argmax(logits, axis=1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=1)
    finite = jnp.isfinite(logits).all(axis=1).astype(jnp.int32)
    bits = jax.lax.bitcast_convert_type(logprobs, jnp.int32)
    return tokens, jnp.stack([tokens, bits, finite], axis=1)
