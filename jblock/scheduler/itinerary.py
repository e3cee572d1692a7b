"""What assembly is given and what it gives: budgets, reports of agents, itineraries. Plain records."""

import dataclasses
from collections.abc import Mapping

from jblock.zoo.edge_records import MEASURES
from jblock.zoo.records import POLICIES, Step


class NoRouteError(ValueError):
    """No agent has, or can load, a step of a chain; the message names it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What is accepted: by an operator, or by a request. By default only what is exact.

    Attributes:
      policy: the widest: "exact", "near" or "adaptive".
      measure: of edges, one that licenses a substitution ("kl" or "accuracy_change").
      damage: the most of it, all substitutes of a request together.
    """

    policy: str = "exact"
    measure: str = "kl"
    damage: float = 0.0

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise ValueError(f"policy {self.policy!r} is not known; known: {', '.join(POLICIES)}")
        licensing = [name for name, m in MEASURES.items() if m.licenses]
        if self.measure not in licensing:
            raise ValueError(
                f"measure {self.measure!r} licenses no substitution: give {' or '.join(licensing)}"
            )
        if not 0 <= self.damage < float("inf"):
            raise ValueError(f"damage is {self.damage}: give a number that is not negative")

    def and_(self, other: "Budget") -> "Budget":
        """What both accept; nothing approximate where they go by different measures."""
        if self.measure != other.measure:
            return Budget(measure=self.measure)
        return Budget(
            policy=min(self.policy, other.policy, key=POLICIES.index),
            measure=self.measure,
            damage=min(self.damage, other.damage),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What an agent says of itself, by component id; what is not named it cannot run.

    Attributes:
      agent: its name.
      step_seconds: of a token in a batch.
      prefill_seconds: of a token of a prompt; those not named take `step_seconds`.
      queue_seconds: that a token waits there now; 0 where not named.
      load_seconds: until it is on the device; 0 where not named: it is there.
      cached_tokens: of the request's prompt, whose pages of the exact chain it has.
    """

    agent: str
    step_seconds: Mapping[str, float]
    prefill_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    queue_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    load_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cached_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """What moving takes between two agents.

    Attributes:
      row_seconds: of one token's hidden row.
      kv_token_seconds: of one token's keys and values of one component.
    """

    row_seconds: float
    kv_token_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How much a request is expected to be.

    Attributes:
      prompt_tokens: of its prompt.
      new_tokens: that it generates.
    """

    prompt_tokens: int
    new_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """The longest run of steps on one agent.

    Attributes:
      agent: its name.
      steps: in order.
    """

    agent: str
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Itinerary:
    """The way of one request, for its life.

    Attributes:
      spans: in order, the first and the last on the home.
      seconds: it is expected to take.
      policy: of what is used: the widest of its substitutes, or "exact".
      damage: of what is used, in the budget's measure.
      edges: ids of the substitutes used.
    """

    spans: tuple[Span, ...]
    seconds: float
    policy: str = "exact"
    damage: float = 0.0
    edges: tuple[str, ...] = ()

    @property
    def home(self) -> str:
        """The agent of embedding and head."""
        return self.spans[-1].agent

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, in order."""
        return tuple(step for span in self.spans for step in span.steps)
