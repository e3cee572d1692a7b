"""Chat templates render as transformers renders them; tests/fixtures/make_chat.py made what is expected."""

import asyncio
import datetime
import json
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer

from jblock.chat import control_tokens, environment, template_files
from jblock.chat.render import ChatError, Conversation, render
from serving.chat.render_child import answer
from serving.text import TextCodec

FOLDER = Path(__file__).parent.parent / "fixtures" / "chat"
CASES = json.loads((FOLDER / "cases.json").read_text())
TOKENS = CASES["tokens"]
SOURCES = {path.stem: path.read_text() for path in FOLDER.glob("*.jinja")}


@pytest.mark.parametrize(
    "case", CASES["rendered"], ids=lambda c: f"{c['template']}-{c['name'].replace(' ', '_')}"
)
def test_as_transformers(case):
    source = SOURCES[case["template"]]
    conversation = Conversation(**case["conversation"])
    if "error" in case:
        with pytest.raises((ChatError, jinja2.TemplateError, TypeError)) as caught:
            render(source, conversation, TOKENS)
        if "continue_final_message" not in case["error"]:
            assert case["error"] in str(caught.value)
        return
    expected = case["text"]
    if case["template"] == "header" and "date_string" not in case["conversation"].get(
        "variables", {}
    ):
        head, _, rest = expected.partition("Today Date: ")
        expected = f"{head}Today Date: {datetime.datetime.now():%Y}{rest[4:]}"
    assert render(source, conversation, TOKENS) == expected


def test_the_table_is_whole():
    assert {c["template"] for c in CASES["rendered"]} == set(SOURCES)
    assert len(CASES["rendered"]) > 120
    assert sum("error" in c for c in CASES["rendered"]) > 5


@pytest.mark.parametrize(
    "case", CASES["encoded"], ids=lambda c: repr(c["messages"][-1]["content"])[:30]
)
def test_control_tokens_in_users_text_stay_text(case):
    codec = TextCodec(Tokenizer.from_str(CASES["tokenizer"]))
    reply = answer(
        {
            "source": SOURCES["chatml"],
            "special_tokens": TOKENS,
            "added": codec.added_tokens,
            "control": None,
            "conversation": {"messages": case["messages"]},
        }
    )
    ids = asyncio.run(codec.encode_pieces(reply["pieces"], 10_000))
    assert list(ids) == case["ids"]


def chat(*texts, **fields):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]
    return Conversation(messages=messages, **fields)


def test_variables_are_those_that_the_template_reads():
    for name, read in (("chatml", "enable_thinking"), ("macros", "style")):
        variables = environment.variables(SOURCES[name])
        assert read in variables and not variables & {"messages", "tools", "namespace", "range"}
    assert environment.variables(SOURCES["plain"]) == frozenset()
    for name in ("messages", "bos_token", "range", "strftime_now", "tokenize", "nothing"):
        with pytest.raises(
            ChatError, match=f"chat_template_kwargs.{name}: .* it reads .*date_string"
        ):
            render(SOURCES["header"], chat("x", variables={name: 1}), TOKENS)


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("chatml", False),
        ("header", False),
        ("inst", False),
        ("plain", False),
        ("turns", True),
        ("macros", True),
    ],
)
def test_content_of_parts(name, takes):
    assert environment.takes_parts(SOURCES[name]) is takes
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = render(
        SOURCES[name], Conversation(messages=[{"role": "user", "content": parts}]), TOKENS
    )
    assert ("onetwo" in text or "one+two" in text) if takes else "one\ntwo" in text


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__init__=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ raise_exception.__globals__ }}",
        "{{ '%s'.__format__ }}",
        "{{ dict.__class__.mro() }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_gets_out_of_no_sandbox(source):
    reply = answer(
        {
            "source": source,
            "special_tokens": {},
            "added": {},
            "control": None,
            "conversation": {"messages": [{"role": "user", "content": "x"}]},
        }
    )
    assert "error" in reply or reply["pieces"] == []


def test_markers_cannot_be_forged_or_left():
    tokens = control_tokens.pattern(["<a>", "<a><b>"])
    marked = control_tokens.mark({"x": ["1<a><b>2<a>3\U000f0000<a>\U000f0001"]}, tokens)["x"][0]
    assert control_tokens.pieces(marked, tokens) == [
        ("1", False),
        ("<a><b>", True),
        ("2", False),
        ("<a>", True),
        ("3", False),
        ("<a>", True),
    ]
    assert control_tokens.pieces("x\U000f0001y", tokens) == [("x", False), ("y", False)]
    assert control_tokens.unmarked(marked) == "1<a><b>2<a>3<a>"


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return template_files.load(folder)


def test_where_templates_stand(tmp_path):
    assert template_files.load(tmp_path) is None
    found = write(
        tmp_path,
        tokenizer_config__json={
            "chat_template": "config",
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "pad_token": None,
            "extra_special_tokens": {"image_token": "<i>"},
        },
        special_tokens_map__json={"pad_token": "<pad>", "eos_token": "other"},
    )
    assert (found.default, found.tool_use, found.source(True)) == ("config",) * 3
    assert found.special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "image_token": "<i>",
    }
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    found = write(tmp_path, tokenizer_config__json={"chat_template": named})
    assert (found.source(False), found.source(True)) == ("d", "t")
    assert write(tmp_path, tokenizer_config__json={"chat_template": named[1:]}) is None
    assert (
        write(
            tmp_path, tokenizer_config__json={}, chat_template__json={"chat_template": "j"}
        ).default
        == "j"
    )
    assert write(tmp_path, chat_template__jinja="file").default == "file"
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        write(tmp_path, tokenizer_config__json="{")
