"""How long a step of decoding takes at least on a chip, from what must be moved and computed.

An estimate, not a measurement: the larger of bytes over the chip's bandwidth and FLOPs over its bf16 rate,
unit after unit, and the sums over devices at the rate of their links (the roofline model, Williams et
al., doi 10.1145/1498765.1498785). Bytes and FLOPs are counted from the programs' own tensors, not taken from
XLA's cost analysis, which counts a loop once and nothing inside a kernel.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax

from jblock.blocks.spec import AttentionSpec, EmbeddingSpec, ExpertSpec, RouterSpec
from jblock.engine.signature import Signature
from jblock.engine.weights.params import abstract_params
from jblock.parallel.placement import Placement
from jblock.parallel.targets import Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """One step of decoding at least.

    Attributes:
      batch: sequences.
      context: tokens each has cached.
      weight_bytes: of weights that are read, on all chips together.
      kv_bytes: of cached keys and values that are read.
      flops: done.
      link_bytes: what each chip sends to others.
      seconds: of the step.
    """

    batch: int
    context: int
    weight_bytes: int
    kv_bytes: int
    flops: int
    link_bytes: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch / self.seconds


def decode_step(
    signatures: Sequence[Signature],
    placement: Placement,
    chip: Chip,
    *,
    batch: int,
    context: int,
    kv_item: float,
) -> Estimate:
    """A step of one chain, without adapters.

    Args:
      signatures: of its units, in order.
      placement: the chips.
      chip: what one has.
      batch: sequences.
      context: tokens each has cached.
      kv_item: bytes of one cached value, its share of a scale included.
    """
    chips = placement.rules.mesh.size
    totals = [0, 0, 0, 0]
    seconds = 0.0
    for signature in signatures:
        weights, flops = _weights(signature, placement, batch)
        kv = 0
        for spec in signature.attentions:
            seen = min(context, spec.sliding_window or context)
            kv += int(batch * seen * 2 * spec.num_kv_heads * spec.head_dim * kv_item)
            flops += 4 * batch * seen * spec.num_heads * spec.head_dim
        sent = _sums(signature) * _all_reduce_bytes(signature, placement, batch)
        link = sent / chip.link
        seconds += max((weights + kv) / chips / chip.bandwidth, flops / chips / chip.flops) + link
        totals = [a + b for a, b in zip(totals, (weights, kv, flops, int(sent)), strict=True)]
    return Estimate(
        batch=batch,
        context=context,
        weight_bytes=totals[0],
        kv_bytes=totals[1],
        flops=totals[2],
        link_bytes=totals[3],
        seconds=seconds,
    )


def _weights(signature: Signature, placement: Placement, batch: int) -> tuple[int, int]:
    """(bytes, FLOPs) of a unit's weights: an embedding reads the rows of its tokens, a mixture the
    experts that even routing reaches on average."""
    nbytes = flops = 0
    reached = share = 1.0
    parameters = abstract_params(signature, placement)
    for (index, *_), tensors in zip(signature.arguments, parameters, strict=True):
        spec = signature.specs[index]
        sizes = [a.size for a in tensors.values()]
        held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tensors))
        if isinstance(spec, RouterSpec):
            share = spec.top_k / spec.num_experts
            reached = 1 - (1 - share) ** batch
        if isinstance(spec, EmbeddingSpec):
            nbytes += min(held, batch * spec.hidden_size * 4)
        elif isinstance(spec, ExpertSpec):
            nbytes += math.ceil(held * reached)
            flops += math.ceil(2 * batch * sum(sizes) * share)
        else:
            nbytes += held
            flops += 2 * batch * sum(sizes)
    return nbytes, flops


def _sums(signature: Signature) -> int:
    """Sums over the devices in a unit; a head's gather of the logits counts as half of one."""
    if signature.kind != "layer":
        return 1
    return sum(isinstance(s, AttentionSpec) or s.kind in ("ffn", "router") for s in signature.specs)


def _all_reduce_bytes(signature: Signature, placement: Placement, batch: int) -> float:
    """What a chip sends for one sum of float32 rows in a ring: 2 (n - 1) / n of them."""
    ways = placement.rules.ways("heads")
    width: float = signature.hidden_size
    if signature.kind == "head":
        width = getattr(signature.specs[-1], "vocab_size", width) / 2
    return 2 * (ways - 1) / ways * batch * width * 4
