"""What names the content of the KV pages of a chain."""

import dataclasses
from collections.abc import Sequence

from jblock.blocks.spec import AttentionSpec
from jblock.engine.graph.span_placement import Layout
from jblock.engine.kv_cache.prefix_keys import layer_digests
from jblock.engine.kv_cache.sequence_pages import LayerDigests
from jblock.engine.kv_cache.spec import KVShape
from jblock.engine.weights.needs import Part
from jblock.zoo.records import Chain


def kv_digests(chain: Chain, layout: Layout, parts: Sequence[Part]) -> LayerDigests:
    """Of the attentions that lie here: what decides their pages is all of the chain below.

    Args:
      chain: all of it.
      layout: which of its steps lie here.
      parts: those.
    """
    here = [i for i in range(len(chain.steps)) if layout.is_here(i)]
    at = {i: p.spec for i, p in zip(here, parts, strict=True) if isinstance(p.spec, AttentionSpec)}
    out: dict[KVShape, list[bytes]] = {}
    for spec, digest in zip(at.values(), layer_digests(chain.steps, at), strict=True):
        out.setdefault(KVShape.of(spec), []).append(digest)
    return {shape: tuple(digests) for shape, digests in out.items()}


def plain_digests(chain: Chain, layout: Layout, parts: Sequence[Part]) -> LayerDigests | None:
    """The same before an activated LoRA acts: its base's. None for other chains."""
    if not chain.invocation:
        return None
    steps = tuple(dataclasses.replace(step, deltas=()) for step in chain.steps)
    return kv_digests(dataclasses.replace(chain, steps=steps), layout, parts)
