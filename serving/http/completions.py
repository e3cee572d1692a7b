"""`POST /v1/completions`: texts that go on from prompts."""

import contextlib
import dataclasses
import time
import uuid
from typing import Any

from serving.answers import Part, Usage
from serving.errors import invalid
from serving.generation import Ask
from serving.http.calls import Call, Calls
from serving.http.events import TEXT, Prepared, event
from serving.http.exchange import decode
from serving.http.fields import Common, fill, only, set_ids, structure
from serving.http.logprobs import CompletionLogprobs, TokenTexts
from serving.http.usage import note_bound, usage_of
from serving.v1 import jblock_pb2 as pb

# OpenAI's default.
_MAX_TOKENS = 16
_MAX_PROMPTS = 256

Prompt = str | list[str | int | list[int]]


class CompletionRequest(Common, forbid_unknown_fields=True, kw_only=True):
    """The body."""

    prompt: Prompt | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: None = None
    prompt_logprobs: None = None
    add_special_tokens: bool | None = None


class Completions:
    """Answers them."""

    def __init__(self, calls: Calls):
        self._calls = calls

    async def __call__(self, call: Call) -> None:
        """Sends the whole answer, or a stream of its parts."""
        fields = decode(call.body, CompletionRequest)
        prompts = _prompts(fields)
        asks = [self._ask(call.name(fields.model), fields, prompt) for prompt in prompts]
        answer = _Answer(self._calls, call, fields, prompts)
        field = "prompt" if len(prompts) > 1 else "n"
        if fields.stream:
            await self._calls.stream(call, asks, answer, field)
            await call.sender.events(answer.last_events())
            await call.sender.done()
            return
        async with contextlib.aclosing(self._calls.parts(call, asks, field)) as parts:
            async for part in parts:
                answer.add(part)
        await call.sender.json(answer.whole())

    def _ask(self, name: str, fields: CompletionRequest, prompt: str | list[int]) -> Ask:
        request = pb.GenerateRequest(model=name)
        fill(request, fields)
        only(fields, "add_special_tokens", True)
        grammar_field = structure(request, fields)
        if fields.max_tokens == 0 and fields.echo:
            request.max_tokens = 1  # To score the prompt; the token is not shown.
        if fields.logprobs is not None:
            if not 0 <= fields.logprobs <= 20:
                raise invalid(f"logprobs: {fields.logprobs} is outside 0 to 20; ask for fewer")
            request.logprobs = True
            request.top_logprobs = fields.logprobs
            request.prompt_logprobs = bool(fields.echo)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            set_ids(request, prompt)
        return Ask(request=request, grammar_field=grammar_field, default_max_tokens=_MAX_TOKENS)


def _prompts(fields: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts of a body, one or several."""
    prompt = fields.prompt
    if prompt is None:
        raise invalid("prompt: is missing; send a text, a list of texts, or token ids")
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise invalid("best_of: this server answers as many as n says; leave it out")
    if fields.stream and fields.echo and fields.max_tokens == 0:
        raise invalid("stream: there is nothing to stream of max_tokens 0; leave it out")
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt: is empty; send a text, a list of texts, or token ids")
    if all(isinstance(item, int) for item in prompt):
        return [prompt]  # type: ignore[return-value]
    if len(prompt) > _MAX_PROMPTS:
        raise invalid(
            f"prompt: has {len(prompt)} prompts; at most {_MAX_PROMPTS} go in one request"
        )
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1 or int in kinds:
        raise invalid(
            "prompt: mixes texts and ids; send texts, or token ids, or lists of token ids"
        )
    return prompt  # type: ignore[return-value]


@dataclasses.dataclass
class _Choice:
    """One answer as it grows."""

    logprobs: CompletionLogprobs | None
    texts: list[str] = dataclasses.field(default_factory=list)
    parts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    begun: bool = False
    prepared: Prepared | None = None


class _Answer:
    """The answer to one call."""

    def __init__(
        self,
        calls: Calls,
        call: Call,
        fields: CompletionRequest,
        prompts: list[str] | list[list[int]],
    ):
        self._call, self._fields, self._prompts = call, fields, prompts
        model = calls.dispatcher.models.get(call.model)
        self._codec = model.codec if model else None
        self._texts = TokenTexts(self._codec)
        self._choices: dict[int, _Choice] = {}
        self._usage = Usage()
        options = fields.stream_options
        self._usage_last = options is not None and bool(options.include_usage)
        self._usage_always = options is not None and bool(options.continuous_usage_stats)
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": call.model,
        }

    def add(self, part: Part) -> None:
        """Takes a part."""
        choice, text, logprobs = self._piece(part)
        choice.texts.append(text)
        if logprobs is not None:
            choice.parts.append(logprobs)
        choice.finish_reason = part.finish_reason or choice.finish_reason

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": index,
                "text": "".join(choice.texts),
                "logprobs": _joined(choice.parts) if choice.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in sorted(self._choices.items())
        ]
        return {**self._head, "choices": choices, "usage": usage_of(self._usage)}

    def events(self, part: Part) -> bytes:
        """The event of a part; none of half a character."""
        choice, text, logprobs = self._piece(part)
        if not logprobs and not part.finish_reason and not self._usage_always:
            if choice.prepared is None:
                choice.prepared = Prepared(self._event(part.index, TEXT))
            return choice.prepared.of(text) if text else b""
        if not text and not logprobs and not part.finish_reason:
            return b""
        return event(self._event(part.index, text, logprobs, part.finish_reason))

    def prepared(self, index: int) -> Prepared | None:
        """See `Streamed`."""
        return self._choices[index].prepared

    def last_events(self) -> bytes:
        """What follows the parts of all answers."""
        if not self._usage_last:
            return b""
        return event({**self._head, "choices": [], "usage": usage_of(self._usage)})

    def _event(
        self, index: int, text: str, logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        content = {"index": index, "text": text, "logprobs": logprobs}
        found = {**self._head, "choices": [{**content, "finish_reason": finish_reason}]}
        if self._usage_always:
            found["usage"] = usage_of(self._usage)
        elif self._usage_last:
            found["usage"] = None
        return found

    def _piece(self, part: Part) -> tuple[_Choice, str, dict[str, Any] | None]:
        """The text and log-probabilities of a part; those of the prompt first, where it is echoed."""
        choice = self._choices.get(part.index)
        if choice is None:
            wanted = self._fields.logprobs is not None
            choice = _Choice(CompletionLogprobs(self._texts) if wanted else None)
            self._choices[part.index] = choice
            self._head.setdefault("system_fingerprint", f"{part.model.name}@{part.model.version}")
            self._head.setdefault("policy", part.model.policy)
        note_bound(self._head, part)
        self._usage = part.usage
        output, text = part.output, part.text
        if choice.logprobs is None and not self._fields.echo and self._fields.max_tokens != 0:
            return choice, text, None
        ids, logprobs = list(output.token_ids), list(output.logprobs)
        tops: list[Any] = list(output.top_logprobs) or [()] * len(ids)
        if self._fields.max_tokens == 0:
            ids, logprobs, tops, text = [], [], [], ""
        scored: list[float | None] = list(logprobs)
        if self._fields.echo and not choice.begun and (output.token_ids or part.finish_reason):
            choice.begun = True
            text = self._prompt_text(part) + text
            if choice.logprobs is not None:
                ids = [*part.prompt, *ids]
                # The first token follows nothing.
                given = output.prompt_logprobs or (0.0,) * (len(part.prompt) - 1)
                scored = [None, *given, *scored]
                best = output.prompt_top_logprobs or ((),) * (len(part.prompt) - 1)
                tops = [None, *best, *tops]
        found = choice.logprobs.of(ids, scored, tops) if choice.logprobs is not None else None
        return choice, text, found

    def _prompt_text(self, part: Part) -> str:
        prompt = self._prompts[part.index // (self._fields.n or 1)]
        if isinstance(prompt, str):
            return prompt
        return self._codec.decode(prompt, special=True) if self._codec else ""


def _joined(parts: list[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [item for part in parts for item in part[name]] for name in names}
