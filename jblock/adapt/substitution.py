"""Components that may replace others: candidates by their parameters, then what they cost in place.

Parameters only nominate. What counts is measured end to end: the candidate in its place in the chain, on
probe data, beside the chain as it is.
"""

import concurrent.futures
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jblock.adapt import forward, metrics, sketch
from jblock.adapt.probe import ProbeData
from jblock.zoo.acceptance import AcceptancePolicy, violations
from jblock.zoo.edge_records import Edge, Score, versions
from jblock.zoo.records import Chain, ComponentRecord, Step
from jblock.zoo.store import Zoo

_THREADS = 2  # components compared at a time, each with a copy in memory
_READERS = 8  # sketches read at a time: many short reads, for which the disk is waited for
_AHEAD = 4  # components that the kernel reads meanwhile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """Two components of one spec with parameters that point the same way.

    Attributes:
      original: id of the one that would be replaced.
      substitute: id of the one that would take its place; at least as many chains use it.
      nbytes: of the original.
      cosine: of all parameters as one vector.
      cosines: of each tensor.
    """

    original: str
    substitute: str
    nbytes: int
    cosine: float
    cosines: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What a search looked at.

    Attributes:
      components: how many components were sketched.
      alike: pairs whose sketches are alike.
      candidates: pairs that were compared in full and are alike, most alike first.
    """

    components: int
    alike: int
    candidates: tuple[Candidate, ...]


def users(chains: Mapping[str, Chain]) -> dict[str, set[str]]:
    """Component id -> names of the chains that use it."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, chain in chains.items():
        for step in chain.steps:
            found[step.component].add(name)
    return found


def search(
    zoo: Zoo,
    used: Mapping[str, set[str]],
    least: float,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> Search:
    """Finds components that are alike, among those in `used`.

    Args:
      zoo: where they lie.
      used: component id -> who uses it; those most used replace the others.
      least: smallest cosine of all parameters.
      on_bytes: called with the bytes of what was read.

    Raises:
      ZooError: a component is damaged.
    """
    groups: dict[str, list[ComponentRecord]] = defaultdict(list)
    for id_ in used:
        record = zoo.component(id_)
        if record.tensors:
            groups[sketch.group(record)].append(record)
    count = alike = 0
    found = []
    for records in groups.values():
        count += len(records)
        if len(records) < 2:
            continue
        sketches = read_sketches(zoo, records)
        pairs = sketch.alike(sketches, least)
        alike += len(pairs)
        order = sorted(range(len(records)), key=lambda i: (-len(used[records[i].id]), i))
        by_target: dict[int, list[int]] = defaultdict(list)
        for row, other, _ in sketch.nearest(order, pairs):
            by_target[other].append(row)
        ahead = _Prefetcher(
            zoo, [records[i].id for o, rows in by_target.items() for i in (o, *rows)]
        )
        for other, rows in by_target.items():
            target = sketch.Reference(zoo.load_component(records[other].id))
            ahead.advance()
            for record, cosines in _compare(zoo, [records[i] for i in rows], target, ahead):
                on_bytes(record.nbytes)
                whole = cosines.pop("")
                if whole >= least:
                    found.append(
                        Candidate(
                            original=record.id,
                            substitute=records[other].id,
                            nbytes=record.nbytes,
                            cosine=whole,
                            cosines=cosines,
                        )
                    )
    found.sort(key=lambda c: -c.cosine)
    return Search(components=count, alike=alike, candidates=tuple(found))


def read_sketches(zoo: Zoo, records: Sequence[ComponentRecord]) -> np.ndarray:
    """float32 [records, n]: the sketches of components of one group."""
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return np.stack(list(pool.map(lambda record: sketch.sketch(zoo, record), records)))


class _Prefetcher:
    """Has the kernel read components that will be loaded soon, a few before their turn."""

    def __init__(self, zoo: Zoo, order: Sequence[str]):
        self._zoo, self._rest = zoo, iter(order)
        for _ in range(_AHEAD):
            self.advance()

    def advance(self) -> None:
        """Called when one of them was loaded."""
        id_ = next(self._rest, None)
        if id_ is not None:
            self._zoo.prefetch(id_)


def _compare(
    zoo: Zoo, records: Sequence[ComponentRecord], target: sketch.Reference, ahead: _Prefetcher
) -> Iterator[tuple[ComponentRecord, dict[str, float]]]:
    """Cosines of some components with one, reading the next while one is compared."""

    def one(record: ComponentRecord) -> tuple[ComponentRecord, dict[str, float]]:
        tensors = zoo.load_component(record.id)
        ahead.advance()
        return record, sketch.cosine(tensors, target)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(one, records)


class ChainEvaluator:
    """One chain on its probe: what changes of its steps cost, end to end.

    Attributes:
      chain: as it is.
      data: what it is measured on.
      original: what the chain makes of it.
    """

    def __init__(self, zoo: Zoo, chain: Chain, data: ProbeData, lowest: int = 1):
        """Runs the chain as it is. Steps below `lowest` are run only here, if none of them is changed."""
        self._zoo, self.chain, self.data = zoo, chain, data
        self._weights = forward.load(zoo, chain.steps)
        self._below = metrics.below(self._weights, data, max(1, lowest))
        self.original = metrics.outputs(self._weights, data, self._below)

    def measure(self, change: Mapping[int, Step]) -> dict[str, Score]:
        """Scores of the chain with other steps at some places, all of them at once.

        `parameter_cosine` is that of the replaced components as one vector.
        """
        weights = self._weights
        sums = np.zeros(3)
        for at, step in change.items():
            by = forward.load(self._zoo, [step])
            for name, value in by.tensors[0].items():
                a, b = (np.asarray(v).reshape(-1) for v in (self._weights.tensors[at][name], value))
                sums += (a @ b, a @ a, b @ b)
            weights = weights.replaced(at, 1, by)
        cosine = Score(value=float(sums[0] / max(np.sqrt(sums[1] * sums[2]), 1e-30)))
        # A changed embedding leaves nothing to go on from.
        known = self._below if min(change) >= self._below.count else None
        outputs = metrics.outputs(weights, self.data, known)
        found = metrics.scores(self.original, outputs)
        return {"parameter_cosine": cosine, **found}

    def edge(
        self, change: Mapping[int, Step], scores: Mapping[str, Score], provenance: Mapping[str, Any]
    ) -> Edge:
        """The edge that says so: from the first changed step to the last."""
        first, last = min(change), max(change) + 1
        steps = self.chain.steps
        return Edge(
            kind="equivalent",
            original=steps[first:last],
            substitute=tuple(change.get(i, steps[i]) for i in range(first, last)),
            scores=scores,
            chain=f"{self.chain.name}@{self.chain.version}",
            probe=self.data.record,
            provenance=provenance,
            versions=versions(),
        )


def places(chain: Chain, candidates: Sequence[Candidate]) -> dict[int, Step]:
    """Step index -> what may stand there. Adapted steps stay: an adapter was trained on its own base."""
    by_original = {c.original: c for c in candidates}
    return {
        at: dataclasses.replace(step, component=by_original[step.component].substitute)
        for at, step in enumerate(chain.steps)
        if step.component in by_original and not step.deltas
    }


def runs(changes: Mapping[int, Step]) -> list[dict[int, Step]]:
    """Changes of neighbouring steps taken together: blocks that could be shared as a whole."""
    found: list[dict[int, Step]] = []
    for at, step in sorted(changes.items()):
        if found and at - 1 in found[-1]:
            found[-1][at] = step
        else:
            found.append({at: step})
    return [run for run in found if len(run) > 1]


def recommend(
    bench: ChainEvaluator,
    edges: Mapping[int, Edge],
    accepted: AcceptancePolicy,
    on_done: Callable[[], object] = lambda: None,
) -> tuple[dict[int, Step], dict[str, Score]]:
    """The largest set of changes found whose cost together is still accepted.

    Costs add up, so usable changes are tried one upon the other, the least costly first, and each is kept
    only if all of them together pass.

    Args:
      bench: of the chain.
      edges: step index -> the edge measured for a change there.
      accepted: by the operator.
      on_done: called after each measurement.

    Returns:
      The changes, and their scores together; empty if none is usable.
    """
    usable = {at: e for at, e in edges.items() if not violations(e, accepted)}
    kept: dict[int, Step] = {}
    scores: dict[str, Score] = {}
    for at, edge in sorted(usable.items(), key=lambda item: item[1].scores["kl"].value):
        trial = {**kept, at: edge.substitute[0]}
        measured = edge.scores if not kept else bench.measure(trial)
        if not violations(bench.edge(trial, measured, {}), accepted):
            kept, scores = trial, dict(measured)
        on_done()
    return kept, scores


def changed(
    chain: Chain, change: Mapping[int, Step], name: str, derived: Mapping[str, Any]
) -> Chain:
    """A chain of its own with other steps; `near`, so it is served only to who accepts that."""
    steps = [change.get(i, step) for i, step in enumerate(chain.steps)]
    return chain.derive(name, steps, ("near",), derived)


def freed(zoo: Zoo, chains: Mapping[str, Chain], changes: Mapping[str, Mapping[int, Step]]) -> int:
    """Bytes of components that no chain uses any more once `changes` (chain name -> changes) are made."""
    before = set(users(chains))
    after: set[str] = set()
    for name, chain in chains.items():
        change = changes.get(name, {})
        after |= {change.get(i, s).component for i, s in enumerate(chain.steps)}
    gone = before - after
    # What a tied tensor refers to stays with it.
    for id_ in after:
        gone -= {owner for owner, _ in zoo.component(id_).refs.values()}
    return sum(zoo.component(id_).nbytes for id_ in gone)
