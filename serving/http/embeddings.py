"""`POST /v1/embeddings`: what a model makes of texts, as vectors."""

import array
import base64
import contextlib
import sys
from typing import Any, Literal

import msgspec

from serving.errors import invalid
from serving.generation import Ask
from serving.http.calls import Call, Calls
from serving.http.exchange import decode
from serving.http.fields import set_ids
from serving.messages import unit
from serving.v1 import jblock_pb2 as pb

_MAX_INPUTS = 256


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    user: str | None = None
    # Ours.
    pooling: Literal["mean", "last"] | None = None
    normalize: bool | None = None
    policy: Literal["exact", "near", "adaptive"] | None = None


class Embeddings:
    """Answers them."""

    def __init__(self, calls: Calls):
        self._calls = calls

    async def __call__(self, call: Call) -> None:
        """Sends the vectors in the order of the inputs."""
        fields = decode(call.body, EmbeddingRequest)
        name = call.name(fields.model)
        asks = [_ask(name, fields, one) for one in _inputs(fields)]
        found: dict[int, Any] = {}
        tokens = 0
        async with contextlib.aclosing(self._calls.parts(call, asks, "input")) as parts:
            async for part in parts:
                vector = part.output.embedding
                found[part.index] = vector if fields.normalize is False else unit(vector)
                tokens = part.usage.prompt_tokens
        encoded = fields.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(vector) if encoded else list(vector),
            }
            for index, vector in sorted(found.items())
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        await call.sender.json({"object": "list", "data": data, "model": name, "usage": usage})


def _ask(name: str, fields: EmbeddingRequest, given: str | list[int]) -> Ask:
    request = pb.GenerateRequest(model=name, max_tokens=1)
    if isinstance(given, str):
        request.text = given
    else:
        set_ids(request, given)
    if fields.policy is not None:
        request.policy = pb.Policy.Value(f"POLICY_{fields.policy.upper()}")
    return Ask(request=request, pooling=fields.pooling or "last")


def _inputs(fields: EmbeddingRequest) -> list[Any]:
    """What is to be embedded, one or several."""
    given = fields.input
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("input: is empty; send a text, a list of texts, or token ids")
    if all(isinstance(item, int) for item in given):
        return [given]
    if len(given) > _MAX_INPUTS:
        raise invalid(f"input: has {len(given)} inputs; at most {_MAX_INPUTS} go in one request")
    if len({type(item) for item in given}) > 1:
        raise invalid("input: mixes texts and ids; send texts, or lists of token ids")
    return given


def _base64(vector: Any) -> str:
    """float32, little-endian, as OpenAI's clients read it."""
    values = array.array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()
