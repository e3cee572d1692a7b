"""The process that renders chat templates, and reads answers by response templates: it answers one JSON
message with another, and holds nothing else.

Templates come with checkpoints, so they are code of others: one that loops for ever or builds a huge text is
stopped with its process, by the limits below or by the parent.
"""

import json
from typing import Any

import jinja2

from jblock.chat import control_tokens, environment
from jblock.chat.render import ChatError, Conversation, render
from jblock.chat.response import parse_response
from serving.limited_child import serve

# Characters of a rendered conversation, and of a message.
MAX_TEXT = 16 * 10**6


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The text of a conversation, or the message that an answer is; or why there is none.

    Args:
      request: source of the template, special_tokens, added (content by whether it is special),
        control (names of control tokens, or null) and conversation (fields of `Conversation`); or
        response_template, and prompt, answer and tools as `parse_response` takes them.

    Returns:
      pieces of text, each with whether it is to be encoded as plain text, or message; or error, with kind
      "refused" where the messages are to blame and "template" where the template is.
    """
    if "response_template" in request:
        return _message(request)
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


def _message(request: dict[str, Any]) -> dict[str, Any]:
    """What an answer is by its response template."""
    template, tools = request["response_template"], request["tools"]
    try:
        message = parse_response(template, request["prompt"], request["answer"], tools)
        length = len(json.dumps(message, allow_nan=False))
        if length > MAX_TEXT:
            return _error("template", f"it made a message of {length} characters")
        return {"message": message}
    except MemoryError:
        return _error("template", "it took more memory than it may")
    except Exception as error:  # Whatever a pattern may raise, on whatever a model may write.
        return _error("refused", f"{type(error).__name__}: {error}")


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


if __name__ == "__main__":
    serve(answer)
