"""How layers of a block are joined in segments that one program runs."""

import collections
from collections.abc import Sequence

from jblock.engine.graph.graph import Layer, Segment
from jblock.engine.kv_cache.spec import KVShape


def segments(layers: Sequence[Layer], most: int) -> tuple[Segment, ...]:
    """Runs of layers that one program may carry: of `most` components at most, or one layer."""
    runs: list[list[Layer]] = []
    for layer in layers:
        shapes = {u.kv_shape for u in [*runs[-1], layer]} - {None} if runs else set()
        joins = (
            bool(runs)
            and layer.signature.kind == runs[-1][-1].signature.kind == "layer"
            and len(shapes) < 2
            and sum(len(u.signature.specs) for u in [*runs[-1], layer]) <= most
        )
        if joins:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    seen: collections.Counter[KVShape] = collections.Counter()
    found: list[Segment] = []
    stitches = 0
    for run in runs:
        shape = next((layer.kv_shape for layer in run if layer.kv_shape), None)
        count = sum(len(layer.signature.attentions) for layer in run)
        found.append(Segment(tuple(run), shape, seen[shape] if shape else 0, count, stitches))
        stitches += run[0].signature.kind == "stitch"
        if shape:
            seen[shape] += count
    return tuple(found)
