"""Which runs of components are served as one block: derived from which chains use what.

A block is as long as it can be while every chain that uses one of its components uses all of them,
in that order. Longer blocks mean fewer hand-overs; cutting there and only there loses no sharing.
With a `Cost` a run is shared only where that saves more time than the hand-overs around it take.
A later model that shares part of a run cuts it anew: that rewrites the record, no component or chain.
Joined steps (a router and its experts) are never cut apart: chains share them together or not at all.
A delta never cuts: its rows ride on the component that all its neighbors share.
"""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from jblock.zoo.records import Chain

Run = tuple[str, ...]
"""Component ids served as one block."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a cut costs and what sharing saves, in a decoding step in which every chain has rows.

    Decoding reads all weights once a batch, so k chains that share a run read it once instead of k
    times; every cut hands rows over once more a chain.

    Attributes:
      hop_seconds: one more call of a block.
      bytes_per_second: at which weights are read.
      nbytes: bytes of every component, by id.
    """

    hop_seconds: float
    bytes_per_second: float
    nbytes: Mapping[str, int]

    def gain(self, run: Iterable[str], users: int) -> float:
        """Seconds a step that `users` chains save by sharing the components of `run`."""
        return (users - 1) * sum(self.nbytes[i] for i in run) / self.bytes_per_second


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BlockPlan:
    """Which runs of components are blocks, for chains that are served together. The engine, the converter's
    `plan` and `inspect`, and placement read this one record; nothing else decides where blocks are cut.

    Attributes:
      blocks: of each chain, by the key it was planned under; they follow each other and cover its steps.
      cost: what a cut was held to cost; None: all sharing is kept.
    """

    blocks: Mapping[str, tuple[Block, ...]]
    cost: Cost | None = None

    @functools.cached_property
    def users(self) -> Mapping[Run, tuple[str, ...]]:
        """The chains that use each block, by its components."""
        found: dict[Run, dict[str, None]] = defaultdict(dict)
        for key, run in self.blocks.items():
            for block in run:
                found[block.components][key] = None
        return {run: tuple(keys) for run, keys in found.items()}

    def recut(self, before: "BlockPlan") -> list[str]:
        """Chains of an earlier plan whose blocks are others in this one."""
        return [k for k, run in before.blocks.items() if self.blocks.get(k, run) != run]


def plan_blocks(chains: Mapping[str, Chain], cost: Cost | None = None) -> BlockPlan:
    """Cuts each chain into blocks, given all chains that are served together.

    The embedding is a block of its own, and the final norm with the unembedding always one (the
    head, which the engine runs apart from the layers). Between them, two neighbors are joined if
    each is always next to the other, in every chain.

    Args:
      chains: any key (a name, or name@version) -> chain.
      cost: what decides whether a shared run is worth its cuts; None: all sharing is kept.
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
    runs_of = {key: _runs(chain, before, after) for key, chain in chains.items()}
    if cost is not None:
        runs_of = _merge(runs_of, unshared(runs_of, cost))
    cut = {key: _blocks(chain, runs_of[key]) for key, chain in chains.items()}
    return BlockPlan(blocks=cut, cost=cost)


def unshared(runs_of: Mapping[str, Sequence[Run]], cost: Cost) -> set[Run]:
    """Shared runs whose cuts cost more than sharing them saves, the costliest first.

    Giving one up joins it, in every chain that uses it, to neighbors no other chain shares.
    """
    users = _users(runs_of)
    given_up: set[Run] = set()
    while True:
        worst, most = None, 0.0
        for run, keys in users.items():
            if len(keys) < 2 or run in given_up:
                continue
            hops = sum(_private_neighbors(runs_of[k], run, users, given_up) for k in keys)
            loss = hops * cost.hop_seconds - cost.gain(run, len(keys))
            if loss > most:
                worst, most = run, loss
        if worst is None:
            return given_up
        given_up.add(worst)


def _users(runs_of: Mapping[str, Sequence[Run]]) -> dict[Run, set[str]]:
    users: dict[Run, set[str]] = defaultdict(set)
    for key, runs in runs_of.items():
        for run in runs:
            users[run].add(key)
    return users


def _private_neighbors(
    runs: Sequence[Run], run: Run, users: Mapping[Run, set[str]], given_up: Collection[Run]
) -> int:
    def private(i: int) -> bool:
        return 0 <= i < len(runs) and (len(users[runs[i]]) == 1 or runs[i] in given_up)

    at = [i for i, r in enumerate(runs) if r == run]
    return sum(private(i - 1) + private(i + 1) for i in at)


def _merge(runs_of: Mapping[str, Sequence[Run]], given_up: Collection[Run]) -> dict[str, list[Run]]:
    users = _users(runs_of)
    out: dict[str, list[Run]] = {}
    for key, runs in runs_of.items():
        merged: list[Run] = []
        open_ = False  # the last block is this chain's own
        for run in runs:
            own = len(users[run]) == 1 or run in given_up
            if own and open_:
                merged[-1] += run
            else:
                merged.append(run)
            open_ = own
        out[key] = merged
    return out


def _runs(
    chain: Chain,
    before: Mapping[Joined, set[Joined | None]],
    after: Mapping[Joined, set[Joined | None]],
) -> list[Run]:
    """The runs of a chain's layers that lose no sharing."""
    joined: list[list[Joined]] = []
    for part in _layers(chain):
        last = joined[-1][-1] if joined else None
        if last is not None and after[last] == {part} and before[part] == {last}:
            joined[-1].append(part)
        else:
            joined.append([part])
    return [tuple(i for part in run for i in part) for run in joined]


def _blocks(chain: Chain, runs: Sequence[Run]) -> tuple[Block, ...]:
    ids = tuple(step.component for step in chain.steps)
    out, first = [], 0
    for run in (ids[:1], *runs, ids[1:][-2:]):
        if run:
            out.append(Block(components=run, first=first))
            first += len(run)
    return tuple(out)


def _layers(chain: Chain) -> list[Joined]:
    parts: list[Joined] = []
    for step in chain.steps[1:-2]:
        if step.fused_with_previous and parts:
            parts[-1] += (step.component,)
        else:
            parts.append((step.component,))
    return parts
