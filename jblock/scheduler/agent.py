"""One agent, as the scheduler knows it."""

from jblock.engine import api
from jblock.engine.process.supervisor import SupervisedEngine
from jblock.scheduler.prefixes import KnownPrefixes


class Agent:
    """An agent and what is known of it.

    Attributes:
      index: its number.
      engine: its processes.
      prefixes: what its present process has computed.
      requests: open ones that it has.
      turn: when it was last given one, to take turns.
      lost: it cannot be brought back.
    """

    def __init__(self, index: int, engine: SupervisedEngine):
        self.index, self.engine = index, engine
        self.prefixes = KnownPrefixes()
        self.requests = self.turn = 0
        self.lost = False
        self._infos: tuple[api.ModelInfo, ...] = ()
        self._versions: dict[str, int] = {}

    def infos(self) -> tuple[api.ModelInfo, ...]:
        """What it serves, or served when it was lost."""
        if not self.lost:
            infos = self.engine.served
            if infos is not self._infos:
                self._versions = {m.name: m.version for m in infos}
                self._infos = infos
        return self._infos

    def serves(self, request: api.Request) -> bool:
        """Whether it serves the chain in the version that is asked for."""
        if self.lost:
            return False
        self.infos()
        version = self._versions.get(request.model)
        return version is not None and request.version in (0, version)
