"""The answers to one request: what the engine brought to each sample, as messages."""

import asyncio
import collections
import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence

from jblock.engine import api
from serving.dispatcher import Ticket
from serving.text import TextStream
from serving.v1 import jblock_pb2 as pb

_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


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

    def __init__(self, index: int, ticket: Ticket, stream: TextStream, info: api.ModelInfo):
        self.ticket = ticket
        self.finished = False
        self._stream = stream
        self._fields = {
            "policy": pb.Policy.Value(f"POLICY_{info.policy.upper()}"),
            "model": info.name,
            "model_version": info.version,
            "index": index,
        }

    def part(self, output: api.Output) -> pb.GenerateStreamResponse:
        """The message of an output: text up to a stop string, and as many ids as belong to it."""
        piece = self._stream.push(output.token_ids)
        finish_reason = "stop" if piece.stopped else output.finish_reason
        text, count = piece.text, piece.num_tokens
        if finish_reason and not piece.stopped:
            rest = self._stream.flush()
            text += rest.text
            finish_reason = "stop" if rest.stopped else finish_reason
        part = pb.GenerateStreamResponse(
            text=text,
            token_ids=output.token_ids[:count],
            logprobs=output.logprobs[:count],
            top_logprobs=[_top(tokens) for tokens in output.top_logprobs[:count]],
            prompt_logprobs=output.prompt_logprobs,
            **self._fields,
        )
        if finish_reason:
            self.finished = True
            part.finish_reason = _FINISH[finish_reason]
        return part


class Answers:
    """The samples of one request.

    Attributes:
      finished: the last part of the last of them was made.
    """

    def __init__(self, answers: Sequence[Answer], arrived: asyncio.Event):
        """`arrived` is that of their tickets."""
        self._answers, self._arrived = answers, arrived

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self._answers)

    async def parts(self) -> Iterator[pb.GenerateStreamResponse]:
        """Waits for the next outputs; their messages, each made when it is asked for.

        Raises:
          RequestError: one of the samples failed.
        """
        await self._arrived.wait()
        self._arrived.clear()
        # One that failed must be seen before the parts of others are sent.
        outputs = [(a, a.ticket.take()) for a in self._answers if not a.finished]
        return (answer.part(output) for answer, output in outputs if output is not None)


async def collect(parts: AsyncIterator[pb.GenerateStreamResponse]) -> pb.GenerateResponse:
    """A stream as one message."""
    samples: dict[int, pb.GenerateResponse] = collections.defaultdict(pb.GenerateResponse)
    texts: dict[int, list[str]] = collections.defaultdict(list)
    usage = pb.Usage()
    async for part in parts:
        index = part.index
        texts[index].append(part.text)
        usage.MergeFrom(part.usage)
        for field in ("text", "index", "usage"):
            part.ClearField(field)
        # The fields have the same numbers in both messages.
        samples[index].MergeFromString(part.SerializeToString())
    for index, sampled in samples.items():
        sampled.text = "".join(texts[index])
    response = samples[0]
    if len(samples) > 1:
        response.choices.extend(_choice(samples[index]) for index in sorted(samples))
    response.usage.CopyFrom(usage)
    return response


def _choice(answer: pb.GenerateResponse) -> pb.Choice:
    return pb.Choice(
        text=answer.text,
        token_ids=answer.token_ids,
        logprobs=answer.logprobs,
        finish_reason=answer.finish_reason,
        top_logprobs=answer.top_logprobs,
    )


def _top(tokens: tuple[tuple[int, float], ...]) -> pb.TopLogprobs:
    return pb.TopLogprobs(tokens=[pb.TokenLogprob(token_id=i, logprob=p) for i, p in tokens])
