"""The process that renders chat templates: it answers one JSON message with another, and holds nothing else.

Templates come with checkpoints, so they are code of others: one that loops for ever or builds a huge text is
stopped with its process, by the limits below or by the parent.
"""

import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

import jinja2

from jblock.chat import control_tokens, environment
from jblock.chat.render import ChatError, Conversation, render

MAX_MEMORY_BYTES = 512 * 10**6
# Characters of a rendered conversation.
MAX_TEXT = 16 * 10**6
_HEAD = struct.Struct(">I")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The text of a conversation, or why there is none.

    Args:
      request: source of the template, special_tokens, added (content by whether it is special),
        control (names of control tokens, or null) and conversation (fields of `Conversation`).

    Returns:
      pieces of text, each with whether it is to be encoded as plain text; or error, with kind "refused" where
      the messages are to blame and "template" where the template is.
    """
    try:
        source = request["source"]
        found = control_tokens.pattern(_control_tokens(source, request))
        everything = control_tokens.pattern(request["added"])
        fields = dict(request["conversation"])
        for name in ("messages", "tools", "documents"):
            fields[name] = control_tokens.mark(fields.get(name), found)
        fields["variables"] = control_tokens.mark(fields.get("variables") or {}, found)
        text = render(source, Conversation(**fields), request["special_tokens"])
        if len(text) > MAX_TEXT:
            return _error("template", f"it wrote {len(text)} characters")
        return {"pieces": control_tokens.pieces(text, everything)}
    except ChatError as error:
        return _error("refused", str(error))
    except jinja2.TemplateSyntaxError as error:
        return _error("template", f"line {error.lineno}: {error}")
    except jinja2.exceptions.SecurityError as error:
        return _error("template", str(error))
    except jinja2.TemplateError as error:
        return _error("refused", f"messages: the model's chat template refuses them: {error}")
    except MemoryError:
        return _error("template", "it took more memory than it may")
    except RecursionError:
        return _error("template", "it calls itself without end")
    except Exception as error:  # Whatever an expression of a template may raise.
        return _error(
            "refused",
            f"messages: the model's chat template fails on them: {type(error).__name__}: {error}",
        )


def _control_tokens(source: str, request: dict[str, Any]) -> list[str]:
    """Added tokens that only the template may write."""
    named = request["control"]
    known = set(named) if named is not None else None
    text = environment.literals(source) if known is None else ""
    return [
        token
        for token, special in request["added"].items()
        if special
        or (token in known if known is not None else token in text and not token.isspace())
    ]


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"kind": kind, "error": control_tokens.unmarked(message)[:2000]}


def _limit() -> None:
    """Takes away what no template needs."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    size = _HEAD.unpack(head)[0]
    data = stream.read(size)
    return data if len(data) == size else None


def main() -> None:
    """Answers until its parent closes the pipe. Its argument is the seconds of CPU time that one answer may
    take: SIGPROF ends the process then, wherever in C the template is."""
    _limit()
    seconds = float(sys.argv[1])
    given, taken = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What anything prints goes to the log.
    while (data := _read(given)) is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = json.dumps(answer(json.loads(data))).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        taken.write(_HEAD.pack(len(reply)) + reply)
        taken.flush()


if __name__ == "__main__":
    main()
