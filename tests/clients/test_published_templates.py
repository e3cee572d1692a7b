"""Chat templates as packages publish them, rendered as transformers renders them."""

import datetime
import importlib.metadata
import re
from pathlib import Path

import pytest

from jblock.chat.environment import takes_parts
from jblock.chat.render import Conversation, render

pytestmark = [pytest.mark.clients, pytest.mark.long]
PACKAGES = ("trl", "axolotl")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def templates():
    """Every chat template in the packages that are here."""
    for package in PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.suffix == ".jinja" and "template" in str(file):
                yield pytest.param(Path(file.locate()), id=f"{package}-{file.stem}")


TEMPLATES = list(templates())


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Which é"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich"}},
}
RESULT = {"role": "tool", "name": "weather", "content": '{"deg": 3}', "tool_call_id": "call00001"}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
CONVERSATIONS = {
    "one": {"messages": [user("Why <b>?")]},
    "whole": {"messages": [user("a"), assistant("b")], "add_generation_prompt": False},
    "turns": {"messages": [user(" a "), assistant("b"), user("c\n"), assistant("d"), user("e")]},
    "system": {"messages": [SYSTEM, user("x"), assistant("y"), user("z")]},
    "reasoning": {
        "messages": [user("x"), assistant("4", reasoning_content="2 and 2"), user("and 3?")]
    },
    "thought in text": {
        "messages": [user("x"), assistant("<think>\nso\n</think>\n\n4"), user("?")]
    },
    "parts": {"messages": [user([{"type": "text", "text": "p"}, {"type": "text", "text": "q"}])]},
    "tools": {"messages": [SYSTEM, user("x")], "tools": [TOOL]},
    "tools alone": {"messages": [user("x")], "tools": [TOOL, TOOL]},
    "called": {
        "messages": [user("x"), assistant(None, tool_calls=[CALL]), RESULT],
        "tools": [TOOL],
    },
    "called and said": {
        "messages": [
            user("x"),
            assistant("I ask.", tool_calls=[CALL]),
            RESULT,
            assistant("3"),
            user("y"),
        ],
        "tools": [TOOL],
    },
    "results": {
        "messages": [user("x"), assistant("", tool_calls=[CALL, CALL]), RESULT, RESULT],
        "tools": [TOOL],
    },
    "go on": {"messages": [user("x"), assistant("The sky")], "continue_final_message": True},
    "assistant first": {"messages": [assistant("x"), user("y")]},
    "two users": {"messages": [user("x"), user("y")]},
    "odd role": {"messages": [{"role": "critic", "content": "x"}]},
    "nothing": {"messages": []},
}


def as_transformers(source, conversation):
    """What transformers makes of it; None: an error."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given = dict(conversation)
    # As `apply_chat_template` does before it renders.
    given["messages"] = [{k: v for k, v in m.items() if v is not None} for m in given["messages"]]
    go_on = given.pop("continue_final_message", False)
    try:
        texts, _ = render_jinja_template(
            conversations=[given.pop("messages")],
            chat_template=source,
            add_generation_prompt=given.pop("add_generation_prompt", not go_on),
            continue_final_message=go_on,
            **given,
            **SPECIAL,
        )
    except Exception:
        return None
    return texts[0]


def as_ours(source, conversation):
    go_on = conversation.get("continue_final_message", False)
    given = {"add_generation_prompt": not go_on, **conversation}
    try:
        return render(source, Conversation(**given), SPECIAL)
    except Exception:
        return None


def without_clock(text):
    """A template may say the time; it may be another minute by now."""
    now = datetime.datetime.now()
    return text and re.sub(rf"\b{now:%H}:\d\d(:\d\d)?\b", "TIME", text)


def test_there_are_some():
    if not TEMPLATES:
        pytest.skip(
            f"NOT COMPARED: none of {', '.join(PACKAGES)} is installed; `make clients` has them"
        )
    assert len(TEMPLATES) > 40


@pytest.mark.parametrize("path", TEMPLATES)
def test_every_conversation_is_rendered_alike(path):
    pytest.importorskip("transformers", reason="NOT COMPARED: `make clients` has transformers")
    source = path.read_text()
    rendered = 0
    for name, conversation in CONVERSATIONS.items():
        found = as_ours(source, conversation)
        if name == "parts" and not takes_parts(source):
            # Transformers writes a list of Python's, or fails; ours is the text of the parts.
            conversation = {"messages": [user("p\nq")]}
        expected = as_transformers(source, conversation)
        assert without_clock(found) == without_clock(expected), name
        rendered += expected is not None
    assert rendered > 2
