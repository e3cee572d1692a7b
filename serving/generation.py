"""The answers to one request: what the engine brought to each sample, as messages."""

import asyncio
import collections
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

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
        self._index, self._stream, self._info = index, stream, info

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
            policy=pb.Policy.Value(f"POLICY_{self._info.policy.upper()}"),
            model=self._info.name,
            model_version=self._info.version,
            index=self._index,
        )
        if finish_reason:
            self.finished = True
            part.finish_reason = _FINISH[finish_reason]
        return part


async def merged(answers: Sequence[Answer]) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
    """The parts of all answers as they come, each to its end.

    Raises:
      RequestError: one of them failed.
    """
    if len(answers) == 1:
        (answer,) = answers
        while not answer.finished:
            yield answer.part(await answer.ticket.next())
        return
    waits = {asyncio.create_task(answer.ticket.next()): answer for answer in answers}
    try:
        while waits:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            # One that failed must be seen before the parts of others are sent.
            outputs = [(task, task.result()) for task in done]
            for task, output in outputs:
                answer = waits.pop(task)
                part = answer.part(output)
                if not answer.finished:
                    waits[asyncio.create_task(answer.ticket.next())] = answer
                yield part
    finally:
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


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
