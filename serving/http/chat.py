"""`POST /v1/chat/completions`: what an instruct model says next in a conversation."""

import contextlib
import dataclasses
import time
import uuid
from typing import Any, Literal

from jblock.chat.render import Conversation
from serving.answers import Part, Usage
from serving.chat.tool_calls import ToolCall
from serving.errors import invalid
from serving.generation import NO_LIMIT, Ask
from serving.http.calls import Call, Calls
from serving.http.chat_fields import ChatRequest, NamedTool, conversation_of, forces_call
from serving.http.events import TEXT, Prepared, event
from serving.http.exchange import decode
from serving.http.fields import fill, structure
from serving.http.logprobs import TokenTexts, chat_logprobs
from serving.http.usage import note_bound, usage_of
from serving.served_models import ServedModel
from serving.structured.forced_calls import forced_calls
from serving.v1 import jblock_pb2 as pb


class ChatCompletions:
    """Answers them."""

    def __init__(self, calls: Calls):
        self._calls = calls

    async def __call__(self, call: Call) -> None:
        """Sends the whole answer, or a stream of its parts."""
        fields = decode(call.body, ChatRequest)
        name = call.name(fields.model)
        model = self._calls.dispatcher.find("model", name, call.tenant)
        conversation = conversation_of(fields)
        ask = _ask(name, fields, conversation)
        answer = _Answer(call, fields, model, conversation)
        if fields.stream:
            await self._calls.stream(call, [ask], answer)
            await call.sender.events(answer.last_events())
            await call.sender.done()
            return
        async with contextlib.aclosing(self._calls.parts(call, [ask])) as parts:
            async for part in parts:
                answer.add(part)
        await call.sender.json(answer.whole())


def _ask(name: str, fields: ChatRequest, conversation: Conversation) -> Ask:
    """What the generator is asked."""
    request = _request(name, fields)
    field, forced = structure(request, fields), forces_call(fields)
    if forced:
        if request.structured_output.WhichOneof("kind") is not None:
            raise invalid(
                f"tool_choice: demands a call, which cannot go with {field}; send one of them"
            )
        named = (
            fields.tool_choice.function.name if isinstance(fields.tool_choice, NamedTool) else None
        )
        single = fields.parallel_tool_calls is False
        field = "tool_choice"
        wanted = forced_calls(conversation.tools, named, field, single)
        request.structured_output.CopyFrom(wanted)
    return Ask(
        request=request,
        conversation=conversation,
        grammar_field=field,
        forced_call=forced,
        default_max_tokens=NO_LIMIT,
    )


def _request(name: str, fields: ChatRequest) -> pb.GenerateRequest:
    """The sampling of a chat; without a limit of tokens it may go on to the model's length."""
    request = pb.GenerateRequest(model=name)
    if fields.max_completion_tokens is not None:
        if fields.max_tokens not in (None, fields.max_completion_tokens):
            raise invalid("max_tokens: differs from max_completion_tokens; send one of them")
        fields.max_tokens = fields.max_completion_tokens
    fill(request, fields)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise invalid("top_logprobs: needs logprobs true; set it, or leave top_logprobs out")
    request.logprobs = bool(fields.logprobs)
    if fields.top_logprobs is not None:
        if not 0 <= fields.top_logprobs <= 20:
            raise invalid(f"top_logprobs: {fields.top_logprobs} is outside 0 to 20; ask for fewer")
        request.top_logprobs = fields.top_logprobs
    return request


@dataclasses.dataclass
class _Choice:
    """One answer as it grows."""

    content: list[str] = dataclasses.field(default_factory=list)
    reasoning: str = ""
    calls: list[ToolCall] = dataclasses.field(default_factory=list)
    logprobs: list[Any] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    begun: bool = False
    prepared: Prepared | None = None


class _Answer:
    """The answer to one call."""

    def __init__(
        self, call: Call, fields: ChatRequest, model: ServedModel, conversation: Conversation
    ):
        self._call, self._fields = call, fields
        self._texts = TokenTexts(model.codec)
        self._echo = conversation.continue_final_message and bool(fields.echo)
        self._choices: dict[int, _Choice] = {}
        self._usage = Usage()
        options = fields.stream_options
        self._usage_last = options is not None and bool(options.include_usage)
        self._usage_always = options is not None and bool(options.continuous_usage_stats)
        kind: Literal["chat.completion.chunk", "chat.completion"]
        kind = "chat.completion.chunk" if fields.stream else "chat.completion"
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model.info.name,
            "system_fingerprint": f"{model.info.name}@{model.info.version}",
            "policy": model.info.policy,
        }

    def add(self, part: Part) -> None:
        """Takes a part."""
        self._piece(part)

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, choice in sorted(self._choices.items()):
            text = "".join(choice.content)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if choice.reasoning:
                message["reasoning_content"] = choice.reasoning
            if choice.calls:
                message["content"] = text or None
                message["tool_calls"] = [_whole_call(tool_call) for tool_call in choice.calls]
            logprobs = {"content": choice.logprobs, "refusal": None}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": logprobs if self._fields.logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
            )
        return {**self._head, "choices": choices, "usage": usage_of(self._usage)}

    def events(self, part: Part) -> bytes:
        """The events of a part."""
        choice, text, calls, logprobs = self._piece(part)
        index = part.index
        found = []
        if not choice.begun:
            choice.begun = True
            found.append(event(self._event(index, {"role": "assistant", "content": ""})))
        if part.reasoning:
            found.append(event(self._event(index, {"reasoning_content": part.reasoning})))
        if text and not logprobs and not self._usage_always:
            if choice.prepared is None:
                choice.prepared = Prepared(self._event(index, {"content": TEXT}))
            found.append(choice.prepared.of(text))
        elif text or logprobs:
            found.append(event(self._event(index, {"content": text} if text else {}, logprobs)))
        if calls:
            at = len(choice.calls) - len(calls)
            deltas = [{"index": at + i, **_whole_call(c)} for i, c in enumerate(calls)]
            found.append(event(self._event(index, {"tool_calls": deltas})))
        if part.finish_reason:
            found.append(event(self._event(index, {}, finish_reason=choice.finish_reason)))
        return b"".join(found)

    def prepared(self, index: int) -> Prepared | None:
        """See `Streamed`."""
        return self._choices[index].prepared

    def last_events(self) -> bytes:
        """What follows the parts of all answers."""
        if not self._usage_last:
            return b""
        return event({**self._head, "choices": [], "usage": usage_of(self._usage)})

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: list[Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": finish_reason,
        }
        found = {**self._head, "choices": [choice]}
        if self._usage_always:
            found["usage"] = usage_of(self._usage)
        elif self._usage_last:
            found["usage"] = None
        return found

    def _piece(self, part: Part) -> tuple[_Choice, str, list[ToolCall], list[Any]]:
        """What a part brings: text that is no tool call, calls that are complete, log-probabilities."""
        choice = self._choices.get(part.index)
        if choice is None:
            choice = self._choices[part.index] = _Choice()
            if self._echo:
                choice.content.append(_last_text(self._fields))
        note_bound(self._head, part)
        self._usage = part.usage
        choice.reasoning += part.reasoning
        text, calls = part.text, list(part.tool_calls)
        if not self._fields.stream:
            choice.content.append(text)
        choice.calls += calls
        logprobs: list[Any] = []
        if self._fields.logprobs:
            output = part.output
            found = chat_logprobs(
                self._texts, output.token_ids, output.logprobs, output.top_logprobs
            )
            logprobs = found["content"]
            choice.logprobs += logprobs
        if part.finish_reason:
            called = bool(choice.calls) and part.finish_reason == "stop"
            choice.finish_reason = "tool_calls" if called else part.finish_reason
        return choice, text, calls, logprobs


def _whole_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _last_text(fields: ChatRequest) -> str:
    content = fields.messages[-1].get("content")
    return content if isinstance(content, str) else ""
