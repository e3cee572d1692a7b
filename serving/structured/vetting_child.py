"""The process that looks at a grammar before an engine does: whether it is one, and can be followed.

A client's schema decides how long building it takes, and llguidance can neither be stopped nor told a limit
that holds everywhere; so it is built here first, where it can be ended.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import llguidance
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from serving.limited_child import serve
from serving.structured.json_options import JSON_OPTIONS

# Bytes that are tried: what breaks later breaks its own request.
_STEPS = 48
_PRIORITY = 5
_LIMITS = llguidance.LLParserLimits(max_lexer_states=20_000, verbose_errors=False)
# What stands for something else in a regular expression.
_META = frozenset("\\.+*?()|[]{}^$&~#/-")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The grammar of a request, as llguidance writes it, or why there is none.

    Args:
      request: kind (a name of `KINDS`) and source.

    Returns:
      grammar; or error.
    """
    try:
        grammar = KINDS[request["kind"]](request["source"])
        matcher = LLMatcher(_TOKENIZER, grammar, log_level=0, limits=_LIMITS)
        _walk(matcher)
    except (ValueError, TypeError, RecursionError) as error:
        return {"error": str(error)[:500] or type(error).__name__}
    except MemoryError:
        return {"error": "it took more memory than it may"}
    if matcher.is_error():
        return {"error": _first_line(matcher.get_error())}
    return {"grammar": grammar}


def _json_schema(source: str) -> str:
    try:
        schema = json.loads(source)
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError("is no schema; send an object")
    return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)


def _regex(source: str) -> str:
    # \d, \w and \s are ASCII's, as clients mean them.
    pattern = llguidance.regex_to_lark(source, use_ascii="dws")
    return LLMatcher.grammar_from_lark(f"start: WHOLE\nWHOLE: /{pattern}/")


def _choice(source: list[str]) -> str:
    pattern = "|".join("".join(f"\\{c}" if c in _META else c for c in text) for text in source)
    return LLMatcher.grammar_from_lark(f"start: WHOLE\nWHOLE: /({_on_one_line(pattern)})/")


def _on_one_line(pattern: str) -> str:
    return pattern.replace("\n", "\\n").replace("\r", "\\r")


def _lark(source: str) -> str:
    return LLMatcher.grammar_from_lark(source if is_lark_syntax(source) else gbnf_to_lark(source))


KINDS: dict[str, Callable[[Any], str]] = {
    "json_schema": _json_schema,
    "regex": _regex,
    "choice": _choice,
    "lark": _lark,
}


def _walk(matcher: LLMatcher) -> None:
    """Follows a grammar for a while; a matcher that cannot is in error afterwards."""
    for step in range(_STEPS):
        if matcher.is_error() or matcher.is_stopped():
            return
        mask = matcher.compute_bitmask()
        ids = [i for i in range(256) if mask[i // 8] >> (i % 8) & 1]
        if not ids or matcher.is_error():
            return
        matcher.consume_token(ids[step % len(ids)])


def _first_line(error: str) -> str:
    return (error.strip().splitlines() or ["it is no grammar"])[0][:500]


_TOKENIZER = LLTokenizer("byte", slices=[])

if __name__ == "__main__":
    os.nice(_PRIORITY)  # Whoever is being answered goes first.
    serve(answer)
