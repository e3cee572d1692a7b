"""Adaptive assembly in front of an engine: a request that accepts it is bound, when it comes, to the chain
that is quickest just now within its budget, and keeps it.

The engine serves beside each model the chains that recorded edges make of it (`variants.py`), under names
that clients do not see; they take memory only once they are used. Pure Python, without jax; what the engine
does just now it says in its statistics.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence

from absl import logging

from jblock.engine import api
from jblock.scheduler.assembly import assemble
from jblock.scheduler.itinerary import Budget, NoRouteError, Report, Work
from jblock.scheduler.variants import Variants, variants
from jblock.zoo.assembled import is_assembled
from jblock.zoo.assembled import serve as find_chain
from jblock.zoo.edge_records import Edge
from jblock.zoo.edges import edges
from jblock.zoo.records import Chain, ZooError
from jblock.zoo.store import Zoo

# What loading is taken to cost until some was seen: a step's wait, and a disk's rate.
_LOAD_SECONDS, _LOAD_BYTES_PER_SECOND = 0.1, 500e6
# Of what was seen last, how much counts.
_NEW_SHARE = 0.2
_ENGINE = "engine"


@dataclasses.dataclass
class _Bound:
    """A request that is open.

    Attributes:
      told: what is to be said with its first output; None: it was, or nothing is.
      loads_since: clock when it came, if its chain was not all on the device.
    """

    told: api.Bound | None
    loads_since: float | None


class AdaptiveEngine(api.Engine):
    """Implements `jblock.engine.api.Engine` over another one."""

    def __init__(self, engine: api.Engine, zoo: Zoo, budget: Budget):
        """Takes the engine over.

        Args:
          engine: serves what `with_variants` names.
          zoo: where edges are.
          budget: what the operator accepts.
        """
        self._engine, self._zoo, self._budget = engine, zoo, budget
        self._lock, self._learning = threading.Lock(), threading.Lock()
        self._variants: Mapping[str, Variants] = {}
        self._known: tuple[api.ModelInfo, ...] = ()
        self._open: dict[str, _Bound] = {}
        self._load_seconds = _LOAD_SECONDS

    def models(self) -> tuple[api.ModelInfo, ...]:
        """See `Engine.models`; what stands for others is not told."""
        infos = self._engine.models()
        self._learn(infos)
        return _public(infos)

    def _learn(self, infos: tuple[api.ModelInfo, ...]) -> None:
        """Reads what may stand for what is served now."""
        with self._learning:  # The zoo may be slow: outputs do not wait for it.
            if infos is self._known:
                return
            served = {info.name for info in infos}
            known = _edges_by_model(self._zoo)
            found = {}
            for info in _public(infos):
                model = f"{info.name}@{info.version}"
                now = self._variants.get(info.name)
                if now is None or now.chain.version != info.version:
                    now = _find_variants(self._zoo, model, self._budget, known)
                if now and now.chains and all(chain.name in served for chain in now.chains):
                    found[info.name] = now
            self._variants, self._known = found, infos

    def submit(self, request: api.Request) -> None:
        """Binds a request to a chain and hands it over."""
        plain = dataclasses.replace(request, policy="exact", max_damage=None)
        known = self._variants.get(request.model)
        sampling = request.sampling
        # What has no place for saying so, or began with the model's own, has the model's own.
        plain_only = request.generated or request.pooling or sampling.prompt_logprobs
        if request.policy == "exact" or known is None or plain_only:
            self._engine.submit(plain)
            return
        most = self._budget.damage if request.max_damage is None else request.max_damage
        wanted = Budget(policy=request.policy, measure=self._budget.measure, damage=most)
        reports = self._reports([known.chain, *known.chains])
        work = Work(prompt_tokens=len(request.token_ids), new_tokens=request.sampling.max_tokens)
        told, chain = None, known.chain
        try:
            budget = self._budget.and_(wanted)
            served = {one.steps: one for one in known.chains}
            found = assemble(known.chain, budget, known.edges, reports, {}, work, served)
        except NoRouteError:
            found = None  # The engine says why.
        if found is not None and found.edges:
            chain = served[found.steps]
            told = api.Bound(
                served_as=chain.name,
                policy=chain.policy,
                measure=budget.measure,
                damage=found.damage,
            )
        loads = all(any(s.component in r.load_seconds for s in chain.steps) for r in reports)
        with self._lock:
            since = time.monotonic() if loads else None
            self._open[request.request_id] = _Bound(told, since)
        self._engine.submit(dataclasses.replace(plain, model=chain.name))

    def _reports(self, chains: Sequence[Chain]) -> list[Report]:
        """Of the agents that have the first of these chains whole, each by itself; of all as one where it
        goes over several, for then every way is theirs together."""
        all_of_them = _Costs(self._engine.stats(), self._load_seconds)
        wanted, found = all_of_them.blocks_of(chains[0]), []
        for agent in self._engine.agents():
            costs = _Costs(agent.stats, self._load_seconds)
            if agent.up and costs.blocks_of(chains[0]) == wanted:
                found.append(costs.report(agent.name, chains))
        return found or [all_of_them.report(_ENGINE, chains)]

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        self._engine.cancel(request_id)

    def poll(self, timeout: float) -> list[api.Output]:
        """See `Engine.poll`; the first output of a request says what it is bound to."""
        outputs = self._engine.poll(timeout)
        if self._open:
            with self._lock:
                outputs = [self._told(output) for output in outputs]
        return outputs

    def _told(self, output: api.Output) -> api.Output:
        bound = self._open.get(output.request_id)
        if bound is None:
            return output
        if output.finish_reason is not None:
            del self._open[output.request_id]
        if bound.loads_since is not None:
            seen = time.monotonic() - bound.loads_since
            self._load_seconds += _NEW_SHARE * (seen - self._load_seconds)
            bound.loads_since = None
        if bound.told is None:
            return output
        told, bound.told = bound.told, None
        return _with(output, told)

    def serve(
        self, models: Sequence[str], base: Sequence[str] | None = None
    ) -> tuple[api.ModelInfo, ...]:
        """See `Engine.serve`; what may stand for these is served too."""
        served = self._engine.models()
        before = None
        if base is not None:
            names = {model.partition("@")[0] for model in base}
            hidden = [m for m in served if is_assembled(m.name)]
            before = [
                *base,
                *(f"{m.name}@{m.version}" for m in hidden if m.name.partition("+")[0] in names),
            ]
        wanted = with_variants(self._zoo, models, self._budget)
        infos = self._engine.serve(wanted, before)
        self._learn(infos)
        return _public(infos)

    def stats(self) -> api.EngineStats:
        """See `Engine.stats`."""
        return self._engine.stats()

    def agents(self) -> tuple[api.AgentStatus, ...]:
        """See `Engine.agents`."""
        return self._engine.agents()

    @property
    def is_up(self) -> bool:
        """See `Engine.is_up`."""
        return self._engine.is_up

    def report_running(self, report: api.ReportRunning) -> None:
        """See `Engine.report_running`."""
        self._engine.report_running(report)

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.close()


def _public(infos: Sequence[api.ModelInfo]) -> tuple[api.ModelInfo, ...]:
    return tuple(info for info in infos if not is_assembled(info.name))


def _with(output: api.Output, bound: api.Bound) -> api.Output:
    fields = {name: getattr(output, name) for name in output.__struct_fields__}
    return api.Output(**{**fields, "bound": bound})


def with_variants(zoo: Zoo, models: Sequence[str], budget: Budget) -> list[str]:
    """These models, and behind each what may stand for it."""
    known, found = _edges_by_model(zoo), []
    for model in models:
        found.append(model)
        now = _find_variants(zoo, model, budget, known)
        found += [f"{chain.name}@{chain.version}" for chain in now.chains] if now else []
    return found


def _edges_by_model(zoo: Zoo) -> Mapping[str, list[Edge]]:
    """The edges of a zoo by the name of the model they were measured in."""
    found: dict[str, list[Edge]] = {}
    with contextlib.suppress(ZooError, OSError):
        for one in edges(zoo, problems=[]):
            found.setdefault((one.chain or "").partition("@")[0], []).append(one)
    return found


def _find_variants(
    zoo: Zoo, model: str, budget: Budget, known: Mapping[str, list[Edge]]
) -> Variants | None:
    """What may stand for "name" or "name@version"; None: there are no edges of it, or it cannot be read,
    which the engine will say."""
    here = known.get(model.partition("@")[0])
    if not here:
        return None
    try:
        return variants(find_chain(zoo, model), here, budget)
    except (ZooError, OSError) as error:
        logging.warning("nothing stands for model %s: %s", model, error)
        return None


def exact_models(zoo: Zoo) -> list[str]:
    """Names of the models that are exact, and can be read."""
    found = []
    for name in zoo.chains():
        with contextlib.suppress(ZooError):
            if zoo.chain(name).policy == "exact":
                found.append(name)
    return found


class _Costs:
    """What an engine's blocks cost just now, by what it says of them."""

    def __init__(self, stats: api.EngineStats, load_seconds: float):
        self._blocks = {block.block.rpartition("_")[2]: block for block in stats.blocks}
        self._load_seconds = load_seconds
        ran = [b for b in stats.blocks if b.rows and b.weight_bytes]
        total = sum(b.weight_bytes for b in ran)
        self._byte_seconds = sum(self._own_seconds(b) for b in ran) / total if total else 0.0

    def blocks_of(self, chain: Chain) -> set[str]:
        """The blocks that are known of a chain."""
        return {step.component[:8] for step in chain.steps} & self._blocks.keys()

    def report(self, agent: str, chains: Sequence[Chain]) -> Report:
        """Of these chains' components. A block is known by its first one; it stands for the others."""
        step: dict[str, float] = {}
        queue: dict[str, float] = {}
        load: dict[str, float] = {}
        for id_ in {s.component for chain in chains for s in chain.steps}:
            step[id_] = 0.0
            block = self._blocks.get(id_[:8])
            if block is None:
                continue
            step[id_] = self._seconds(block)
            queue[id_] = block.queue_rows * step[id_]
            missing = block.weight_bytes - block.resident_bytes
            if missing > 0:
                load[id_] = self._load_seconds + missing / _LOAD_BYTES_PER_SECOND
        return Report(agent=agent, step_seconds=step, queue_seconds=queue, load_seconds=load)

    def _seconds(self, block: api.BlockStats) -> float:
        """Of a row; of a block that has not run as long as its bytes take elsewhere."""
        return self._own_seconds(block) if block.rows else self._byte_seconds * block.weight_bytes

    @staticmethod
    def _own_seconds(block: api.BlockStats) -> float:
        return block.seconds / block.rows
