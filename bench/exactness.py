"""The token rule: whether two greedy runs said the same, or parted where two logits nearly tie."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from bench.run import Trace
from jblock.blocks.attention import Attention
from jblock.blocks.embedding import Embedding, Head
from jblock.blocks.ffn import Ffn
from jblock.blocks.platform import here
from jblock.blocks.rows import Rows
from jblock.blocks.spec import AttentionSpec, EmbeddingSpec, FfnSpec, NormSpec, UnembeddingSpec
from jblock.engine.programs.sampling import noise
from jblock.engine.weights import params as parameters
from jblock.pallas_kernels.paged_attention.reference import attention
from jblock.zoo.records import Chain

# Logits of a random 250M model differ by about this between batch sizes, in float32.
LOGIT_ERROR = 8e-6


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Greedy outputs of one workload, run twice.

    Attributes:
      requests: compared.
      identical: requests with equal tokens throughout.
      gaps: for each other one the reference's gap between its two best logits where they part.
    """

    requests: int
    identical: int
    gaps: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Counts, and whether every difference is within the rule."""
        return {
            "requests": self.requests,
            "identical": self.identical,
            "greatest_gap_where_they_part": max(self.gaps, default=0.0),
            "within_token_rule": all(gap < 10 * LOGIT_ERROR for gap in self.gaps),
        }


def compare(zoo: Any, reference: Sequence[Trace], other: Sequence[Trace]) -> Comparison:
    """Compares two runs of the same arrivals on chains of `zoo` (full models, no adapters)."""
    gaps = []
    for a, b in zip(reference, other, strict=True):
        if a.tokens != b.tokens:
            same = next(
                (i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y),
                min(len(a.tokens), len(b.tokens)),
            )
            context = (*a.arrival.prompt, *a.tokens[:same])
            gaps.append(logit_gap(zoo, zoo.served[a.arrival.model], context))
    return Comparison(len(reference), len(reference) - len(gaps), tuple(gaps))


def logit_gap(zoo: Any, chain: Chain, token_ids: Sequence[int]) -> float:
    """Gap between the two best next-token logits after `token_ids`."""
    best = jnp.sort(next_logits(zoo, chain, token_ids))[-2:]
    return float(best[1] - best[0])


def draw_gap(
    zoo: Any, chain: Chain, token_ids: Sequence[int], temperature: float, seed: int
) -> float:
    """The same for a draw: the gap, in logits, between the two tokens that came nearest to being drawn after
    `token_ids`."""
    logits = next_logits(zoo, chain, token_ids)
    ids = jnp.arange(logits.shape[0], dtype=jnp.int32)[None]
    seeds, positions = jnp.array([seed], jnp.uint32), jnp.array([len(token_ids)], jnp.int32)
    best = jnp.sort(logits / temperature + noise(seeds, positions, ids)[0])[-2:]
    return float(best[1] - best[0]) * temperature


def next_logits(zoo: Any, chain: Chain, token_ids: Sequence[int]) -> jnp.ndarray:
    """float32 [vocab]: logits of the token after `token_ids`, by a plain forward pass with no cache, no
    paging and no batch. Loads one component at a time."""
    count = len(token_ids)
    rows = Rows(
        num_seqs=1,
        q_len=count,
        starts=jnp.zeros(1, jnp.int32),
        q_lens=jnp.full(1, count, jnp.int32),
        slots=jnp.zeros(1, jnp.int32),
    )
    x = norm = logits = None
    for step in chain.steps:
        spec = zoo.component(step.component).spec
        tensors = parameters.prepare(spec, zoo.load_component(step.component), "float32", False)
        if isinstance(spec, EmbeddingSpec):
            embedding = Embedding(spec, tensors, "float32")
            x = embedding(jnp.asarray(token_ids, jnp.int32), rows.positions[0])
        elif isinstance(spec, AttentionSpec):

            def attend(q, k, v, spec=spec):
                options = (spec.sliding_window, spec.softcap, spec.scale)
                return jnp.asarray(attention(q[0], k[0], v[0], 0, *options))[None]

            x = Attention(spec, tensors, {})(x, rows, attend)
        elif isinstance(spec, FfnSpec):
            x = Ffn(spec, tensors, {})(x, rows)
        elif isinstance(spec, NormSpec):
            norm = spec, tensors
        elif isinstance(spec, UnembeddingSpec):
            logits = Head((norm[0], spec), (norm[1], tensors), here(), tied=False)(x[-1:])
        else:
            raise ValueError(f"a component of kind {spec.kind} is not of a dense model")
    assert logits is not None, "a chain without a head"
    return logits[0]
