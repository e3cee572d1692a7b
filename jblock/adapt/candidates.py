"""Components that may replace others, by their parameters: the most used ones of those that are alike.

Parameters only nominate. What counts is what comes out (`substitution.py`).
"""

import concurrent.futures
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from jblock.adapt import sketch
from jblock.zoo.records import Chain, ComponentRecord
from jblock.zoo.store import Zoo

COUNTERPARTS = 3  # of a component, at most: the one that is most alike may still be the wrong one
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
      cosine: of all parameters as one vector; of their sketches where it is not the component's first
        counterpart.
      cosines: of each tensor, if all parameters were compared.
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
        uses = [len(used[record.id]) for record in records]
        pairs = sketch.alike(read_sketches(zoo, records), least, uses)
        alike += len(pairs)
        # In full each is compared with its first counterpart alone: that is what reads all bytes.
        by_target: dict[int, list[int]] = defaultdict(list)
        seen: set[int] = set()
        for row, other, cosine in sketch.counterparts(pairs, uses, COUNTERPARTS):
            if row not in seen:
                by_target[other].append(row)
                seen.add(row)
                continue
            found.append(
                Candidate(
                    original=records[row].id,
                    substitute=records[other].id,
                    nbytes=records[row].nbytes,
                    cosine=cosine,
                    cosines={},
                )
            )
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
