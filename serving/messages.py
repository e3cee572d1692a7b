"""Parts of an answer as messages of `jblock.v1`."""

import collections
import functools
import math
from collections.abc import AsyncIterator, Sequence

from serving.answers import Part
from serving.v1 import jblock_pb2 as pb

_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
_POLICIES = {
    name: pb.Policy.Value(f"POLICY_{name.upper()}") for name in ("exact", "near", "adaptive")
}


def to_bytes(part: Part) -> bytes:
    """The message of a part, encoded."""
    output = part.output
    logprobs = output.logprobs or output.prompt_logprobs
    if part.finish_reason or part.tool_calls or logprobs or output.bound:
        return to_message(part).SerializeToString()
    return plain_bytes(part.text, output.token_ids, constant_of(part))


def constant_of(part: Part) -> bytes:
    """What all messages of an answer have, encoded."""
    model = part.model
    return _constant(model.policy, model.name, model.version, part.index)


def plain_bytes(text: str, token_ids: Sequence[int], constant: bytes) -> bytes:
    """A message of text and ids, encoded. Messages one behind the other are one message, so what all of an
    answer have is encoded once."""
    data, ids = text.encode(), b"".join(map(_varint, token_ids))
    return b"%b%b%b%b%b%b%b" % (
        _TEXT,
        _varint(len(data)),
        data,
        _IDS,
        _varint(len(ids)),
        ids,
        constant,
    )


def _tag(field: str) -> bytes:
    """What stands before the length and the bytes of a field."""
    return _varint(pb.GenerateStreamResponse.DESCRIPTOR.fields_by_name[field].number << 3 | 2)


def _varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    if number < 0x80:
        return bytes((number,))
    if number < 0x4000:
        return bytes((number & 0x7F | 0x80, number >> 7))
    return bytes((number & 0x7F | 0x80,)) + _varint(number >> 7)


_TEXT, _IDS = _tag("text"), _tag("token_ids")


@functools.lru_cache(4096)
def _constant(policy: str, model: str, version: int, index: int) -> bytes:
    return pb.GenerateStreamResponse(
        policy=_POLICIES[policy], model=model, model_version=version, index=index
    ).SerializeToString()


def to_message(part: Part) -> pb.GenerateStreamResponse:
    """The message of a part."""
    output = part.output
    message = pb.GenerateStreamResponse(
        text=part.text,
        token_ids=output.token_ids,
        logprobs=output.logprobs,
        top_logprobs=[_top(tokens) for tokens in output.top_logprobs],
        prompt_logprobs=output.prompt_logprobs,
        prompt_top_logprobs=[_top(tokens) for tokens in output.prompt_top_logprobs],
        tool_calls=[
            pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
            for call in part.tool_calls
        ],
        policy=_POLICIES[part.model.policy],
        model=part.model.name,
        model_version=part.model.version,
        index=part.index,
    )
    if output.bound is not None:
        message.assembly.served_as = output.bound.served_as
        message.assembly.measure = output.bound.measure
        message.assembly.damage = output.bound.damage
    if part.finish_reason:
        message.finish_reason = _FINISH[part.finish_reason]
    if part.is_last:
        usage = part.usage
        message.usage.prompt_tokens = usage.prompt_tokens
        message.usage.completion_tokens = usage.completion_tokens
        message.usage.time_to_first_token = usage.time_to_first_token
        message.usage.total_time = usage.total_time
    return message


async def collect(parts: AsyncIterator[Part]) -> pb.GenerateResponse:
    """A stream as one message."""
    samples: dict[int, pb.GenerateResponse] = collections.defaultdict(pb.GenerateResponse)
    texts: dict[int, list[str]] = collections.defaultdict(list)
    usage = pb.Usage()
    async for part in parts:
        message = to_message(part)
        texts[part.index].append(part.text)
        usage.MergeFrom(message.usage)
        for field in ("text", "index", "usage"):
            message.ClearField(field)
        # The fields have the same numbers in both messages.
        samples[part.index].MergeFromString(message.SerializeToString())
    for index, sampled in samples.items():
        sampled.text = "".join(texts[index])
    response = samples[0]
    if len(samples) > 1:
        response.choices.extend(_choice(samples[index]) for index in sorted(samples))
    response.usage.CopyFrom(usage)
    return response


def to_score(part: Part) -> pb.ScoreResponse:
    """The log-probabilities of a prompt, from the first part that follows it."""
    output = part.output
    return pb.ScoreResponse(
        token_ids=part.prompt,
        logprobs=output.prompt_logprobs,
        best=[pb.TokenLogprob(token_id=i, logprob=p) for ((i, p),) in output.prompt_top_logprobs],
        total=math.fsum(output.prompt_logprobs),
        policy=_POLICIES[part.model.policy],
        model=part.model.name,
        model_version=part.model.version,
    )


def _choice(answer: pb.GenerateResponse) -> pb.Choice:
    return pb.Choice(
        text=answer.text,
        token_ids=answer.token_ids,
        logprobs=answer.logprobs,
        finish_reason=answer.finish_reason,
        top_logprobs=answer.top_logprobs,
        tool_calls=answer.tool_calls,
    )


def _top(tokens: tuple[tuple[int, float], ...]) -> pb.TopLogprobs:
    return pb.TopLogprobs(tokens=[pb.TokenLogprob(token_id=i, logprob=p) for i, p in tokens])


def to_embedding(part: Part, scaled: bool) -> pb.EmbedResponse:
    """The vector that a part brought; of length 1 if `scaled`."""
    vector = part.output.embedding
    return pb.EmbedResponse(
        embedding=unit(vector) if scaled else vector,
        prompt_tokens=part.usage.prompt_tokens,
        policy=_POLICIES[part.model.policy],
        model=part.model.name,
        model_version=part.model.version,
    )


def unit(vector: Sequence[float]) -> list[float]:
    """A vector at length 1; one of length 0 as it is."""
    length = math.hypot(*vector)
    return [value / length for value in vector] if length else list(vector)
