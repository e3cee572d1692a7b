"""A change of what agents serve, and the way back."""

from collections.abc import Sequence

from absl import logging

from jblock.engine import api
from jblock.scheduler.agent import Agent
from jblock.scheduler.chain_placement import ChainPlacement


class Changes:
    """One change of what agents serve, so far."""

    def __init__(self, base: Sequence[str], models: Sequence[str]):
        self._base, self._models = base, list(models)
        self._made: dict[int, tuple[list[str], list[str]]] = {}

    def make(self, agent: Agent, before: ChainPlacement, after: ChainPlacement) -> None:
        """Has an agent serve its share."""
        old, new = before.share(self._base, agent.index), after.share(self._models, agent.index)
        if old == new:
            return
        infos = {m.name: f"{m.name}@{m.version}" for m in agent.engine.serve(new, old)}
        self._models = [infos.get(m, m) for m in self._models]
        self._made[agent.index] = old, [infos.get(m, m) for m in new]

    def undo(self, agent: Agent) -> None:
        """Has an agent serve what it served before."""
        if agent.index in self._made:
            old, new = self._made[agent.index]
            try:
                agent.engine.serve(old, new)
            except (ValueError, api.EngineDied):
                logging.exception("agent %d cannot go back to what it served", agent.index)
