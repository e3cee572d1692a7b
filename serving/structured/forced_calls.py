"""Calls of tools that a request demands: a grammar for them, and the parser of what follows it.

What is written is a list of calls in JSON, whatever form the model's family writes its calls in: arguments
keep to the function's own schema, and nothing stands beside the calls.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serving.chat.tool_calls import Parser, ToolCall, call_of
from serving.errors import invalid
from serving.structured.json_options import JSON_OPTIONS
from serving.v1 import jblock_pb2 as pb


def forced_calls(
    tools: Sequence[Mapping[str, Any]] | None,
    name: str | None,
    field: str,
    single: bool = False,
) -> pb.StructuredOutput:
    """What has an answer call functions.

    Args:
      tools: of a conversation, as templates take them.
      name: of the only function that may be called, once; None: any, one or more.
      field: that demands it, for errors.
      single: one call and no more.

    Raises:
      RequestError: there is no such function.
    """
    functions = [tool["function"] for tool in tools or ()]
    if not functions:
        raise invalid(f"{field}: demands a call, and there are no tools; send some")
    if name is not None:
        functions = [f for f in functions if f["name"] == name][:1]
        if not functions:
            raise invalid(f"{field}: {name[:80]!r} is none of the tools; name one")
    rules = [f"call: {' | '.join(f'call_{at}' for at in range(len(functions)))}"]
    for at, function in enumerate(functions):
        begin = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
        schema = {"type": "object", **(function.get("parameters") or {})}
        schema["x-guidance"] = JSON_OPTIONS
        rules.append(f'call_{at}: {json.dumps(begin, ensure_ascii=False)} arguments_{at} "}}"')
        rules.append(f"arguments_{at}: %json {json.dumps(schema)}")
    more = "" if single or name is not None else ' (", " call)*'
    return pb.StructuredOutput(lark="\n".join([f'start: "[" call{more} "]"', *rules]))


class ForcedParser(Parser):
    """Of such an answer. Where it is cut off it stays text."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str, final: bool = False) -> tuple[str, list[ToolCall]]:
        self._text += text
        if not final:
            return "", []
        try:
            found = [call_of(value, ("arguments",)) for value in json.loads(self._text)]
        except (ValueError, RecursionError, TypeError):
            return self._text, []
        calls = [call for call in found if call is not None]
        return ("", calls) if len(calls) == len(found) else (self._text, [])
