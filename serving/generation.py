"""What happens to a generation, whichever protocol asked: admission, the engine, and the answer as it
grows."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Protocol

import grpc
import msgspec
from absl import logging

from jblock.chat.render import Conversation
from jblock.engine import api
from serving.changes import Changes
from serving.chat.prompts import chat_ids
from serving.chat.renderer import Renderer
from serving.chat.tool_calls import Parser, ToolCall, parser_of
from serving.dispatcher import Arrivals, Dispatcher, Ticket
from serving.errors import RequestError, invalid
from serving.metrics import Metrics
from serving.served_models import ServedModel
from serving.structured.forced_calls import ForcedParser
from serving.structured.grammars import Grammars
from serving.tenants import Tenant
from serving.text import TextStream
from serving.v1 import jblock_pb2 as pb
from serving.validation import (
    check_policy,
    num_samples,
    priority_of,
    prompt_ids,
    sampling_params,
    stop_strings,
    within_limits,
)

# A chat goes on to the model's length unless it is limited.
NO_LIMIT = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt and how to go on from it.

    Attributes:
      request: sampling, and the prompt as text or ids.
      conversation: the prompt where it is a chat.
      grammar_field: of the request that asks for `request.structured_output`, for errors.
      forced_call: it is one of `serving.structured.forced_calls`.
      pooling: as of `api.Request`; then no token is wanted.
      default_max_tokens: most tokens where the request names no limit, less where the model's length
        ends; None: the engine's own.
      deadline: seconds from the call's arrival by which the answer must be complete; None: no matter.
    """

    request: pb.GenerateRequest
    conversation: Conversation | None = None
    grammar_field: str = "structured_output"
    forced_call: bool = False
    pooling: str = ""
    default_max_tokens: int | None = None
    deadline: float | None = None


@dataclasses.dataclass(kw_only=True)
class Usage:
    """What a call took; times in seconds from its arrival."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    time_to_first_token: float = 0.0
    total_time: float = 0.0


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of one answer.

    Attributes:
      index: which answer: those of the first prompt come first.
      text: up to a stop string; may lag behind token_ids.
      tool_calls: calls of a conversation's tools, which are not in text; each comes once it is complete.
      output: ids and log-probabilities, cut to those that belong to the answer.
      finish_reason: "stop" or "length" in the last part of an answer, else None.
      model: who answers.
      prompt: the ids of its prompt.
      usage: of the whole call so far; complete in its last part.
      is_last: no answer of the call has more to come.
    """

    index: int
    text: str
    tool_calls: tuple[ToolCall, ...]
    output: api.Output
    finish_reason: str | None
    model: api.ModelInfo
    prompt: tuple[int, ...]
    usage: Usage
    is_last: bool = False


class Sink(Protocol):
    """Takes parts as they come, without a task that is woken for each."""

    @property
    def ready(self) -> bool:
        """Whether one may be pushed now, without waiting."""
        ...

    def push(self, part: Part) -> None:
        """Sends one."""
        ...


class Generator:
    """Runs the generations of one server."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        changes: Changes,
        renderer: Renderer,
        grammars: Grammars,
        metrics: Metrics,
    ):
        self._dispatcher, self._changes = dispatcher, changes
        self._renderer, self._grammars, self._metrics = renderer, grammars, metrics

    async def parts(
        self,
        asks: Sequence[Ask],
        tenant: Tenant,
        begin: float,
        held: contextlib.ExitStack,
        field: str = "n",
        sink: Sink | None = None,
    ) -> AsyncGenerator[Part, None]:
        """The answers to some prompts for one model, in parts as they come.

        Once more where the model was swapped between our look and the engine's. Leaving early cancels
        all in the engine. The answers keep their places in the queue until `held` is left.

        Args:
          asks: what to answer; each gives as many answers as its request's `n`.
          tenant: who asks.
          begin: when the call came, by the monotonic clock.
          held: takes what gives the places back.
          field: that decides how many answers there are.
          sink: is given what it can take at once, which is not given here; never the last of an answer.

        Raises:
          RequestError: the call cannot be served; then parts that came before are worth nothing.
        """
        name = asks[0].request.model
        for is_last in (False, True):
            before = self._dispatcher.models.get(name)
            try:
                with contextlib.ExitStack() as admitted:
                    answers = await self._submit(asks, tenant, begin, admitted, held, field)
                    while not answers.finished:
                        for part in await answers.parts(sink):
                            if part.is_last:
                                self._count(name, part.usage, tenant)
                            yield part
                return
            except RequestError as error:
                if error.code is not grpc.StatusCode.ABORTED or is_last:
                    raise
            held.close()
            await self._changes.replaced(before)

    async def _submit(
        self,
        asks: Sequence[Ask],
        tenant: Tenant,
        begin: float,
        admitted: contextlib.ExitStack,
        held: contextlib.ExitStack,
        field: str,
    ) -> "Answers":
        """Hands prompts to the engine, which works on them until `admitted` is left. The tenant is charged
        then for what it took."""
        model = self._dispatcher.find("model", asks[0].request.model, tenant)
        info = model.info
        for ask in asks:
            check_policy(ask.request, info)
            stop_strings(ask.request, model)
        arrived = Arrivals()
        counts = [num_samples(ask.request) for ask in asks]
        tickets = self._dispatcher.admit(arrived, tenant, sum(counts), field)
        for ticket in tickets:
            admitted.enter_context(ticket)
            held.callback(self._dispatcher.leave, ticket)
        if info.base:
            self._metrics.adapters[info.name] += len(tickets)
            admitted.callback(self._metrics.adapters.subtract, {info.name: len(tickets)})
        quotas = self._dispatcher.quotas
        quotas.request(tenant)
        answers: list[Answer] = []
        requests: list[api.Request] = []
        usage = Usage()
        output = 0
        for ask, count in zip(asks, counts, strict=True):
            prompt = await self._prompt(ask, model)
            usage.prompt_tokens += len(prompt)
            sampling = sampling_params(ask.request, model, len(prompt), ask.default_max_tokens)
            sampling = dataclasses.replace(
                sampling, grammar=await self._grammar(ask, model, tenant)
            )
            sampling = within_limits(ask.request, sampling, len(prompt), tenant)
            output += count * sampling.max_tokens
            stops = stop_strings(ask.request, model)
            priority = priority_of(ask.request, tenant)
            deadline = None
            if ask.deadline is not None:
                deadline = begin + ask.deadline - time.monotonic()
            has_tools = ask.conversation is not None and ask.conversation.tools is not None
            new_parser = parser_of(model) if has_tools else Parser
            if ask.forced_call:
                new_parser = ForcedParser
            for sample_index in range(count):
                index = len(answers)
                ticket = tickets[index]
                requests.append(
                    api.Request(
                        request_id=ticket.request_id,
                        model=info.name,
                        token_ids=prompt,
                        sampling=sample(sampling, sample_index),
                        cache_salt=tenant.cache_salt,
                        pooling=ask.pooling,
                        version=info.version,
                        tenant=tenant.name,
                        weight=tenant.weight,
                        priority=priority,
                        deadline=deadline,
                    )
                )
                stream = TextStream(model.codec, stops, sampling.min_tokens)
                answers.append(Answer(index, ticket, stream, new_parser(), info, prompt))
        # Not before all are known to be right.
        reserved = quotas.reserve(tenant, usage.prompt_tokens, output)
        admitted.callback(lambda: reserved.settle(usage.prompt_tokens + usage.completion_tokens))
        for ticket, request in zip(tickets, requests, strict=True):
            ticket.submit(request)
        return Answers(answers, arrived, usage, begin)

    async def chat_ids(self, model: ServedModel, conversation: Conversation) -> tuple[int, ...]:
        """The ids of a conversation; see `serving.chat.prompts.chat_ids`."""
        return await chat_ids(model, conversation, self._renderer)

    async def _prompt(self, ask: Ask, model: ServedModel) -> tuple[int, ...]:
        if ask.conversation is not None:
            return await chat_ids(model, ask.conversation, self._renderer)
        return await prompt_ids(ask.request, model)

    async def _grammar(self, ask: Ask, model: ServedModel, tenant: Tenant) -> str:
        """What an answer keeps to."""
        wanted, field = ask.request.structured_output, ask.grammar_field
        if wanted.WhichOneof("kind") is not None and model.codec is None:
            raise invalid(f"{field}: {model.info.name} has no tokenizer; leave it out")
        return await self._grammars.find(wanted, tenant, field)

    def _count(self, model: str, usage: Usage, tenant: Tenant) -> None:
        self._metrics.tokens.labels(model, "prompt").inc(usage.prompt_tokens)
        self._metrics.tokens.labels(model, "completion").inc(usage.completion_tokens)
        self._metrics.used(tenant, usage.prompt_tokens, usage.completion_tokens)
        if usage.completion_tokens:
            self._metrics.time_to_first_token.labels(model).observe(usage.time_to_first_token)


def sample(sampling: api.SamplingParams, index: int) -> api.SamplingParams:
    """The parameters of one of n samples: a seed of its own, and the prompt is scored only once."""
    seed = sampling.seed
    return dataclasses.replace(
        sampling,
        seed=None if seed is None else (seed + index) % 2**32,
        prompt_logprobs=sampling.prompt_logprobs and index == 0,
    )


class Answer:
    """One sample as it grows.

    Attributes:
      ticket: where its outputs come from.
      finished: its last part was made.
      may_stop: what comes may end it though the engine goes on, by a stop string.
    """

    def __init__(
        self,
        index: int,
        ticket: Ticket,
        stream: TextStream,
        parser: Parser,
        info: api.ModelInfo,
        prompt: tuple[int, ...],
    ):
        self.ticket = ticket
        self.finished = False
        self._index, self._stream, self._info, self._prompt = index, stream, info, prompt
        self._parser = parser
        self.may_stop = stream.may_stop

    def part(self, output: api.Output, usage: Usage, others_finished: bool) -> Part:
        """What an output brings: text up to a stop string, and as many ids as belong to it."""
        piece = self._stream.push(output.token_ids)
        finish_reason = "stop" if piece.stopped else output.finish_reason
        text, count = piece.text, piece.num_tokens
        if finish_reason and not piece.stopped:
            rest = self._stream.flush()
            text += rest.text
            finish_reason = "stop" if rest.stopped else finish_reason
        text, calls = self._parser.push(text, final=bool(finish_reason))
        if count < len(output.token_ids):
            output = msgspec.structs.replace(
                output,
                token_ids=output.token_ids[:count],
                logprobs=output.logprobs[:count],
                top_logprobs=output.top_logprobs[:count],
            )
        self.finished = bool(finish_reason)
        return Part(
            index=self._index,
            text=text,
            tool_calls=tuple(calls),
            output=output,
            finish_reason=finish_reason,
            model=self._info,
            prompt=self._prompt,
            usage=usage,
            is_last=self.finished and others_finished,
        )


class Answers:
    """The answers of one call.

    Attributes:
      finished: the last part of the last of them was made.
    """

    def __init__(self, answers: Sequence[Answer], arrived: Arrivals, usage: Usage, begin: float):
        """`arrived` is that of their tickets; the call came at `begin`, by the monotonic clock."""
        self._answers, self._arrived = answers, arrived
        self._usage, self._begin = usage, begin
        self._by_ticket = {answer.ticket: answer for answer in answers}

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self._answers)

    async def parts(self, sink: Sink | None = None) -> Iterator[Part]:
        """Waits for the next outputs that the sink does not take; what they bring, each made when it is asked
        for.

        Raises:
          RequestError: one of the answers failed.
        """
        if sink is not None and not self._arrived.is_set():
            self._arrived.direct = functools.partial(self._push, sink)
        try:
            await self._arrived.wait()
        finally:
            self._arrived.direct = None
        self._arrived.clear()
        if len(self._answers) == 1:
            output = self._answers[0].ticket.take()
            return iter(() if output is None else (self._part(self._answers[0], output),))
        # One that failed must be seen before the parts of others are sent.
        outputs = [(a, a.ticket.take()) for a in self._answers if not a.finished]
        return self._made([(a, output) for a, output in outputs if output is not None])

    def _push(self, sink: Sink, ticket: Ticket) -> bool:
        """Gives the sink what came, unless it ends the answer; whether it did."""
        answer = self._by_ticket[ticket]
        if ticket.ended or answer.may_stop or not sink.ready:
            return False
        try:
            output = ticket.take()
            assert output is not None
            sink.push(self._part(answer, output))
        except Exception:
            # Others wait behind this one in the same step.
            logging.exception("sending a part of an answer failed")
            ticket.fail(
                RequestError(grpc.StatusCode.INTERNAL, "server: its log says how it failed")
            )
            return False
        return True

    def _made(self, outputs: list[tuple[Answer, api.Output]]) -> Iterator[Part]:
        for answer, output in outputs:
            yield self._part(answer, output)

    def _part(self, answer: Answer, output: api.Output) -> Part:
        """The part of an output, counted."""
        others = len(self._answers) == 1 or all(
            a.finished for a in self._answers if a is not answer
        )
        part = answer.part(output, self._usage, others)
        usage, count = self._usage, len(part.output.token_ids)
        if count and not usage.completion_tokens:
            usage.time_to_first_token = time.monotonic() - self._begin
        usage.completion_tokens += count
        if part.is_last:
            usage.total_time = time.monotonic() - self._begin
        return part
