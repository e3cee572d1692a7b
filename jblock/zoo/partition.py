"""Which runs of components are served as one block: derived from which chains use what.

A block is as long as it can be while every chain that uses one of its components uses all of them,
in that order. Longer blocks mean fewer hand-overs; cutting there and only there loses no sharing.
Joined steps (a router and its experts) are never cut apart: chains share them together or not at all.
A delta never cuts: its rows ride on the component that all its neighbours share.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from jblock.zoo.records import Chain

Joined = tuple[str, ...]
"""Component ids that are never cut apart; mostly one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A run of consecutive steps of a chain.

    Attributes:
      components: component ids, in order. Blocks of two chains with equal ids are the same block.
      first: index of its first step in the chain.
    """

    components: tuple[str, ...]
    first: int


def blocks(chains: Mapping[str, Chain]) -> dict[str, tuple[Block, ...]]:
    """Cuts each chain into blocks, given all chains that are served together.

    The embedding is a block of its own, and the final norm with the unembedding always one (the
    head, which the engine runs apart from the layers). Between them, two neighbours are joined if
    each is always next to the other, in every chain.

    Args:
      chains: any key (a name, or name@version) -> chain.

    Returns:
      The same keys -> blocks, which follow each other and cover the chain's steps exactly.
    """
    before: dict[Joined, set[Joined | None]] = defaultdict(set)
    after: dict[Joined, set[Joined | None]] = defaultdict(set)
    for chain in chains.values():
        # None stands for the embedding or the head: no run goes on past them.
        layers: list[Joined | None] = [None, *_layers(chain), None]
        for left, right in itertools.pairwise(layers):
            if right is not None:
                before[right].add(left)
            if left is not None:
                after[left].add(right)
    cut = {}
    for key, chain in chains.items():
        joined: list[list[Joined]] = []
        for part in _layers(chain):
            last = joined[-1][-1] if joined else None
            if last is not None and after[last] == {part} and before[part] == {last}:
                joined[-1].append(part)
            else:
                joined.append([part])
        ids = [step.component for step in chain.steps]
        between = [[i for part in run for i in part] for run in joined]
        runs = [run for run in (ids[:1], *between, ids[1:][-2:]) if run]
        out, first = [], 0
        for run in runs:
            out.append(Block(components=tuple(run), first=first))
            first += len(run)
        cut[key] = tuple(out)
    return cut


def to_json(cut: Mapping[str, tuple[Block, ...]]) -> dict[str, Any]:
    """Plain JSON of a partition, as the zoo keeps it in partition/current.json."""
    return {
        key: [{"first": b.first, "components": list(b.components)} for b in run]
        for key, run in sorted(cut.items())
    }


def _layers(chain: Chain) -> list[Joined]:
    parts: list[Joined] = []
    for step in chain.steps[1:-2]:
        if step.joined and parts:
            parts[-1] += (step.component,)
        else:
            parts.append((step.component,))
    return parts
