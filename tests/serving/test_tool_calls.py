"""Tool calls in each family's form, however the text is cut; what is no call stays text."""

import json

import http_harness as web
import pytest
import server_harness as harness
from test_http_answers import TEMPLATE
from tokenizer_fixtures import byte_level

from serving.chat.tool_calls import HermesParser, LlamaParser, MistralParser, Parser

CALL = '{"name": "get", "arguments": {"city": "Z\\u00fcrich", "n": [1, 2]}}'
HERMES = f"<tool_call>\n{CALL}\n</tool_call>"
LLAMA = '{"name": "get", "parameters": {"city": "Zürich"}}'


def parsed(kind, text, step):
    """(text, [(name, arguments)]) of an answer that comes in pieces of `step` characters."""
    parser = kind()
    shown, calls = [], []
    for at in range(0, len(text), step):
        more, found = parser.push(text[at : at + step])
        shown.append(more)
        calls += found
    more, found = parser.push("", final=True)
    calls += found
    assert len({c.id for c in calls}) == len(calls)
    return "".join([*shown, more]), [(c.name, json.loads(c.arguments)) for c in calls]


GET = ("get", {"city": "Zürich", "n": [1, 2]})
CASES = [
    (HermesParser, HERMES, "", [GET]),
    (HermesParser, f"Let me look.\n{HERMES}", "Let me look.", [GET]),
    (HermesParser, f"{HERMES}\n{HERMES}\n", "", [GET, GET]),
    (HermesParser, f"a{HERMES}b", "ab", [GET]),
    (HermesParser, f"<tool_call>{CALL}", "", [GET]),
    (HermesParser, HERMES.removesuffix("call>"), "", [GET]),
    (HermesParser, '<tool_call>{"name": "ge', '<tool_call>{"name": "ge', []),
    (HermesParser, "<tool_call>no json</tool_c", "<tool_call>no json</tool_c", []),
    (HermesParser, "<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
    (HermesParser, '<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', []),
    (HermesParser, "plain <tool text ", "plain <tool text ", []),
    (HermesParser, "ends with <tool_c", "ends with <tool_c", []),
    (HermesParser, "two  spaces\n\nand lines\n", "two  spaces\n\nand lines\n", []),
    (HermesParser, "", "", []),
    (LlamaParser, LLAMA, "", [("get", {"city": "Zürich"})]),
    (LlamaParser, f"<|python_tag|>{LLAMA}; {LLAMA}", "", [("get", {"city": "Zürich"})] * 2),
    (LlamaParser, f" {LLAMA}\n", "", [("get", {"city": "Zürich"})]),
    (LlamaParser, '{"no": "call"}', '{"no": "call"}', []),
    (LlamaParser, "{ not json", "{ not json", []),
    (LlamaParser, f"{LLAMA} and text", f"{LLAMA} and text", []),
    (LlamaParser, "text { x }", "text { x }", []),
    (LlamaParser, "<b>", "<b>", []),
    (MistralParser, f"[TOOL_CALLS] [{CALL}, {CALL}]", "", [GET, GET]),
    (MistralParser, f"[{CALL}]", "", [GET]),
    (MistralParser, '[TOOL_CALLS]get[ARGS]{"a": 1}', "", [("get", {"a": 1})]),
    (MistralParser, 'get{"a": 1}[TOOL_CALLS]now{}', "", [("get", {"a": 1}), ("now", {})]),
    (MistralParser, "[1, 2] are numbers", "[1, 2] are numbers", []),
    (MistralParser, "[]", "[]", []),
    (MistralParser, "plain text {x}", "plain text {x}", []),
    (Parser, HERMES, HERMES, []),
]


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].__name__}-{c[1][:30]!r}")
def test_however_it_is_cut(case, step):
    kind, text, shown, calls = case
    assert parsed(kind, text, step) == (shown, calls)


@pytest.mark.parametrize("kind", [HermesParser, LlamaParser, MistralParser])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "<tool_call>" * 20_000, "{" * 100_000]
)
def test_what_nests_without_end_is_text(kind, text):
    shown, calls = parsed(kind, text, 50_000)
    assert calls == []
    assert kind is HermesParser or shown == text


def test_ids_are_what_templates_take():
    (call,) = MistralParser().push(f"[{CALL}]", final=True)[1]
    assert len(call.id) == 9 and call.id.isalnum()
    (call,) = HermesParser().push(HERMES, final=True)[1]
    assert call.id.startswith("call_")


RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<s>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<call:(?P<name>\w+)>",
            "close": "</call>",
            "content": "json",
            "repeats": True,
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"close": "</s>"},
    },
}
TOOL = {
    "type": "function",
    "function": {"name": "get", "parameters": {"properties": {"n": {"type": "integer"}}}},
}


def test_a_models_own_template_over_both_protocols(tmp_path):
    """The mock answers with its prompt, so that is written as the model is to answer."""
    config = {"chat_template": TEMPLATE, "response_template": RESPONSE_TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    says = 'I <think>hm</think>look. <call:get>{"n": "3"}</call><call:now>{}</call>'
    length = len(byte_level().encode(f"<s>user: {says}</s>").ids)
    body = {"model": "echo", "messages": [{"role": "user", "content": says}], "temperature": 0}
    body |= {"max_tokens": length - 1, "tools": [TOOL]}
    with harness.serving(harness.mock(tmp_path), http_port=0) as running:

        def ask(**more):
            path = "/v1/chat/completions"
            return web.ask(running.server.http_port, path, {**body, **more})

        message = ask().json["choices"][0]["message"]
        assert message["content"] == "<s>user: I look."[-5:]
        assert message["reasoning_content"] == "hm"
        assert [c["function"] for c in message["tool_calls"]] == [
            {"name": "get", "arguments": '{"n": 3}'},
            {"name": "now", "arguments": "{}"},
        ]
        assert len({c["id"] for c in message["tool_calls"]}) == 2
        deltas = [e["choices"][0]["delta"] for e in ask(stream=True).events]
        assert "".join(d.get("content") or "" for d in deltas) == message["content"]
        assert [d["reasoning_content"] for d in deltas if "reasoning_content" in d] == ["hm"]
        (calls,) = [d["tool_calls"] for d in deltas if "tool_calls" in d]
        assert [c["function"]["name"] for c in calls] == ["get", "now"]
        # Cut off in a call: what does not fit the template stays text, without special tokens.
        cut = ask(max_tokens=length - 8).json["choices"][0]
        assert "tool_calls" not in cut["message"] and cut["finish_reason"] == "length"
        assert cut["message"]["content"].startswith("user: I <think>hm</think>look. <call:get>")
        stopped = ask(stop=["<call:now"]).json["choices"][0]
        assert [c["function"]["name"] for c in stopped["message"]["tool_calls"]] == ["get"]
        assert stopped["finish_reason"] == "tool_calls"
        answer = running.client.chat("echo", says, tools=[TOOL], max_tokens=length - 1)
        assert [c.name for c in answer.tool_calls] == ["get", "now"] and "look." in answer.text
        plain = running.client.chat("echo", says, max_tokens=length - 1)
        assert plain.text == f"user: {says}" and not plain.tool_calls
