"""What happens to a generation, whichever protocol asked: admission, the engine, and the answer as it
grows."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncGenerator, Callable, Sequence

import grpc
import msgspec

from jblock.chat.render import Conversation
from jblock.engine import api
from serving.answers import Answer, Answers, Part, Sink, Usage
from serving.call_info import CallInfo
from serving.changes import Changes
from serving.chat.prompts import chat_ids
from serving.chat.renderer import Renderer
from serving.chat.responses import ResponseParser
from serving.chat.tool_calls import Parser, parser_of
from serving.dispatcher import Arrivals, Dispatcher
from serving.errors import RequestError, invalid, named_first
from serving.metrics import Metrics
from serving.request_log import RequestLog
from serving.served_models import ServedModel
from serving.structured.forced_calls import ForcedParser
from serving.structured.grammars import Grammars
from serving.tenants import Tenant
from serving.text import TextStream
from serving.v1 import jblock_pb2 as pb
from serving.validation import (
    accepted,
    check_policy,
    num_samples,
    priority_of,
    prompt_ids,
    resumed_ids,
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


class Generator:
    """Runs the generations of one server."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        changes: Changes,
        renderer: Renderer,
        grammars: Grammars,
        metrics: Metrics,
        request_log: RequestLog | None = None,
    ):
        self._dispatcher, self._changes = dispatcher, changes
        self._request_log = request_log
        self._renderer, self._grammars, self._metrics = renderer, grammars, metrics

    async def parts(
        self,
        asks: Sequence[Ask],
        call: CallInfo,
        field: str = "n",
        sink: Sink | None = None,
    ) -> AsyncGenerator[Part, None]:
        """The answers to some prompts for one model, in parts as they come.

        Once more where the model was swapped between our look and the engine's. Leaving early cancels
        all in the engine. The answers keep their places in the queue until `call.held` is left.

        Args:
          asks: what to answer; each gives as many answers as its request's `n`.
          call: who asks, and when; it learns what the answers took.
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
                    answers = await self._submit(asks, call, admitted, field)
                    while not answers.finished:
                        for part in await answers.parts(sink):
                            if part.finish_reason:
                                part = await self._read(part, answers)
                            if part.is_last:
                                self._count(name, part.usage, call.tenant)
                            yield part
                return
            except RequestError as error:
                if error.code is not grpc.StatusCode.ABORTED or is_last:
                    raise
            call.held.close()
            await self._changes.replaced(before)

    def ended(
        self,
        call: CallInfo,
        name: str,
        code: grpc.StatusCode,
        refusal: RequestError | None = None,
    ) -> None:
        """Counts and logs a call that is over, which asked for a model of this name."""
        # A name that is not served must not become a label: they would grow without bound.
        model = name if name in self._dispatcher.models else ""
        self._metrics.ended(model, code, time.monotonic() - call.begin, call.tenant)
        if self._request_log is not None:
            field = None if refusal is None else named_first(refusal)
            self._request_log.ended(call, model, code, field)

    async def _submit(
        self,
        asks: Sequence[Ask],
        call: CallInfo,
        admitted: contextlib.ExitStack,
        field: str,
    ) -> "Answers":
        """Hands prompts to the engine, which works on them until `admitted` is left. The tenant is charged
        then for what it took."""
        tenant = call.tenant
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
            call.held.callback(self._dispatcher.leave, ticket)
            ticket.adapter = info.name if info.base else ""
        quotas = self._dispatcher.quotas
        quotas.request(tenant)
        answers: list[Answer] = []
        requests: list[api.Request] = []
        usage = call.usage = Usage()
        output = resumed_tokens = 0
        for ask, count in zip(asks, counts, strict=True):
            prompt = await self._prompt(ask, model)
            usage.prompt_tokens += len(prompt)
            sampling = sampling_params(ask.request, model, len(prompt), ask.default_max_tokens)
            sampling = dataclasses.replace(
                sampling, grammar=await self._grammar(ask, model, tenant)
            )
            sampling = within_limits(ask.request, sampling, len(prompt), tenant)
            resumed = resumed_ids(ask.request, model, sampling)
            resumed_tokens += len(resumed)
            output += count * (sampling.max_tokens - len(resumed))
            stops = stop_strings(ask.request, model)
            priority = priority_of(ask.request, tenant)
            policy, max_damage = accepted(ask.request)
            deadline = None
            if ask.deadline is not None:
                deadline = call.begin + ask.deadline - time.monotonic()
            new_parser = _new_parser(ask, model, prompt, stops)
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
                        generated=resumed,
                        tenant=tenant.name,
                        weight=tenant.weight,
                        priority=priority,
                        deadline=deadline,
                        policy=policy,
                        max_damage=max_damage,
                    )
                )
                stream = TextStream(model.codec, stops, sampling.min_tokens)
                answers.append(Answer(index, ticket, stream, new_parser(), info, prompt))
                answers[-1].resume(resumed)
        # Not before all are known to be right.
        given = usage.prompt_tokens + resumed_tokens
        reserved = quotas.reserve(tenant, given, output)
        admitted.callback(lambda: reserved.settle(given + usage.completion_tokens))
        for ticket, request in zip(tickets, requests, strict=True):
            ticket.submit(request)
        return Answers(answers, arrived, usage, call.begin)

    async def _read(self, part: Part, answers: Answers) -> Part:
        """The last part of an answer, which its parser may have held until now."""
        parser = answers.parser(part.index)
        if not isinstance(parser, ResponseParser):
            return part
        text, reasoning, calls = await parser.read(self._renderer)
        return msgspec.structs.replace(
            part, text=text, reasoning=reasoning, tool_calls=tuple(calls)
        )

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


def _new_parser(
    ask: Ask, model: ServedModel, prompt: Sequence[int], stops: Sequence[str]
) -> Callable[[], Parser]:
    """What finds tool calls in an answer."""
    tools = ask.conversation.tools if ask.conversation is not None else None
    if ask.forced_call:
        return ForcedParser
    if tools is None:
        return Parser
    if model.template is not None and model.template.response_template is not None:
        return functools.partial(ResponseParser, model, prompt, tools, stops)
    return parser_of(model)


def sample(sampling: api.SamplingParams, index: int) -> api.SamplingParams:
    """The parameters of one of n samples: a seed of its own, and the prompt is scored only once."""
    seed = sampling.seed
    return dataclasses.replace(
        sampling,
        seed=None if seed is None else (seed + index) % 2**32,
        prompt_logprobs=sampling.prompt_logprobs and index == 0,
    )
