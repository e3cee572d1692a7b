"""Which agents serve which chains, where an agent serves chains whole."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

Place = Callable[[Sequence[str], Collection[int]], Mapping[str, Collection[int]]]
"""Takes names of chains and the agents there are; gives each chain at least one that is to serve it."""


def everywhere(chains: Sequence[str], agents: Collection[int]) -> dict[str, Collection[int]]:
    """Every chain on every agent."""
    return dict.fromkeys(chains, agents)


def bare(model: str) -> str:
    """The name of "name" or "name@version"."""
    return model.partition("@")[0]


@dataclasses.dataclass(frozen=True)
class ChainPlacement:
    """A placement that stands until the next one.

    Attributes:
      epoch: grows with every change, and with every agent that is lost.
      agents: by chain name.
    """

    epoch: int = 0
    agents: Mapping[str, frozenset[int]] = dataclasses.field(default_factory=dict)

    def share(self, models: Sequence[str], agent: int) -> list[str]:
        """Those of `models` ("name" or "name@version") that an agent is to serve. An agent has to serve
        something: one on which nothing is placed serves all of them."""
        nowhere = frozenset[int]()
        return [m for m in models if agent in self.agents.get(bare(m), nowhere)] or list(models)

    def placed(
        self, models: Sequence[str], agents: Collection[int], place: Place
    ) -> "ChainPlacement":
        """The next placement: that of these chains on these agents.

        Raises:
          ValueError: a chain is given no agent.
        """
        names = [bare(m) for m in models]
        given = {name: frozenset(of) & set(agents) for name, of in place(names, agents).items()}
        for name in names:
            if not given.get(name):
                raise ValueError(
                    f"model {name!r} is placed on no agent that is there; place it on one"
                )
        return ChainPlacement(self.epoch + 1, given)

    def without(self, agent: int) -> "ChainPlacement":
        """The next placement, once an agent is lost; a chain may be left without any."""
        return ChainPlacement(self.epoch + 1, {n: of - {agent} for n, of in self.agents.items()})
