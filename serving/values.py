"""What a client gives and gets: plain values, so that callers need not know the proto."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import grpc

from serving.v1 import jblock_pb2 as pb


class ClientError(RuntimeError):
    """A request failed.

    Attributes:
      code: name of the gRPC status, such as "INVALID_ARGUMENT".
      message: what the server said.
      by_server: an UNAVAILABLE that the server said itself, and not what is seen where there is none.
    """

    def __init__(self, code: str, message: str, by_server: bool = False):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.by_server = by_server

    @classmethod
    def of(cls, error: grpc.RpcError) -> "ClientError":
        """From what a stub raises; it is a call too, and knows its status."""
        call: Any = error
        given = {name for name, _ in call.trailing_metadata() or ()}
        return cls(call.code().name, call.details() or "", "grpc-status-details-bin" in given)


class Sampling(TypedDict, total=False):
    """The optional keywords of a generation; see `GenerateRequest` for their defaults."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: bool
    n: int
    priority: int
    json_schema: Mapping[str, Any] | str
    regex: str
    choice: Sequence[str]
    lark: str
    policy: Literal["exact", "near", "adaptive"]
    max_damage: float


def _names(enum: Any, prefix: str) -> Mapping[int, str]:
    """ "stop" for FINISH_REASON_STOP, and so on. A number newer than this client goes as text."""
    return {v.number: v.name.removeprefix(prefix).lower() for v in enum.DESCRIPTOR.values}


_POLICIES = _names(pb.Policy, "POLICY_")
_FINISH_REASONS = _names(pb.FinishReason, "FINISH_REASON_")

Message = Mapping[str, Any]
"""Of a chat: role and content; tool_calls, tool_call_id, name and reasoning_content where there are some.
A tool call is a ToolCall, or a mapping of its fields."""

TopLogprobs = tuple[tuple[int, float], ...]
"""(id, log-probability) pairs, best first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call of a function that the model asks for; `arguments` is JSON."""

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One of n samples; fields as in `Chunk`."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None
    top_logprobs: tuple[TopLogprobs, ...]
    tool_calls: tuple[ToolCall, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What a request took: counts of tokens, and seconds from its arrival at the server."""

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float
    total_time: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembly:
    """What answered in place of a model's own blocks: the model and the edges used, and of the measure that
    the server goes by how much damage that was measured to do."""

    served_as: str
    measure: str
    damage: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a stream, or with `generate` the whole.

    Attributes:
      text: new text; may lag behind token_ids.
      token_ids: new ids.
      logprobs: one for each of token_ids if asked for, else empty.
      finish_reason: "stop" or "length" in the last part, else None.
      usage: in the last part, else None.
      policy: "exact", "near" or "adaptive".
      model: who answered.
      model_version: in which version.
      assembly: what stood for the model's own blocks, in the first part of a sample; None: nothing did.
      top_logprobs: one for each of token_ids if asked for, else empty.
      prompt_logprobs: of each prompt token but the first, with the first token, if asked for.
      tool_calls: calls of a chat's tools; they are not in text.
      prompt_top_logprobs: the best token beside each of prompt_logprobs.
      index: which of n samples of a stream this belongs to.
      choices: with `generate`, all samples if n is above 1; the fields above are then the first's,
        and usage is of all together.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None
    usage: Usage | None
    policy: str
    model: str
    model_version: int
    assembly: Assembly | None = None
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top_logprobs: tuple[TopLogprobs, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    index: int = 0
    choices: tuple[Choice, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A served model; see the proto's message of that name."""

    name: str
    version: int
    family: str
    vocab_size: int
    max_model_len: int
    has_tokenizer: bool
    base: str
    blocks: int
    shared_blocks: int
    has_chat_template: bool = False


def to_chat(
    messages: str | Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    continue_final_message: bool = False,
    template_variables: Mapping[str, Any] | None = None,
    tool_choice: str = "",
) -> pb.Chat:
    """The message of a conversation; a string is what the user says.

    Raises:
      ValueError: a value does not fit its field.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    try:
        return pb.Chat(
            messages=[_message(m) for m in messages],
            tools=[_function(t) for t in tools],
            continue_final_message=continue_final_message,
            tool_choice=tool_choice,
            template_variables={n: json.dumps(v) for n, v in (template_variables or {}).items()},
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"messages: {error}; see serving.values.Message for the fields") from error


def _message(message: Message) -> pb.ChatMessage:
    fields = {name: value for name, value in message.items() if value is not None}
    calls = [
        dataclasses.asdict(c) if isinstance(c, ToolCall) else dict(c)
        for c in fields.pop("tool_calls", ())
    ]
    return pb.ChatMessage(**fields, tool_calls=[pb.ToolCall(**call) for call in calls])


def _function(tool: Mapping[str, Any]) -> pb.Function:
    """A function; in OpenAI's form it stands within another mapping."""
    fields = dict(tool.get("function", tool))
    parameters = fields.pop("parameters", None)
    if parameters is not None and not isinstance(parameters, str):
        parameters = json.dumps(parameters, ensure_ascii=False)
    return pb.Function(**fields, parameters=parameters or "")


def to_request(
    model: str, prompt: str | Sequence[int] | pb.Chat, sampling: Sampling
) -> pb.GenerateRequest:
    """The message of a request; a string is text, what is no chat token ids.

    Raises:
      ValueError: a value does not fit its field.
    """
    try:
        fields: dict[str, Any] = dict(sampling)
        structured = {n: fields.pop(n) for n in _STRUCTURED if n in fields}
        if structured:
            fields["structured_output"] = _structured_output(structured)
        if "policy" in fields:
            fields["policy"] = pb.Policy.Value(f"POLICY_{str(fields['policy']).upper()}")
        request = pb.GenerateRequest(model=model, **fields)
        if isinstance(prompt, str):
            request.text = prompt
        elif isinstance(prompt, pb.Chat):
            request.chat.CopyFrom(prompt)
        else:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(prompt)
    except (TypeError, ValueError) as error:
        raise ValueError(f"request: {error}; see serving.values.Sampling for the fields") from error
    return request


_STRUCTURED = ("json_schema", "regex", "choice", "lark")


def _structured_output(fields: Mapping[str, Any]) -> pb.StructuredOutput:
    """What an answer keeps to; exactly one field may be there."""
    if len(fields) > 1:
        raise ValueError(f"{' and '.join(fields)} cannot go together, send one of them")
    ((name, value),) = fields.items()
    if name == "choice":
        return pb.StructuredOutput(choice=pb.Choices(texts=value))
    if name == "json_schema" and not isinstance(value, str):
        value = json.dumps(value)
    return pb.StructuredOutput(**{name: value})


def to_load(name: str, version: int) -> pb.LoadModelRequest:
    """The message that loads a model.

    Raises:
      ValueError: a value does not fit its field.
    """
    try:
        return pb.LoadModelRequest(name=name, version=version)
    except (TypeError, ValueError) as error:
        raise ValueError(f"request: {error}; give a name and a version number") from error


def to_chunk(message: pb.GenerateResponse | pb.GenerateStreamResponse) -> Chunk:
    """The values of an answer."""
    usage = None
    if message.HasField("usage"):
        usage = Usage(**{f.name: getattr(message.usage, f.name) for f in dataclasses.fields(Usage)})
    policy = message.policy
    return Chunk(
        **_answer(message),
        usage=usage,
        policy=_POLICIES.get(policy) or str(policy),
        model=message.model,
        model_version=message.model_version,
        assembly=_assembly(message),
        prompt_logprobs=tuple(message.prompt_logprobs),
        prompt_top_logprobs=_tops(message.prompt_top_logprobs),
        index=getattr(message, "index", 0),
        choices=tuple([Choice(**_answer(c)) for c in getattr(message, "choices", ())]),
    )


def _assembly(message: pb.GenerateResponse | pb.GenerateStreamResponse) -> Assembly | None:
    if not message.HasField("assembly"):
        return None
    names = [f.name for f in dataclasses.fields(Assembly)]
    return Assembly(**{name: getattr(message.assembly, name) for name in names})


def _answer(message: pb.GenerateResponse | pb.GenerateStreamResponse | pb.Choice) -> dict[str, Any]:
    """The fields that a sample has everywhere."""
    reason = message.finish_reason
    return {
        "text": message.text,
        "token_ids": tuple(message.token_ids),
        "logprobs": tuple(message.logprobs),
        "finish_reason": (_FINISH_REASONS.get(reason) or str(reason)) if reason else None,
        "top_logprobs": _tops(message.top_logprobs),
        "tool_calls": tuple(
            [ToolCall(id=c.id, name=c.name, arguments=c.arguments) for c in message.tool_calls]
        ),
    }


def _tops(tops: Any) -> tuple[TopLogprobs, ...]:
    return tuple([tuple([(t.token_id, t.logprob) for t in top.tokens]) for top in tops])


def to_model(message: pb.Model) -> Model:
    """The values of a model."""
    return Model(**{f.name: getattr(message, f.name) for f in dataclasses.fields(Model)})
