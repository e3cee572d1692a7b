"""Where chains part: the places at which the rows of a trunk are worth keeping."""

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence

from jblock.engine.graph.graph import Stage
from jblock.engine.kv_cache.sequence_pages import Boundary
from jblock.engine.kv_cache.spec import KVShape, RowShape

# Places of one chain at which rows are kept. Each takes the memory of a layer's keys and values or two.
MOST_BOUNDARIES = 2


def partings(chains: Iterable[Sequence[bytes]]) -> dict[bytes, int]:
    """The beginnings with which chains go on differently, and how many chains have each.

    Args:
      chains: `step_digests` of each.
    """
    following: dict[bytes, set[bytes]] = collections.defaultdict(set)
    passing: collections.Counter[bytes] = collections.Counter()
    for digests in chains:
        passing.update(digests)
        for here, after in itertools.pairwise(digests):
            following[here].add(after)
    return {here: passing[here] for here, after in following.items() if len(after) > 1}


def boundaries(
    stages: Sequence[Stage], digests: Sequence[bytes], parting: Mapping[bytes, int]
) -> tuple[Boundary, ...]:
    """The boundaries of a chain, the lowest first: in front of the layers in which others leave it, those
    that save most where there are many.

    Args:
      stages: of its route.
      digests: of its first 0, 1, ... steps.
      parting: of all chains that are served together.
    """
    parts = [at for at, digest in enumerate(digests) if digest in parting]
    below: collections.Counter[KVShape] = collections.Counter()
    found: list[tuple[int, Boundary]] = []
    at = 0
    for number, stage in enumerate(stages):
        for index, layer in enumerate(stage.instance.layers):
            steps = range(at, at + len(layer.signature.specs))
            users = [parting[digests[i]] for i in parts if i in steps]
            if users and below and layer.kind in ("layer", "stitch"):
                shape = RowShape(layer.width)
                boundary = Boundary(number, index, shape, digests[at], dict(below))
                found.append((max(users) * below.total(), boundary))
            at = steps.stop
            below.update(KVShape.of(spec) for spec in layer.signature.attentions)
    found = [(saved, b) for saved, b in found if sum(b.below.values()) < below.total()]
    best = sorted(found, key=lambda f: f[0], reverse=True)[:MOST_BOUNDARIES]
    return tuple(sorted((b for _, b in best), key=lambda b: (b.stage, b.layer)))
