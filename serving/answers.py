"""Answers as they grow: what an output of the engine brings to one, and the parts that clients are sent."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import grpc
import msgspec
from absl import logging

from jblock.engine import api
from serving.chat.responses import ResponseParser
from serving.chat.tool_calls import Parser, ToolCall
from serving.dispatcher import Arrivals, Direct, Ticket
from serving.errors import RequestError, invalid
from serving.text import TextStream


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
      reasoning: what the model thought, where its `response_template` tells it from the text.
      output: ids and log-probabilities, cut to those that belong to the answer.
      finish_reason: "stop" or "length" in the last part of an answer, else None.
      model: who answers; its policy is that of what it is bound to.
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
    reasoning: str = ""


class Sink(Protocol):
    """Takes parts as they come, without a task that is woken for each."""

    @property
    def ready(self) -> bool:
        """Whether one may be pushed now, without waiting."""
        ...

    def push(self, part: Part) -> None:
        """Sends one."""
        ...

    def goes_on(self, part: Part) -> bool:
        """Whether what follows a part that was sent may be given to `push_text`, if only text and ids are
        new in it."""
        ...

    def push_text(self, text: str, token_ids: Sequence[int]) -> None:
        """Sends these."""
        ...


class Answer:
    """One sample as it grows.

    Attributes:
      ticket: where its outputs come from.
      finished: its last part was made.
      may_stop: what comes may end it though the engine goes on, by a stop string.
      is_plain: what comes is sent as it is.
      text_of: the text that ids bring to one that is plain.
      parser: finds tool calls in it.
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
        self.parser = parser
        self.may_stop = stream.may_stop
        self.is_plain = type(parser) is Parser and not stream.may_stop
        self.text_of = stream.push_text

    def resume(self, token_ids: Sequence[int]) -> None:
        """Takes ids that were delivered before: what follows is told as what follows them.

        Raises:
          RequestError: the answer was complete with them.
        """
        piece = self._stream.push(token_ids)
        if piece.stopped:
            raise invalid(
                f"resume.token_ids: complete a stop string with the {piece.num_tokens}th; nothing follows"
            )
        if isinstance(self.parser, ResponseParser):
            self.parser.token_ids += token_ids
        self.parser.push(piece.text)

    def part(self, output: api.Output, usage: Usage, others_finished: bool) -> Part:
        """What an output brings: text up to a stop string, and as many ids as belong to it."""
        if output.bound is not None:
            self._info = dataclasses.replace(self._info, policy=output.bound.policy)
        piece = self._stream.push(output.token_ids)
        if self.is_plain and output.finish_reason is None:
            return Part(
                index=self._index,
                text=piece.text,
                tool_calls=(),
                output=output,
                finish_reason=None,
                model=self._info,
                prompt=self._prompt,
                usage=usage,
            )
        text, count, stopped = piece.text, piece.num_tokens, piece.stopped
        if output.finish_reason and not stopped:
            rest = self._stream.flush()
            text, stopped = text + rest.text, rest.stopped
        finish_reason = "stop" if stopped else output.finish_reason
        text, calls = self.parser.push(text, final=bool(finish_reason))
        if count < len(output.token_ids):
            output = msgspec.structs.replace(
                output,
                token_ids=output.token_ids[:count],
                logprobs=output.logprobs[:count],
                top_logprobs=output.top_logprobs[:count],
            )
        if isinstance(self.parser, ResponseParser):
            self.parser.token_ids += output.token_ids
            self.parser.stopped = stopped
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
        self._last: Part | None = None  # That was made.

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self._answers)

    def parser(self, index: int) -> Parser:
        """Of one of the answers."""
        return self._answers[index].parser

    async def parts(self, sink: Sink | None = None) -> Iterator[Part]:
        """Waits for the next outputs that the sink does not take; what they bring, each made when it is asked
        for.

        Raises:
          RequestError: one of the answers failed.
        """
        if sink is not None and not self._arrived.is_set():
            self._arrived.direct = self._direct(sink)
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

    def _direct(self, sink: Sink) -> Direct:
        """What gives the sink all that it takes."""
        whole, last = functools.partial(self._push, sink), self._last
        if last is None or len(self._answers) > 1 or not self._answers[0].is_plain:
            return whole
        output = last.output
        more = output.logprobs or output.prompt_logprobs or last.finish_reason
        if more or not output.token_ids or not sink.goes_on(last):
            return whole
        return _PlainDirect(sink, self._answers[0].text_of, self._usage, whole)

    def _push(self, sink: Sink, ticket: Ticket, output: api.Output) -> bool:
        """Gives the sink what came, which does not end the answer; whether it did."""
        answer = self._by_ticket[ticket]
        if answer.may_stop or not sink.ready:
            return False
        try:
            sink.push(self._part(answer, output))
        except Exception:
            return _failed(ticket)
        self._arrived.direct = self._direct(sink)
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
        self._last = part
        return part


class _PlainDirect:
    """Gives a sink the text and ids of an answer of which nothing else is new: this is done for every token
    of every stream, so it looks at as little as it can."""

    __slots__ = ("_sink", "_text_of", "_usage", "_whole")

    def __init__(
        self, sink: Sink, text_of: Callable[[Sequence[int]], str], usage: Usage, whole: Direct
    ):
        self._sink, self._text_of, self._usage, self._whole = sink, text_of, usage, whole

    def __call__(self, ticket: Ticket, output: api.Output) -> bool:
        if output.bound is not None:
            return self._whole(ticket, output)
        if not self._sink.ready:
            return False
        ids = output.token_ids
        try:
            self._sink.push_text(self._text_of(ids), ids)
        except Exception:
            return _failed(ticket)
        self._usage.completion_tokens += len(ids)
        return True


def _failed(ticket: Ticket) -> bool:
    """Ends an answer of which a part could not be sent: others wait behind it in the same step."""
    logging.exception("sending a part of an answer failed")
    ticket.fail(RequestError(grpc.StatusCode.INTERNAL, "server: its log says how it failed"))
    return False
