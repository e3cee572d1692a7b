"""What a model wrote as a message, as its `response_template` says: content, reasoning, tool calls.

It finds what transformers' `parse_response` finds, which reads an answer as it grows: first what the prompt
has of the message, then the answer, then its end. What might still become the beginning or the end of a field
waits for more. So the three are read one after the other here too.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from jblock.chat.response_content import ResponseError, coerced, parse, transformed
from jblock.chat.response_template import Anchor, Field, ResponseTemplate, load


def parse_response(
    spec: Any, prompt: str, answer: str, tools: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The message of an answer.

    Args:
      spec: the template, as a checkpoint has it.
      prompt: what the model was given, special tokens included.
      answer: what it wrote, special tokens included.
      tools: that it may call; their schemas say which arguments are numbers.

    Raises:
      ResponseError: the spec is no template.
      ValueError and others: the answer does not fit it.
    """
    reader = _Reader(load(spec), _parameters(tools or ()))
    reader.read_prompt(prompt)
    reader.read(answer)
    return reader.message()


def _parameters(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The properties of each function's parameters, by its name."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            schema = function.get("parameters")
            properties = schema.get("properties") if isinstance(schema, Mapping) else None
            found[function["name"]] = properties if isinstance(properties, Mapping) else {}
    return found


class _Reader:
    """Reads one answer."""

    def __init__(self, template: ResponseTemplate, parameters: Mapping[str, Mapping[str, Any]]):
        self._template, self._parameters = template, parameters
        self._message: dict[str, Any] = copy.deepcopy(dict(template.defaults))
        self._text, self._at = "", 0
        # The field that is read now, what named groups of its anchors found, and its text so far; a field
        # without a beginning is open once it has text.
        self._field: Field | None = template.implicit
        self._groups: dict[str, str] = {}
        self._body, self._is_open = "", False

    def read_prompt(self, prompt: str) -> None:
        """Takes what the prompt has of the answer: what follows the last start."""
        end = 0
        for found in self._template.start.pattern.finditer(prompt):
            end = found.end()
        if prompt[end:]:
            self._text = prompt[end:]
            self._go_on(final=False)

    def read(self, text: str) -> None:
        """Takes more of the answer."""
        self._text += text
        self._go_on(final=False)

    def message(self) -> dict[str, Any]:
        """The message; nothing follows."""
        self._go_on(final=True)
        for field in self._template.fields.values():
            if not field.optional and field.name not in self._message:
                raise ResponseError(f"response_template: the answer has no {field.name[:40]}")
        return {
            name: value
            for name, value in self._message.items()
            if name in self._template.defaults
            or not (value is None or (isinstance(value, list | dict | str) and not value))
        }

    def _go_on(self, final: bool) -> None:
        """Reads as far as it is settled what is what."""
        while True:
            found, settled = self._next(final)
            if found is None:
                self._take(len(self._text) if final else settled)
                if final:
                    self._close()
                return
            field, is_open, match = found
            self._take(match.start())
            self._at = match.end()
            groups = {name: text for name, text in match.groupdict().items() if text is not None}
            if is_open:
                self._close()
                self._field, self._groups, self._is_open = field, groups, True
                continue
            had_text = self._is_open
            self._groups.update(groups)
            self._close()
            if not had_text and match.start() == match.end():
                return  # It would be found here again and again.

    def _next(self, final: bool) -> tuple[tuple[Field, bool, Any] | None, int]:
        """The next beginning or end of a field, with whether it is a beginning, if it is settled; and up to
        where none may still come to be. The first counts, then the longest, then a beginning."""
        best: tuple[tuple, tuple[Field, bool, Any]] | None = None
        settled = len(self._text)
        for field, is_open, anchor in self._watched():
            if final:
                match = anchor.pattern.search(self._text, self._at)
            else:
                match = anchor.pattern.search(self._text, self._at, partial=True)
            if match is None:
                continue
            if not final and (match.partial or self._may_change(anchor, match)):
                settled = min(settled, match.start())
                continue
            key = (match.start(), match.start() - match.end(), not is_open, field.name)
            if best is None or key < best[0]:
                best = key, (field, is_open, match)
        if best is None or best[0][0] >= settled:
            return None, settled
        return best[1], settled

    def _watched(self) -> list[tuple[Field, bool, Anchor]]:
        """What may come next: the end of the field that is read, or any beginning where it has none."""
        field, implicit = self._field, self._template.implicit
        if field is not None and field is not implicit:
            return [(field, False, field.close)] if field.close is not None else []
        fields = self._template.fields.values()
        watched = [(f, True, f.open) for f in fields if f.open is not None]
        if implicit is not None and implicit.close is not None:
            watched.append((implicit, False, implicit.close))
        return watched

    def _may_change(self, anchor: Anchor, match: Any) -> bool:
        """Whether what was found whole would be another with more text behind it."""
        if match.end() != len(self._text):
            if anchor.is_literal:
                return False
            # A pattern may look at the end of the text: a character that is none tells.
            longer = anchor.pattern.match(self._text + "\x00", match.start())
            return (
                longer is None
                or longer.span() != match.span()
                or longer.groupdict() != match.groupdict()
            )
        return match.start() == match.end() or not anchor.is_literal or anchor.can_grow

    def _take(self, end: int) -> None:
        """Gives the text up to here to the field that is read."""
        if end > self._at:
            if self._field is not None:
                self._body += self._text[self._at : end]
                self._is_open = True
            self._at = end

    def _close(self) -> None:
        """Ends the field that is read, and keeps its value."""
        if self._field is not None and self._is_open:
            self._keep(self._field)
        self._field, self._groups = self._template.implicit, {}
        self._body, self._is_open = "", False

    def _keep(self, field: Field) -> None:
        name, value = field.name, self._value(field)
        if self._parameters:
            value = coerced(value, self._parameters)
        if field.join is not None:
            if not isinstance(value, str):
                raise ResponseError(f"{name[:40]}: is joined, and not each of it is a text")
            before = self._message.get(name)
            self._message[name] = value if before is None else before + field.join + value
        elif field.repeats:
            self._message.setdefault(name, []).append(value)
        else:
            self._message[name] = value

    def _value(self, field: Field) -> Any:
        value = parse(self._body, field.content, field.content_args)
        if field.transform is None:
            return value
        if not field.transform_each:
            return transformed(field.transform, {**self._groups, "content": value})
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise ResponseError(f"{field.name[:40]}: transform_each is of a list of objects")
        return [transformed(field.transform, {**self._groups, **item}) for item in value]
