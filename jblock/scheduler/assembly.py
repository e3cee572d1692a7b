"""Adaptive assembly: by which agents, and by which of its steps or their substitutes, one request goes.

A pure function of a chain, what the operator and the request accept, and reports of agents. A shortest path
over (step, agent, damage): seconds until the answer is there, against the measured damage of what is put in
place of the chain's own steps. Without a policy that allows substitutes only exact steps are looked at.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from jblock.scheduler.itinerary import (
    Budget,
    Itinerary,
    NoRouteError,
    Report,
    Span,
    Transfer,
    Work,
)
from jblock.scheduler.substitutes import Substitute, measured_together, substitutes
from jblock.zoo.edge_records import Edge
from jblock.zoo.records import POLICIES, Chain, Step

_GAIN = 0.9
"""Of the exact route's seconds: what an approximate one may take at most, or the exact one is taken."""
_MOST_LABELS = 16
"""Ways kept to one step on one agent, none of which is both quicker and less damaged than another."""


def assemble(
    chain: Chain,
    budget: Budget,
    edges: Iterable[Edge],
    reports: Sequence[Report],
    transfers: Mapping[tuple[str, str], Transfer],
    work: Work,
    served: Collection[tuple[Step, ...]] | None = None,
) -> Itinerary:
    """The quickest way of a request within a budget; the exact one unless another takes less than nine tenths
    of its time.

    Args:
      chain: that was asked for.
      budget: what operator and request both accept (`Budget.and_`).
      edges: of the zoo.
      reports: of the agents that take requests.
      transfers: by pair of agents; a pair that is not named has no link.
      work: of the request.
      served: steps that the chain may come to with substitutes in it; None: any.

    Raises:
      NoRouteError: no agent can run a step, and nothing accepted can take its place.
    """
    measured = substitutes(chain, edges, budget.measure)
    widest = POLICIES.index(budget.policy)
    offered = [
        s for s in measured if s.damage <= budget.damage and POLICIES.index(s.policy) <= widest
    ]
    search = _Search(chain, measured, reports, transfers, work, served)
    exact = search.best([], 0.0)
    found = search.best(offered, budget.damage) if offered else None
    if exact is None and found is None:
        raise NoRouteError(_what_is_missing(chain, reports))
    if exact is None or (found is not None and found.seconds < _GAIN * exact.seconds):
        assert found is not None
        return found
    return exact


def _what_is_missing(chain: Chain, reports: Sequence[Report]) -> str:
    for at, step in enumerate(chain.steps):
        if not any(step.component in report.step_seconds for report in reports):
            return (
                f"model {chain.name!r}: no agent has or can load step {at}, component {step.component}: "
                "place it, or accept a substitute of it"
            )
    return (
        f"model {chain.name!r}: no agent has both its embedding and its head, or no links join the agents "
        "that have its steps: place it anew"
    )


@dataclasses.dataclass(frozen=True)
class _Label:
    """A way up to some step."""

    seconds: float
    damage: float
    path: tuple[tuple[str, Step], ...]
    used: tuple[Substitute, ...] = ()


class _Search:
    """Shortest paths of one request over its agents."""

    def __init__(
        self,
        chain: Chain,
        measured: Sequence[Substitute],
        reports: Sequence[Report],
        transfers: Mapping[tuple[str, str], Transfer],
        work: Work,
        served: Collection[tuple[Step, ...]] | None,
    ):
        self._chain, self._measured = chain, measured
        self._transfers, self._work, self._served = transfers, work, served
        self._reports = {report.agent: report for report in reports}

    def best(self, offered: Sequence[Substitute], damage: float) -> Itinerary | None:
        """The quickest way that some substitutes allow with so much damage; None where there is none."""
        head = self._chain.steps[-1].component
        first = self._chain.steps[0].component
        homes = [
            name
            for name, r in self._reports.items()
            if first in r.step_seconds and head in r.step_seconds
        ]
        ways = [way for home in homes for way in self._from(home, offered, damage)]
        if not ways:
            return None
        way = min(ways, key=lambda w: (w.seconds, w.damage))
        real = measured_together(self._chain, way.used, self._measured)
        steps = tuple(step for _, step in way.path)
        is_served = self._served is None or not way.used or steps in self._served
        if real <= damage and is_served:
            return _itinerary(way, real)
        # Together they were measured to do more than their sum says, or nobody serves both: without one of
        # them, then.
        return self.best([s for s in offered if s is not way.used[-1]], damage)

    def _from(self, home: str, offered: Sequence[Substitute], damage: float) -> list[_Label]:
        """Ways from home to home."""
        steps = self._chain.steps
        at: list[list[_Label]] = [[] for _ in range(len(steps) + 1)]
        at[0] = [_Label(0.0, 0.0, ())]
        for index in range(len(steps)):
            own = Substitute(
                first=index,
                last=index + 1,
                steps=(steps[index],),
                damage=0,
                policy="exact",
                edge="",
            )
            choices = [own, *(s for s in offered if s.first == index)]
            for label, choice in itertools.product(_pareto(at[index]), choices):
                if label.damage + choice.damage <= damage:
                    ends = index == 0 or choice.last >= len(steps) - 1  # the norm is the head's
                    at[choice.last] += self._through(label, choice, home, ends)
        return [label for label in at[-1] if label.path[-1][0] == home]

    def _through(
        self, label: _Label, choice: Substitute, home: str, ends: bool
    ) -> Iterator[_Label]:
        """A way, gone on by the steps of a choice."""
        used = label.used if not choice.edge else (*label.used, choice)
        ways = [_Label(label.seconds, label.damage + choice.damage, label.path, used)]
        for at, step in enumerate(choice.steps, 1):
            last = ends and at == len(choice.steps)
            agents = (home,) if last else tuple(self._reports)
            ways = _pareto(
                [
                    dataclasses.replace(
                        way, seconds=way.seconds + more, path=(*way.path, (a, step))
                    )
                    for way, a in itertools.product(ways, agents)
                    if (more := self._seconds(way, a, step)) is not None
                ]
            )
        yield from ways

    def _seconds(self, way: _Label, agent: str, step: Step) -> float | None:
        """What a step on an agent adds; None where it cannot be."""
        report, id_ = self._reports[agent], step.component
        if id_ not in report.step_seconds:
            return None
        rows = self._work.new_tokens
        total = rows * (report.step_seconds[id_] + report.queue_seconds.get(id_, 0.0))
        total += report.load_seconds.get(id_, 0.0)
        before = way.path[-1][0] if way.path else agent
        if before != agent:
            if step.fused_with_previous:
                return None
            link = self._transfers.get((before, agent))
            if link is None:
                return None
            total += link.row_seconds * (rows + self._work.prompt_tokens)
        return total + self._prompt(way, agent, id_)

    def _prompt(self, way: _Label, agent: str, component: str) -> float:
        """Seconds until the prompt is computed there: anew, or from pages, its own or pulled. Behind a
        substitute no pages of the exact chain fit."""
        report, tokens = self._reports[agent], self._work.prompt_tokens
        each = report.prefill_seconds.get(component, report.step_seconds[component])
        if way.used:
            return tokens * each
        quickest = (tokens - min(report.cached_tokens.get(component, 0), tokens)) * each
        for name, other in self._reports.items():
            link = self._transfers.get((name, agent))
            held = min(other.cached_tokens.get(component, 0), tokens)
            if name != agent and link is not None and held:
                pulled = held * link.kv_token_seconds + (tokens - held) * each
                quickest = min(quickest, pulled)
        return quickest


def _pareto(labels: Sequence[_Label]) -> list[_Label]:
    """Of the ways to each agent those that no other beats in both seconds and damage."""
    kept: list[_Label] = []
    least: dict[tuple[str, bool], float] = {}
    count: dict[str, int] = {}
    for label in sorted(labels, key=lambda w: (w.seconds, w.damage)):
        agent = label.path[-1][0] if label.path else ""
        exact = (agent, bool(label.used))
        if label.damage < least.get(exact, float("inf")) and count.get(agent, 0) < _MOST_LABELS:
            least[exact] = label.damage
            count[agent] = count.get(agent, 0) + 1
            kept.append(label)
    return kept


def _itinerary(way: _Label, damage: float) -> Itinerary:
    runs = itertools.groupby(way.path, key=lambda at: at[0])
    return Itinerary(
        spans=tuple(Span(agent=a, steps=tuple(s for _, s in run)) for a, run in runs),
        seconds=way.seconds,
        policy=max(("exact", *(s.policy for s in way.used)), key=POLICIES.index),
        damage=damage,
        edges=tuple(s.edge for s in way.used),
    )
