"""The engine's boundary: plain data only, so the loop may sit in a thread, a process or elsewhere.

A front end calls `submit` and `cancel` and reads `poll`; nothing else crosses. Every message is a
frozen record of ints, floats, strings and tuples of them: no arrays, no callbacks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from jblock.engine.stats_records import GAUGES as GAUGES
from jblock.engine.stats_records import BlockStats as BlockStats
from jblock.engine.stats_records import EngineStats
from jblock.engine.stats_records import TenantStats as TenantStats

MAX_LOGIT_BIAS = 64
# A model's own eos ids, and the stop ids of a request, when min_tokens forbids them.
MAX_END_IDS = 80
MAX_TOP_LOGPROBS = 20
POOLINGS = ("mean", "last")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request picks its tokens. Processors apply in the order of these fields' maths: biases
    and min_tokens, repetition penalty, presence and frequency penalties, temperature, top_k, top_p,
    min_p.

    Attributes:
      temperature: 0 (or below 1e-5) is greedy; otherwise logits are divided by it.
      top_k: keep the k best tokens; 0 keeps all.
      top_p: keep the smallest set of best tokens whose probability reaches this; 1 keeps all.
      min_p: drop tokens less probable than this share of the best one's probability; 0 keeps all.
      repetition_penalty: logits of tokens in the prompt or generated are divided by it where positive
        and multiplied where negative; 1 does nothing.
      presence_penalty: taken off the logits of tokens generated at least once.
      frequency_penalty: taken off the logits of tokens as many times as they were generated.
      logit_bias: (id, value) pairs added to logits, at most MAX_LOGIT_BIAS.
      seed: makes a sampled request reproducible whatever else is in the batch; taken modulo 2**32.
        None draws one.
      max_tokens: most tokens generated.
      min_tokens: eos and stop ids cannot be picked for so many tokens.
      stop_token_ids: ids that end the generation beside the model's own eos ids.
      ignore_eos: go on past the model's eos ids.
      logprobs: return the log-probability of each generated token (of the unmodified logits).
      top_logprobs: return so many of the best tokens at each generated one, at most MAX_TOP_LOGPROBS.
      prompt_logprobs: return the log-probability of each prompt token given those before it; the
        prefix cache is not read for such a request.
      grammar: that the answer keeps to, as llguidance writes it, of a model with a tokenizer; "" is none. The
        answer ends where nothing may follow, before min_tokens too.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int = 128
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    grammar: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One generation.

    Attributes:
      request_id: unique among those in flight.
      model: a chain name.
      token_ids: the prompt.
      sampling: how tokens are picked.
      cache_salt: cached prompts are shared between requests of equal salt only; a tenant's own.
      pooling: "mean" or "last": what is wanted is the last hidden state behind the final norm, over all
        tokens of the prompt or of its last one, and no token; "" generates.
      version: of the chain the prompt was made for; refused with ABORTED where another version is
        served by now. 0 takes whichever is.
      generated: tokens that an engine before this one generated and delivered. The request goes on after
        them: they count towards max_tokens and min_tokens and in penalties, draws go on at their positions,
        and neither they nor the log-probabilities of the prompt are sent again.
      tenant: who asks; service is shared out among tenants.
      weight: the tenant's share in proportion to those of others.
      priority: lower numbers go before all higher ones, whoever asks.
      deadline: seconds from now by which the answer must be complete; None: no matter. Refused with
        DEADLINE_EXCEEDED where measured times say that it cannot be.
      policy: the widest that is accepted; with "near" or "adaptive" another chain may stand for the model's,
        where the operator allows it.
      max_damage: the most measured damage of that; None: the operator's.
    """

    request_id: str
    model: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    cache_salt: str = ""
    pooling: str = ""
    version: int = 0
    generated: tuple[int, ...] = ()
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    deadline: float | None = None
    policy: str = "exact"
    max_damage: float | None = None


class Bound(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a request is bound to, for its life, in place of the model's own chain.

    Attributes:
      served_as: name of the chain: the model's, and the edges in it.
      policy: "near" or "adaptive".
      measure: that damage is told in, one of `MEASURES`.
      damage: of it, as it was measured.
    """

    served_as: str
    policy: str
    measure: str
    damage: float


class Output(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one step brought to one request. The one with a finish_reason is its last.

    Attributes:
      request_id: whose.
      token_ids: newly generated ids, in order (the eos or stop id is not among them).
      logprobs: one for each of token_ids when asked for, else empty.
      top_logprobs: for each of token_ids when asked for, (id, log-probability) pairs, best first.
      prompt_logprobs: one for each prompt token but the first, once, in the first output that follows
        from the prompt, when asked for.
      prompt_top_logprobs: beside each of prompt_logprobs the best token there, as top_logprobs has it, from
        the same logits.
      embedding: what was pooled, when asked for.
      finish_reason: None while running; "stop" (eos or stop id), "length", "cancelled", "error".
      error_code: name of a gRPC status code when finish_reason is "error" ("NOT_FOUND", ...).
      error_message: what was given, what was expected and what to do.
      bound: in the first output of a request that is bound to another chain than the model's own.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    embedding: tuple[float, ...] = ()
    finish_reason: str | None = None
    error_code: str = ""
    error_message: str = ""
    bound: Bound | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One served chain, as a front end needs to know it.

    Attributes:
      name: chain name.
      version: chain version.
      family: architecture.
      vocab_size: ids go from 0 to vocab_size - 1.
      max_model_len: most tokens of prompt and output together.
      tokenizer_path: folder with tokenizer.json, or "" when only token ids are served.
      base: "name@version" of the chain an adapter rides on, or "".
      blocks: how many blocks its chain has.
      shared_blocks: how many of them at least one other served chain uses too.
      policy: "exact", "near" or "adaptive": what its answers are, and what who asks has to accept.
      limited_by: what max_model_len comes from: "its own", "max_model_len" or "KV memory"; "" if not known.
      kv_tokens: tokens of it that the KV pools hold at most; 0 if not known.
      runs_on: dtypes and devices, in words.
    """

    name: str
    version: int
    family: str
    vocab_size: int
    max_model_len: int
    tokenizer_path: str = ""
    base: str = ""
    blocks: int = 0
    shared_blocks: int = 0
    policy: str = "exact"
    limited_by: str = ""
    kv_tokens: int = 0
    runs_on: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentStatus:
    """One agent of an engine that has several.

    Attributes:
      name: tells it from the others.
      up: it computes now, and is not just being replaced.
      models: "name@version" of the chains placed on it.
      requests: open ones that it has.
      stats: its own counters and gauges.
    """

    name: str
    up: bool
    models: tuple[str, ...]
    requests: int
    stats: EngineStats


class EngineDied(RuntimeError):
    """The engine's loop ended without being asked to; the message says how."""


class UnknownChain(ValueError):
    """The zoo has no such chain; the message names those it has."""


# Takes the ids that a step computes and the last one did not, and those the other way round.
ReportRunning = Callable[[tuple[str, ...], tuple[str, ...]], None]


class Engine(Protocol):
    """What a front end holds. Thread-safe; `poll` is called from one thread only."""

    def models(self) -> tuple[ModelInfo, ...]:
        """The served chains. Blocks until the engine is warm."""
        ...

    def submit(self, request: Request) -> None:
        """Hands a request over and returns at once. Refusals arrive as an Output with an error."""
        ...

    def cancel(self, request_id: str) -> None:
        """Asks for a request to end; its last Output says "cancelled". Unknown ids are ignored."""
        ...

    def poll(self, timeout: float) -> list[Output]:
        """Outputs since the last call; waits up to `timeout` seconds for the first.

        Raises:
          EngineDied: the loop is gone; every request still open is lost.
        """
        ...

    def serve(
        self, models: Sequence[str], base: Sequence[str] | None = None
    ) -> tuple[ModelInfo, ...]:
        """Serves exactly these chains, and returns them: "name" in the version live in the zoo now,
        "name@version" in that one.

        Args:
          models: to serve.
          base: "name@version" of those the caller saw served: only what differs from them is changed, so
            that changes which meet are all made. None: what is served now.

        Blocks until requests submitted from now on are served so; others go on meanwhile, and those in
        flight end on the version they started with. Calls that overlap do not wait for each other's reading:
        each adds and takes away what it differs by from what was served when it was made, and returns what
        is served once it is done.

        Raises:
          UnknownChain: the zoo does not have one; nothing changed.
          ValueError: a chain cannot be read or does not fit; nothing changed.
          EngineDied: the loop is gone.
        """
        ...

    def stats(self) -> EngineStats:
        """Counters and gauges, at most a step old."""
        ...

    def close(self) -> None:
        """Stops the loop and frees what it held. Safe to call twice."""
        ...

    def agents(self) -> tuple[AgentStatus, ...]:
        """The agents of an engine that has several, each by itself; `stats` are of all together."""
        return ()

    @property
    def is_up(self) -> bool:
        """Whether requests are being computed, and not held until a new process is there."""
        return True

    def take_news(self) -> bool:
        """Whether `models` says something else than at the last call, and this front end did not ask for it:
        another one did."""
        return False

    def report_running(self, report: ReportRunning) -> None:
        """Has `report` called before each step that computes other requests than the one before. An engine
        that reports nothing is one whose process ends with all its requests under suspicion."""
        return None
