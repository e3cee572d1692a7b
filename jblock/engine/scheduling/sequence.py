"""One request on its way through the engine, and the piece of it that is in flight."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jblock.engine.api import Request
from jblock.engine.graph.graph import Route, Stage
from jblock.engine.kv_cache.prefix_keys import activated
from jblock.engine.kv_cache.sequence_pages import Boundary, SequencePages
from jblock.engine.programs.logprobs import best_tokens
from jblock.engine.structured_output.grammars import Constraint
from jblock.engine.weights.lease import Lease

NEVER = 2**62
"""A token that no sequence comes to."""


class Picked(NamedTuple):
    """One row a sampler returned: token, its log-probability, whether all its logits were finite."""

    token: int
    logprob: float
    finite: bool


class Elsewhere(Protocol):
    """The spans of a sequence that lie on other agents, as its home sees them.

    Attributes:
      ready: all are open, and have the KV of the sequence's first `most_found` tokens.
    """

    ready: bool

    def open(self, found: int) -> None:
        """Asks for them to be opened, where they are not yet.

        Args:
          found: of so many leading tokens the KV is here.
        """
        ...

    def close(self, *, poisoned: bool = False) -> None:
        """Gives them up; what is poisoned is not what its tokens say."""
        ...


class Guest(Protocol):
    """A span that lies here of a sequence whose home is another agent."""

    def admit(self, found: int) -> None:
        """It has its pages, and those of `found` leading tokens hold their KV."""
        ...

    def end(self, code: str = "", message: str = "") -> None:
        """It lost what it held; with a code, for good."""
        ...


@dataclasses.dataclass(eq=False)
class SequenceState:
    """A request admitted or waiting.

    Attributes:
      request: as submitted.
      route: the chain version it is bound to until it ends.
      max_tokens: most tokens to generate, the model's limit applied.
      seed: of its draws.
      lease: on all its chain needs on the device.
      adapter_slot: its adapter's slot in the tables; 0 without.
      adapter_from: the first token for which its adapter acts.
      seq_slot: its entry in the device's last-token array; -1 while waiting.
      row: its register row for decoding.
      pages: its KV pages.
      prompt_len: tokens of the prompt, virtual ones included.
      adjusts_logits: anything but the way of drawing differs from the plain model.
      has_penalties: what it may pick depends on what it has seen so far.
      tokens_only: nothing is asked for beside tokens, and no grammar is kept to.
      prefill: tokens to compute before it decodes: the prompt, and after a preemption what it had
        generated too.
      prompt_work: seconds that its prompt was given, or how far others had come when it began; of the
        prompts in flight the least goes first.
      computed: how many of those were handed to the device so far, or found in the cache.
      sampled: tokens the device was asked to sample so far, those not yet read included.
      generated: tokens read so far.
      prompt_logprobs: of each prompt token but the first, as far as read; empty if not asked for.
      prompt_best: the best token at each of these places, and its log-probability.
      deadline: by the monotonic clock; infinite without.
      latest_start: when it must have started to be complete by then.
      arrival: its place among all that came; 0 before it has one.
      was_preempted: it goes before others of its tenant.
      charged: how many of its first tokens its tenant was charged for.
      token_seconds: what it is charged for one more.
      pooled: float32 [2, hidden_size] of each chunk as `pooling_program` describes, by its first position.
      constraint: the grammar that its answer keeps to; None without one.
      item: what is on its way through the blocks; None between steps, unless a step ended before it.
      decode_item: the item it decodes with, the same in every step; None until it has decoded since it was
        admitted.
      verifying: rows of drafted tokens are on their way, or were not read yet.
      last_on_device: the device's entry for it holds its last token.
      finished: its last output has been sent.
      most_found: of how many leading tokens it may find the KV, at most: what other agents have too.
      elsewhere: its spans on other agents; None: its chain lies here whole.
      guest: it is a span of a sequence whose home is elsewhere, which sends what is to be computed.
    """

    request: Request
    route: Route
    max_tokens: int
    seed: int
    lease: Lease
    adapter_slot: int = 0
    adapter_from: int = -1
    seq_slot: int = -1
    row: int = -1
    pages: SequencePages = dataclasses.field(init=False)
    prompt_len: int = dataclasses.field(init=False)
    adjusts_logits: bool = dataclasses.field(init=False)
    has_penalties: bool = dataclasses.field(init=False)
    tokens_only: bool = dataclasses.field(init=False)
    prefill: int = 0
    prompt_work: float = 0.0
    computed: int = 0
    sampled: int = 0
    generated: list[int] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_best: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    deadline: float = math.inf
    latest_start: float = math.inf
    arrival: int = 0
    was_preempted: bool = False
    charged: int = 0
    token_seconds: float = 0.0
    pooled: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    constraint: Constraint | None = None
    item: "WorkItem | None" = None
    decode_item: "WorkItem | None" = None
    verifying: bool = False
    last_on_device: bool = True
    finished: bool = False
    most_found: int = NEVER
    elsewhere: Elsewhere | None = None
    guest: Guest | None = None

    def __post_init__(self):
        route = self.route
        if self.adapter_from < 0:
            self.adapter_from = invoked_at(self.request.token_ids, route.chain.invocation)
        self.pages = SequencePages({}, self.request.cache_salt)
        self.bind(route)
        wanted = self.request.sampling
        self.prompt_len = self.virtual + len(self.request.token_ids)
        self.tokens_only = self.constraint is None and not (
            wanted.logprobs or wanted.top_logprobs or wanted.prompt_logprobs or self.request.pooling
        )
        penalties = (
            wanted.repetition_penalty,
            wanted.presence_penalty,
            wanted.frequency_penalty,
        )
        self.has_penalties = penalties != (1, 0, 0)
        self.adjusts_logits = self.has_penalties or bool(wanted.logit_bias) or wanted.min_tokens > 0
        if self.request.sampling.prompt_logprobs:
            self.prompt_logprobs = [0.0] * (len(self.request.token_ids) - 1)
            self.prompt_best = [(0, 0.0)] * len(self.prompt_logprobs)

    def bind(self, route: Route) -> None:
        """Takes another route of the same chain, while it waits."""
        self.route, pages = route, self.pages
        pages.layers, pages.boundaries = route.kv_digests, route.boundaries
        if route.plain_digests is not None:
            pages.plain, pages.plain_until = route.plain_digests, self.adapter_from
            pages.layers = {s: activated(d, self.adapter_from) for s, d in pages.layers.items()}

    @property
    def virtual(self) -> int:
        """Virtual tokens in front of the request's own; positions count them."""
        return self.route.virtual_tokens

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end it when picked."""
        sampling = self.request.sampling
        eos = () if sampling.ignore_eos else self.route.chain.eos_token_ids
        return (*eos, *sampling.stop_token_ids)

    @property
    def greedy_only(self) -> bool:
        """Greedy, with nothing asked for but tokens and their own log-probabilities."""
        sampling = self.request.sampling
        return (
            sampling.temperature == 0
            and not self.adjusts_logits
            and not sampling.top_logprobs
            and not self.scores_prompt
            and self.constraint is None
            and not self.request.pooling
        )

    @property
    def sits_out(self) -> bool:
        """All its tokens are read, and what its grammar lets it go on with is not known yet."""
        constraint = self.constraint
        return (
            constraint is not None and not constraint.ready and self.sampled == len(self.generated)
        )

    @property
    def rests(self) -> bool:
        """It waits for another agent."""
        return self.guest is not None if self.item is None else self.item.is_away

    def take_back(self, item: "WorkItem") -> None:
        """Nothing was sampled for an item, which has to be computed once more."""
        item.samples = False
        self.sampled -= 1
        if item.tokens:
            self.computed = item.start

    def confirms(self, draft: "WorkItem") -> bool:
        """Whether the row of a drafted token followed from what was read; if so its pick is the next."""
        is_next = draft.start == self.num_tokens - 1 and draft.tokens == (self.generated[-1],)
        self.sampled += is_next
        return is_next

    def take(self, picked: Picked, best: np.ndarray | None) -> tuple[str | None, dict[str, Any]]:
        """Takes a token that was read, and the best ones beside it, as a row of `top_logprobs`.

        Returns:
          why it ends with it, or None, and what its output has.
        """
        fields: dict[str, Any] = {}
        sampling = self.request.sampling
        if self.scores_prompt:
            fields["prompt_logprobs"] = tuple(self.prompt_logprobs)
            fields["prompt_top_logprobs"] = tuple((best,) for best in self.prompt_best)
        if picked.token in self.end_ids:
            return "stop", fields
        self.generated.append(picked.token)
        fields["token_ids"] = (picked.token,)
        if sampling.logprobs:
            fields["logprobs"] = (picked.logprob,)
        if sampling.top_logprobs and best is not None:
            fields["top_logprobs"] = (best_tokens(best, sampling.top_logprobs),)
        return "length" if len(self.generated) >= self.max_tokens else None, fields

    @property
    def scores_prompt(self) -> bool:
        """Its prompt's log-probabilities are still wanted: they go out with what follows first."""
        return self.request.sampling.prompt_logprobs and not self.generated

    def take_scores(self, start: int, scores: np.ndarray) -> None:
        """Keeps the log-probabilities of the prompt tokens that follow those at position `start` and
        on, and the best tokens there, as rows of `prompt_logprobs_program`; the prompt's last token is
        followed by none, and virtual ones are not told of."""
        start -= self.virtual
        scores, start = scores[max(-start, 0) :], max(start, 0)
        count = min(len(scores), len(self.prompt_logprobs) - start)
        if count > 0:
            logprobs = np.ascontiguousarray(scores[:count, :2]).view(np.float32)
            best = zip(scores[:count, 2].tolist(), logprobs[:, 1].tolist(), strict=True)
            self.prompt_logprobs[start : start + count] = logprobs[:, 0].tolist()
            self.prompt_best[start : start + count] = best

    def take_pooled(self, start: int, pooled: np.ndarray) -> None:
        """Keeps what a chunk of the prompt brought; one that is computed again replaces it."""
        if start == 0:
            self.pooled.clear()
        self.pooled[start] = pooled

    @property
    def embedding(self) -> tuple[float, ...]:
        """What was asked for, of all that `take_pooled` was given."""
        if self.request.pooling == "last":
            found = self.pooled[max(self.pooled)][1]
        else:
            total = sum(chunk[0].astype(np.float64) for chunk in self.pooled.values())
            found = total / len(self.request.token_ids)
        return tuple(np.asarray(found, np.float32).tolist())

    @property
    def num_tokens(self) -> int:
        """Length of `all_token_ids`."""
        return self.prompt_len + len(self.generated)

    @property
    def written(self) -> int:
        """While it runs: how many of its first tokens have their KV enqueued, as far as known."""
        if self.computed < self.prefill:
            return self.computed
        return min(self.prompt_len + self.sampled - 1, self.num_tokens)

    @property
    def shareable_tokens(self) -> int:
        """How many leading tokens it may find in the prefix cache. The last one is always computed, for its
        logits are wanted; so are all tokens of a prompt whose log-probabilities, or whose mean, is wanted."""
        wants_all = self.scores_prompt or self.request.pooling == "mean"
        return 0 if wants_all else self.num_tokens - 1

    @property
    def all_token_ids(self) -> tuple[int, ...]:
        """The prompt and every token read so far. What stands for a virtual token does not matter."""
        return (*(0,) * self.virtual, *self.request.token_ids, *self.generated)


@dataclasses.dataclass(eq=False)
class WorkItem:
    """Some consecutive tokens of one sequence traveling along its chain together.

    Attributes:
      sequence: whose.
      start: position of the first token.
      q_len: how many tokens.
      chunk: token columns of the bucket it needs: 1 for decoding.
      rows: its register rows, one a token.
      tokens: token ids, or () to take the sequence's last sampled token on the device.
      samples: its last token's logits are wanted.
      scores: the log-probabilities of its prompt tokens are wanted.
      pools: what the model makes of its tokens is wanted.
      at: index of the stage of its route it is at.
      entry: the boundary at which it enters its chain, its rows found there; None: at the embedding.
      seconds_left: of a chunk of a prompt: what it is expected to take from here; 0 if not known.
      allowance: how many of them it may use in this step.
      is_away: it is on another agent.
      drafts: rows behind it of tokens that are drafted, each an item of its own that travels with it.
      drafted: of one of these, the tokens drafted up to its own, which it takes for generated.
    """

    sequence: SequenceState
    start: int
    q_len: int
    chunk: int
    rows: list[int]
    tokens: tuple[int, ...]
    samples: bool
    scores: bool = False
    pools: bool = False
    at: int = 0
    entry: Boundary | None = None
    seconds_left: float = 0.0
    allowance: float = math.inf
    is_away: bool = False
    drafts: "tuple[WorkItem, ...]" = ()
    drafted: tuple[int, ...] = ()

    @property
    def stage(self) -> Stage:
        """The block it is at."""
        return self.sequence.route.stages[self.at]

    @property
    def adapter_slot(self) -> int:
        """The adapter that acts on its tokens; 0: none does."""
        sequence = self.sequence
        return sequence.adapter_slot if self.start >= sequence.adapter_from else 0

    @property
    def first_layer(self) -> int:
        """Of the block it is at, the layer it begins with."""
        return self.entry.layer if self.entry and self.entry.stage == self.at else 0

    @property
    def is_draft(self) -> bool:
        """Whether its token is drafted."""
        return bool(self.drafted)

    @property
    def of_prompt(self) -> bool:
        """Whether it is of what its sequence computes before it decodes."""
        return self.start < self.sequence.prefill


def invoked_at(tokens: Sequence[int], invocation: Sequence[int]) -> int:
    """The token of a prompt from which on an adapter acts: where its invocation stands last, as PEFT has it,
    0 for one that needs none. It never acts on a prompt without."""
    if not invocation:
        return 0
    length, found = len(invocation), tuple(invocation)
    for at in reversed(range(len(tokens) - length + 1)):
        if tokens[at] == found[0] and tuple(tokens[at : at + length]) == found:
            return at
    return NEVER


def chunk_for(remaining: int, chunks: tuple[int, ...]) -> tuple[int, int]:
    """(tokens to compute now, chunk columns) for a prompt with `remaining` tokens to go.

    Depends on the sequence alone, so that its arithmetic is the same whatever else is in the batch.
    A chunk is taken whole, or where it would be at least half full; the rest goes in smaller ones.
    """
    fitting = [c for c in chunks if c <= remaining]
    above = [c for c in chunks if c >= remaining]
    if above and (not fitting or 2 * remaining >= min(above)):
        return remaining, min(above)
    return max(fitting), max(fitting)
