"""Several agents behind one engine's boundary: each a process with an engine, supervised by itself.

Every agent serves whole chains; which ones is the placement. A request goes to an agent that serves its
chain, by the prefixes that were sent there and by the number of open requests. When an agent's process dies
or freezes, what it had goes on at once in another one that serves the chain, after the tokens delivered so
far, or in the process that replaces it. A request that was there at two deaths in a row runs in no third
process that others compute in: the supervisor of the last one finds out whether it is the cause.

Nothing here sees a step, and nothing imports jax.
"""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence

from absl import logging

from jblock.engine import api
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.supervisor import SupervisedEngine, error_output, held_of
from jblock.engine.process.suspects import Held
from jblock.engine.stats_records import total
from jblock.scheduler.agent import Agent
from jblock.scheduler.chain_placement import ChainPlacement, Place, bare, everywhere
from jblock.scheduler.model_changes import Changes
from jblock.scheduler.prefixes import prefix_digests

# So many open requests an agent may have more than the least loaded one and still be given those whose prefix
# it has computed.
_SLACK = 4
# How often agents are looked at while one is not up.
_LOOK_SECONDS = 0.05

Start = Callable[[int, Sequence[str], Callable[[], None]], ProcessEngine]
"""Starts a process of this agent that serves these chains ("name" or "name@version"; none: all), and calls
the function when it has something to say."""


class Cluster(api.Engine):
    """Implements `jblock.engine.api.Engine` over agents. `poll` does the supervising, so it has to be called
    all the time, from one thread."""

    def __init__(
        self,
        start: Start,
        agents: int,
        *,
        models: Sequence[str] = (),
        place: Place = everywhere,
        backoff_seconds: float | None = None,
    ):
        """Starts the agents' processes and returns at once; `models` waits for them.

        Args:
          start: see `Start`; called now and after every death.
          agents: how many.
          models: what is served first, "name" or "name@version"; none: all of the zoo's, everywhere.
          place: which agents serve a chain.
          backoff_seconds: see `SupervisedEngine`.

        Raises:
          ValueError: a chain is placed nowhere.
        """
        self._place = place
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self._placement = ChainPlacement()
        if models:
            self._placement = self._placement.placed(models, range(agents), place)
        self._open: dict[str, Agent | None] = {}  # None: no agent serves its chain just now.
        self._homeless: list[Held] = []
        self._outputs: list[api.Output] = []
        self._turns = 0
        self._replacing = False
        self._failure: api.EngineDied | None = None
        self._closed = False
        options = {} if backoff_seconds is None else {"backoff_seconds": backoff_seconds}
        self._agents: list[Agent] = []
        try:
            for index in range(agents):
                first = self._placement.share(models, index)

                def begin(
                    served: Sequence[str], index: int = index, first: Sequence[str] = first
                ) -> ProcessEngine:
                    return start(index, served or first, self._arrived.set)

                self._agents.append(Agent(index, SupervisedEngine(begin, **options)))
        except BaseException:
            self.close()
            raise

    @property
    def is_up(self) -> bool:
        """Whether an agent computes."""
        return any(agent.engine.is_up for agent in self._agents)

    @property
    def placement(self) -> ChainPlacement:
        """Which agents serve which chains."""
        return self._placement

    @property
    def pids(self) -> list[int]:
        """Process ids of the agents; 0 where there is none just now."""
        return [agent.engine.pid for agent in self._agents]

    def models(self) -> tuple[api.ModelInfo, ...]:
        """All chains that an agent serves; blocks until every agent is warm.

        Raises:
          ValueError: the factory refused its arguments.
          EngineDied: an agent ended before it was warm, or no agent can be brought back.
        """
        for agent in self._agents:
            if not agent.lost:
                agent.engine.models()
        if self._failure is not None:
            raise self._failure
        found: dict[str, api.ModelInfo] = {}
        with self._lock:
            for agent in self._alive():
                for info in agent.infos():
                    found.setdefault(info.name, info)
            if not self._placement.agents:
                indices = [agent.index for agent in self._agents]
                self._placement = self._placement.placed(list(found), indices, everywhere)
        return tuple(found.values())

    def submit(self, request: api.Request) -> None:
        """Hands a request to an agent; never blocks."""
        with self._lock:
            if request.request_id in self._open:
                message = f"request_id {request.request_id!r} is already in flight; give another"
                self._refuse(request.request_id, "INVALID_ARGUMENT", message)
            else:
                self._assign(held_of(request))

    def cancel(self, request_id: str) -> None:
        """Asks for a request to end; never blocks."""
        with self._lock:
            agent = self._open.get(request_id)
            if agent is not None:
                agent.engine.cancel(request_id)
                self._arrived.set()
            elif request_id in self._open:
                self._homeless = [held for held in self._homeless if held.id != request_id]
                del self._open[request_id]
                self._say(api.Output(request_id=request_id, finish_reason="cancelled"))

    def poll(self, timeout: float) -> list[api.Output]:
        """Outputs of all agents since the last call; waits up to `timeout` seconds for the first.

        Raises:
          EngineDied: no agent is left that could be brought back.
        """
        end = time.monotonic() + timeout
        while not self._closed:
            self._arrived.clear()
            outputs = [output for agent in self._alive() for output in self._read(agent)]
            with self._lock:
                outputs += self._outputs
                self._outputs = []
                calm = all(agent.engine.is_free for agent in self._alive()) and not self._homeless
            if outputs:
                return outputs
            if self._failure is not None:
                raise self._failure
            left = end - time.monotonic()
            if left <= 0:
                break
            self._arrived.wait(left if calm else min(left, _LOOK_SECONDS))
        return []

    def serve(
        self, models: Sequence[str], base: Sequence[str] | None = None
    ) -> tuple[api.ModelInfo, ...]:
        """Serves exactly these chains, each on the agents where it is placed. Where one agent cannot, the
        others go back.

        Raises:
          UnknownChain, ValueError: an agent refused; nothing changed.
          EngineDied: an agent's process died over this change, which is not made again.
        """
        served = [f"{m.name}@{m.version}" for m in self.models()]
        base = served if base is None else base
        with self._lock:
            before, alive = self._placement, self._alive()
            after = before.placed(models, [agent.index for agent in alive], self._place)
        changes = Changes(base, models)
        with concurrent.futures.ThreadPoolExecutor(len(alive)) as pool:
            try:
                # The first one settles what "name" means now; the others need not wait for one another.
                for some in (alive[:1], alive[1:]):
                    todo = [pool.submit(changes.make, agent, before, after) for agent in some]
                    concurrent.futures.wait(todo)
                    for change in todo:
                        change.result()
            except Exception:
                list(pool.map(changes.undo, alive))
                raise
        with self._lock:
            names = {**self._placement.agents, **after.agents}
            kept = {info.name for agent in self._alive() for info in agent.infos()}
            agents = {name: of for name, of in names.items() if name in kept}
            self._placement = ChainPlacement(self._placement.epoch + 1, agents)
        return self.models()

    def stats(self) -> api.EngineStats:
        """Counters and gauges of all agents."""
        return total([agent.engine.stats() for agent in self._agents])

    def agents(self) -> tuple[api.AgentStatus, ...]:
        """Each agent by itself."""
        return tuple(
            api.AgentStatus(
                name=str(agent.index),
                up=agent.engine.is_up,
                models=tuple(f"{m.name}@{m.version}" for m in agent.infos()),
                requests=agent.requests,
                stats=agent.engine.stats(),
            )
            for agent in self._agents
        )

    def close(self) -> None:
        """Stops all agents."""
        self._closed = True
        self._arrived.set()
        if self._agents:
            with concurrent.futures.ThreadPoolExecutor(len(self._agents)) as pool:
                list(pool.map(lambda agent: agent.engine.close(), self._agents))

    def _alive(self) -> list[Agent]:
        return [agent for agent in self._agents if not agent.lost]

    def _read(self, agent: Agent) -> list[api.Output]:
        """What an agent brought. An answer of a request that another one has by now is not passed on."""
        try:
            outputs = agent.engine.poll(0.0)
        except api.EngineDied as error:
            self._lose(agent, error)
            return []
        passed = []
        with self._lock:
            for output in outputs:
                if self._open.get(output.request_id) is not agent:
                    continue
                passed.append(output)
                if output.finish_reason is not None:
                    del self._open[output.request_id]
                    agent.requests -= 1
            if not agent.engine.is_up:
                agent.prefixes.clear()
            if not agent.engine.is_free:
                self._move(agent)
            homeless, self._homeless = self._homeless, []
            for held in homeless:
                self._assign(held)
        return passed

    # What follows is called with the lock held, but for `_lose` and `_place_anew`.

    def _assign(self, held: Held) -> None:
        """Gives a request to the agent that is best for it."""
        request = held.request
        able = [agent for agent in self._agents if agent.serves(request)]
        if not able:
            if self._replacing:
                self._homeless.append(held)
                self._open[held.id] = None
                return
            able = self._alive()  # It says why not.
        free = [agent for agent in able if agent.engine.is_free] or able
        if not free:
            self._open.pop(held.id, None)
            self._refuse(held.id, "UNAVAILABLE", "no agent is left; send the request elsewhere")
            return
        digests = prefix_digests(request)
        most = min(agent.requests for agent in free) + _SLACK
        agent = max(
            (agent for agent in free if agent.requests <= most),
            key=lambda agent: (agent.prefixes.match(digests), -agent.requests, -agent.turn),
        )
        self._turns += 1
        agent.turn = self._turns
        agent.requests += 1
        agent.prefixes.add(digests)
        self._open[held.id] = agent
        agent.engine.adopt(held)

    def _move(self, agent: Agent) -> None:
        """Gives what waits for an agent to others that can run it now."""
        others = [a for a in self._alive() if a is not agent and a.engine.is_free]
        if others:
            for held in agent.engine.release(lambda h: any(a.serves(h.request) for a in others)):
                agent.requests -= 1
                self._assign(held)

    def _refuse(self, request_id: str, code: str, message: str) -> None:
        self._say(error_output(request_id, code, message))

    def _say(self, output: api.Output) -> None:
        self._outputs.append(output)
        self._arrived.set()

    def _lose(self, agent: Agent, error: api.EngineDied) -> None:
        """An agent that cannot be brought back: its requests go on elsewhere, its chains are placed anew."""
        with self._lock:
            agent.infos()
            agent.lost = True
            self._placement = self._placement.without(agent.index)
            left = self._alive()
            logging.error("agent %d is given up, %d are left: %s", agent.index, len(left), error)
            if not left:
                self._failure = error
                return
            if not all(self._placement.agents.values()) and not self._replacing:
                self._replacing = True
                threading.Thread(target=self._place_anew, name="cluster-place", daemon=True).start()
            for held in agent.engine.release(lambda held: True):
                agent.requests -= 1
                self._assign(held)

    def _place_anew(self) -> None:
        """Places what lost its last agent on those that are left; once more where one of them is lost too."""
        tried = 0
        while True:
            with self._lock:
                left = len(self._alive())
                if left in (0, tried) or all(self._placement.agents.values()):
                    self._replacing = False
                    break
                tried = left
            infos = {m.name: m for agent in self._agents for m in agent.infos()}
            wanted = [f"{m.name}@{m.version}" for m in infos.values()]
            models = [m for m in wanted if bare(m) in self._placement.agents]
            try:
                self.serve(models, models)
            except (ValueError, api.EngineDied) as error:
                logging.error("what a lost agent served cannot be served elsewhere: %s", error)
        self._arrived.set()
