"""What happens to a generation, whichever protocol asked: admission, the engine, and the answer as it
grows."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator, Sequence

import grpc

from jblock.chat.render import Conversation
from jblock.engine import api
from serving.changes import Changes
from serving.chat.prompts import chat_ids
from serving.chat.renderer import Renderer
from serving.chat.tool_calls import Parser, ToolCall, parser_of
from serving.dispatcher import Dispatcher, Ticket
from serving.errors import RequestError
from serving.metrics import Metrics
from serving.served_models import ServedModel
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
      default_max_tokens: most tokens where the request names no limit, less where the model's length
        ends; None: the engine's own.
      deadline: seconds from the call's arrival by which the answer must be complete; None: no matter.
    """

    request: pb.GenerateRequest
    conversation: Conversation | None = None
    default_max_tokens: int | None = None
    deadline: float | None = None


@dataclasses.dataclass(kw_only=True)
class Usage:
    """What a call took; times in seconds from its arrival."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    time_to_first_token: float = 0.0
    total_time: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
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


class Generator:
    """Runs the generations of one server."""

    def __init__(
        self, dispatcher: Dispatcher, changes: Changes, renderer: Renderer, metrics: Metrics
    ):
        self._dispatcher, self._changes = dispatcher, changes
        self._renderer, self._metrics = renderer, metrics

    async def parts(
        self,
        asks: Sequence[Ask],
        tenant: Tenant,
        begin: float,
        held: contextlib.ExitStack,
        field: str = "n",
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

        Raises:
          RequestError: the call cannot be served; then parts that came before are worth nothing.
        """
        name = asks[0].request.model
        for is_last in (False, True):
            before = self._dispatcher.models.get(name)
            try:
                with contextlib.ExitStack() as admitted:
                    usage = Usage()
                    answers = await self._submit(asks, tenant, begin, usage, admitted, held, field)
                    while not answers.finished:
                        for part in await answers.parts(usage):
                            if part.output.token_ids and not usage.completion_tokens:
                                usage.time_to_first_token = time.monotonic() - begin
                            usage.completion_tokens += len(part.output.token_ids)
                            if part.is_last:
                                usage.total_time = time.monotonic() - begin
                                self._count(name, usage, tenant)
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
        usage: Usage,
        admitted: contextlib.ExitStack,
        held: contextlib.ExitStack,
        field: str,
    ) -> "Answers":
        """Hands prompts to the engine, which works on them until `admitted` is left. The tenant is charged
        then for what `usage` says."""
        model = self._dispatcher.find("model", asks[0].request.model, tenant)
        info = model.info
        for ask in asks:
            check_policy(ask.request, info)
            stop_strings(ask.request, model)
        arrived = asyncio.Event()
        counts = [num_samples(ask.request) for ask in asks]
        tickets = self._dispatcher.admit(arrived, tenant, sum(counts), field)
        for ticket in tickets:
            admitted.enter_context(ticket)
            held.callback(self._dispatcher.leave, ticket)
        quotas = self._dispatcher.quotas
        quotas.request(tenant)
        answers: list[Answer] = []
        requests: list[api.Request] = []
        output = 0
        for ask, count in zip(asks, counts, strict=True):
            prompt = await self._prompt(ask, model)
            usage.prompt_tokens += len(prompt)
            sampling = sampling_params(ask.request, model, len(prompt), ask.default_max_tokens)
            sampling = within_limits(ask.request, sampling, len(prompt), tenant)
            output += count * sampling.max_tokens
            stops = stop_strings(ask.request, model)
            priority = priority_of(ask.request, tenant)
            deadline = None
            if ask.deadline is not None:
                deadline = begin + ask.deadline - time.monotonic()
            has_tools = ask.conversation is not None and ask.conversation.tools is not None
            new_parser = parser_of(model) if has_tools else Parser
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
        return Answers(answers, arrived)

    async def chat_ids(self, model: ServedModel, conversation: Conversation) -> tuple[int, ...]:
        """The ids of a conversation; see `serving.chat.prompts.chat_ids`."""
        return await chat_ids(model, conversation, self._renderer)

    async def _prompt(self, ask: Ask, model: ServedModel) -> tuple[int, ...]:
        if ask.conversation is not None:
            return await chat_ids(model, ask.conversation, self._renderer)
        return await prompt_ids(ask.request, model)

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
            output = dataclasses.replace(
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

    def __init__(self, answers: Sequence[Answer], arrived: asyncio.Event):
        """`arrived` is that of their tickets."""
        self._answers, self._arrived = answers, arrived

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self._answers)

    async def parts(self, usage: Usage) -> Iterator[Part]:
        """Waits for the next outputs; what they bring, each made when it is asked for.

        Raises:
          RequestError: one of the answers failed.
        """
        await self._arrived.wait()
        self._arrived.clear()
        # One that failed must be seen before the parts of others are sent.
        outputs = [(a, a.ticket.take()) for a in self._answers if not a.finished]
        return self._made([(a, output) for a, output in outputs if output is not None], usage)

    def _made(self, outputs: list[tuple[Answer, api.Output]], usage: Usage) -> Iterator[Part]:
        for answer, output in outputs:
            others = all(a.finished for a in self._answers if a is not answer)
            yield answer.part(output, usage, others)
