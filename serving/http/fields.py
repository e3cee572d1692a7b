"""The fields of OpenAI's requests, and vLLM's beside them, as far as the engine has what they ask for.

A field that is not here is refused by name. Those that a client may send only to say that it does not want
something (`suffix: null`, `best_of: 1`) are here with the one value that they may have.
"""

from typing import Any, Literal

import msgspec

from serving.errors import invalid
from serving.v1 import jblock_pb2 as pb


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """A schema that the answer keeps to, `strict` or not."""

    name: str
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's: one of these is what the answer keeps to."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of completion have."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # Labels of the client's own, that change no answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    # vLLM's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    use_beam_search: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    # Ours.
    policy: Literal["exact", "near", "adaptive"] | None = None
    max_damage: float | None = None


# Fields that may be sent with the one value that asks for nothing.
_ONLY = {
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "use_beam_search": False,
    "store": False,
}


def only(fields: msgspec.Struct, name: str, value: bool) -> None:
    """Whether a field is left out, or has the one value that is supported.

    Raises:
      RequestError: it has another.
    """
    if getattr(fields, name, None) not in (None, value):
        raise invalid(f"{name}: {str(not value).lower()} is not supported; leave it out")


def fill(request: pb.GenerateRequest, fields: Common) -> None:
    """Puts the sampling fields of a body into a request, with OpenAI's defaults.

    Raises:
      RequestError: a value does not fit its field.
    """
    for name, allowed in _ONLY.items():
        only(fields, name, allowed)
    # An answer is random unless asked otherwise; the engine's own default is greedy.
    request.temperature = 1.0 if fields.temperature is None else fields.temperature
    for name in _PLAIN:
        value = getattr(fields, name)
        if value is not None:
            _set(request, name, value)
    if fields.top_k is not None:
        _set(request, "top_k", 0 if fields.top_k == -1 else fields.top_k)
    if fields.seed is not None:
        request.seed = fields.seed % 2**32
    if fields.stop is not None:
        request.stop.extend([fields.stop] if isinstance(fields.stop, str) else fields.stop)
    if fields.stop_token_ids is not None:
        _extend("stop_token_ids", request.stop_token_ids, fields.stop_token_ids)
    for token, bias in (fields.logit_bias or {}).items():
        if not token.isdecimal() or len(token) > 9:
            raise invalid(
                f"logit_bias.{token[:20]}: is no token id; its names are ids, such as 50256"
            )
        request.logit_bias[int(token)] = bias
    if fields.max_damage is not None:
        request.max_damage = fields.max_damage
    if fields.policy is not None:
        request.policy = pb.Policy.Value(f"POLICY_{fields.policy.upper()}")


def structure(request: pb.GenerateRequest, fields: Common) -> str:
    """Puts what the answer is to keep to into a request; the field that says so.

    Raises:
      RequestError: there are several, or one is incomplete.
    """
    wanted, form, other = (
        request.structured_output,
        fields.response_format,
        fields.structured_outputs,
    )
    if form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema is None:
            raise invalid("response_format.json_schema.schema: is missing; send a schema")
        wanted.json_schema = _json(form.json_schema.schema)
    elif form is not None and form.json_schema is not None:
        raise invalid('response_format.json_schema: goes with the type "json_schema" only')
    elif form is not None and form.type == "json_object":
        wanted.json_schema = _ANY_OBJECT
    if other is None:
        return "response_format"
    given = {n: v for n in other.__struct_fields__ if (v := getattr(other, n)) not in (None, False)}
    if len(given) != 1:
        names = ", ".join(other.__struct_fields__)
        raise invalid(f"structured_outputs: has {len(given)} of {names}; send exactly one")
    if wanted.WhichOneof("kind") is not None:
        raise invalid("structured_outputs: cannot go with response_format; send one of them")
    ((kind, value),) = given.items()
    if kind == "json":
        wanted.json_schema = value if isinstance(value, str) else _json(value)
    elif kind == "json_object":
        wanted.json_schema = _ANY_OBJECT
    elif kind == "choice":
        wanted.choice.texts.extend(value)
    elif kind == "regex":
        wanted.regex = value
    else:
        wanted.lark = value
    return f"structured_outputs.{kind}"


_ANY_OBJECT = '{"type": "object"}'


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def set_ids(request: pb.GenerateRequest, ids: list[int]) -> None:
    """A prompt of token ids.

    Raises:
      RequestError: one is far from any id.
    """
    request.token_ids.SetInParent()
    _extend("prompt", request.token_ids.ids, ids)


_PLAIN = (
    "max_tokens",
    "top_p",
    "min_p",
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "priority",
)


def _set(request: pb.GenerateRequest, name: str, value: Any) -> None:
    try:
        setattr(request, name, value)
    except (ValueError, TypeError) as error:
        raise invalid(f"{name}: {value!r} does not fit ({error}); send a smaller number") from error


def _extend(name: str, field: Any, ids: list[int]) -> None:
    try:
        field.extend(ids)
    except (ValueError, TypeError) as error:
        raise invalid(f"{name}: {error}; send token ids") from error
