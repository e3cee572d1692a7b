"""Answers are read by response templates as transformers reads them; tests/fixtures/make_responses.py made
what is expected."""

import json
from pathlib import Path

import pytest

from jblock.chat.response import parse_response
from jblock.chat.response_template import load

FILE = Path(__file__).parent.parent / "fixtures" / "chat" / "responses.json"
CASES = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", CASES["templates"])
def test_as_transformers(name):
    template, tools = CASES["templates"][name], CASES["tools"]
    cases = [case for case in CASES["read"] if case["template"] == name]
    assert cases
    for case in cases:
        try:
            found = {"message": parse_response(template, case["prompt"], case["answer"], tools)}
        except ValueError:
            found = {}
        assert found == {k: v for k, v in case.items() if k == "message"}, case


def test_the_table_is_whole():
    assert len(CASES["read"]) > 250
    assert 40 < sum("error" in case for case in CASES["read"]) < 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version: 2 is not known"),
        ({"more": 1}, "unknown keys more"),
        ({"fields": {}}, "has no fields"),
        ({"defaults": []}, "defaults: is no object"),
        ({"start_anchor": ""}, "start_anchor: is no text"),
        ({"start_anchor_pattern": "x"}, "both start_anchor and start_anchor_pattern"),
        ({"fields": {"a": {}, "b": {}}}, "a, b have no beginning"),
        ({"fields": {"a": {"open": []}}}, "fields.a.open: is an empty list"),
        ({"fields": {"a": {"open_pattern": "("}}}, "fields.a.open_pattern: missing"),
        ({"fields": {"a": {"open_pattern": "(?P<b>x)"}}}, "named groups"),
        ({"fields": {"a": {"content": "yaml"}}}, "fields.a.content: is none of text"),
        ({"fields": {"a": {"join": "x"}}}, "fields.a.join"),
        ({"fields": {"a": {"transform": "x {content}"}}}, "mixes a placeholder with text"),
        ({"fields": {"a": {"transform_each": True}}}, "transform_each"),
        ({"fields": {"a": []}}, "fields.a: is no object"),
    ],
)
def test_what_is_no_template_is_refused(change, words):
    good = {"start_anchor": "A:", "fields": {"content": {}}}
    assert load(good).implicit.name == "content"
    with pytest.raises(ValueError, match=words):
        load({**good, **change})


def test_live_against_transformers():
    """The same where the library is installed, on answers that are cut anywhere."""
    pytest.importorskip("transformers", minversion="5.24")
    from transformers.utils.chat_parsing import parse_response as theirs

    def read(parse, *given, **named):
        try:
            return parse(*given, **named)
        except Exception:
            return None

    tools, compared = CASES["tools"], 0
    for case in CASES["read"]:
        template = CASES["templates"][case["template"]]
        for end in range(0, len(case["answer"]), 3):
            answer = case["answer"][:end]
            expected = read(theirs, answer, template, prefix=case["prompt"], tools=tools)
            assert read(parse_response, template, case["prompt"], answer, tools) == expected, case
            compared += expected is not None
    assert compared > 1000
