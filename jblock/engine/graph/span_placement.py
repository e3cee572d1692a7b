"""Which steps of each chain lie on which of several agents."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from jblock.blocks import layout
from jblock.blocks.spec import ComponentSpec
from jblock.engine.graph.layer_runs import layer_runs
from jblock.zoo.partition import Block
from jblock.zoo.records import Chain

HOME = 0
"""The agent that has the embedding and the head of every chain, and so owns its sequences."""

Place = Callable[[Chain, Sequence[ComponentSpec]], Sequence[int]]
"""The agent of each step of a chain."""


@dataclasses.dataclass(frozen=True)
class SpanPlacement:
    """Where the steps of chains lie, as one agent sees it. All agents must see the same.

    Attributes:
      agent: this one.
      place: see `Place`.
    """

    agent: int
    place: Place

    def agents(self, chain: Chain, specs: Sequence[ComponentSpec]) -> tuple[int, ...]:
        """The agent of each step.

        Args:
          chain: to place.
          specs: of its components.

        Raises:
          ValueError: a layer is cut, or the embedding or the head does not lie at home.
        """
        agents = tuple(self.place(chain, specs))
        if len(agents) != len(specs):
            raise ValueError(
                f"model {chain.name!r} has {len(specs)} steps and {len(agents)} of them are placed: give an "
                "agent for each"
            )
        for run in layers_of(specs):
            if len({agents[i] for i in run}) > 1:
                raise ValueError(
                    f"model {chain.name!r}: steps {run[0]} to {run[-1]} are one layer and lie on agents "
                    f"{[agents[i] for i in run]}: give them one"
                )
        ends = (0, *(i for i, spec in enumerate(specs) if spec.kind in ("norm", "unembedding")))
        if any(agents[i] != HOME for i in ends):
            raise ValueError(
                f"model {chain.name!r}: embedding and head lie on agents {[agents[i] for i in ends]}: place "
                f"them on agent {HOME}, the home of its sequences"
            )
        return agents


def layers_of(specs: Sequence[ComponentSpec]) -> list[list[int]]:
    """The steps of each layer of a chain, the embedding left out and the head the last."""
    return [[i + 1 for i in run] for run in layer_runs(specs[1:])]


def even_spans(agents: int) -> Place:
    """Cuts chains into one span an agent, so that each reads as much of weights for a token as the others,
    the head counted with the home's."""

    def place(chain: Chain, specs: Sequence[ComponentSpec]) -> tuple[int, ...]:
        found, done = [HOME] * len(specs), 0
        inner = [run for run in layers_of(specs) if specs[run[0]].kind != "norm"]
        sizes = [sum(_size(specs[i]) for i in run) for run in inner]
        head = sum(_size(spec) for spec in specs if spec.kind == "unembedding")
        others = min((sum(sizes) + head) / agents, sum(sizes) / max(agents - 1, 1))
        first = sum(sizes) - others * (agents - 1)
        for run, size in zip(inner, sizes, strict=True):
            middle = done + size / 2 - first
            done += size
            for i in run:
                found[i] = HOME if middle < 0 else min(1 + int(middle / others), agents - 1)
        return tuple(found)

    return place


def _size(spec: ComponentSpec) -> int:
    return sum(math.prod(shape) for shape in layout.compute_shapes(spec).values())


@dataclasses.dataclass(frozen=True)
class Layout:
    """The components of a chain, and where they lie.

    Attributes:
      components: one a step.
      agents: the agent of each; none: all are here.
      agent: this one.
    """

    components: tuple[str, ...]
    agents: tuple[int, ...] = ()
    agent: int = HOME

    def is_here(self, step: int) -> bool:
        """Whether a step lies on this agent."""
        return not self.agents or self.agents[step] == self.agent

    @property
    def here(self) -> tuple[str, ...]:
        """The components that lie on this agent."""
        return tuple(c for i, c in enumerate(self.components) if self.is_here(i))

    def runs(self, blocks: Sequence[Block]) -> Iterator[tuple[int, list[Block]]]:
        """The spans of the chain: each agent with its blocks, cut where another agent goes on."""
        if not self.agents:
            yield self.agent, list(blocks)
            return
        pieces = (piece for block in blocks for piece in self._cut(block))
        for agent, own in itertools.groupby(pieces, lambda block: self.agents[block.first]):
            yield agent, list(own)

    def _cut(self, block: Block) -> Iterator[Block]:
        at, end = block.first, block.first + len(block.components)
        for _, same in itertools.groupby(self.agents[at:end]):
            inside, count = at - block.first, len(list(same))
            yield Block(components=block.components[inside : inside + count], first=at)
            at += count


def layout_of(
    chain: Chain,
    spans: SpanPlacement | None,
    specs: Callable[[Sequence[str]], Sequence[ComponentSpec]],
) -> Layout:
    """Where the steps of a chain lie.

    Args:
      chain: see above.
      spans: None: all steps are here.
      specs: of components.

    Raises:
      ValueError: see `SpanPlacement.agents`.
    """
    components = tuple(step.component for step in chain.steps)
    if spans is None:
        return Layout(components)
    return Layout(components, spans.agents(chain, specs(components)), spans.agent)
