"""What the HTTP API answers: completions, chats, models, tokenizers."""

import json

import pytest
import server_harness as harness
from http_harness import ask
from tokenizer_fixtures import byte_level

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}</s>{% endfor %}"
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}{{ tone | default('') }}"
)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "</s>"})
    )
    with harness.serving(harness.mock(folder), http_port=0) as one:
        yield one
        assert harness.eventually(one.is_empty)


@pytest.fixture
def post(running):
    def send(path, content=None):
        answer = ask(running.server.http_port, path, content)
        assert answer.status == 200, answer.body
        return answer

    return send


def encode(text):
    return byte_level().encode(text).ids


def complete(prompt, **fields):
    return {"model": "echo", "prompt": prompt, "temperature": 0, **fields}


def test_a_completion(post):
    ids = encode("hello héllo")
    answer = post("/v1/completions", complete("hello héllo", max_tokens=len(ids))).json
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert (answer["model"], answer["system_fingerprint"], answer["policy"]) == (
        "echo",
        "echo@3",
        "exact",
    )
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "text": "hello héllo",
        "logprobs": None,
        "finish_reason": "length",
    }
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": len(ids),
        "total_tokens": 2 * len(ids),
    }


def test_defaults_are_openais(running, post, monkeypatch):
    seen = []
    submit = running.engine.submit
    monkeypatch.setattr(
        running.engine, "submit", lambda request: seen.append(request) or submit(request)
    )
    post("/v1/completions", {"model": "echo", "prompt": [300]})
    post("/v1/chat/completions", {"model": "echo", "messages": [{"role": "user", "content": "x"}]})
    first, second = (request.sampling for request in seen)
    assert (first.temperature, first.top_p, first.max_tokens) == (1.0, 1.0, 16)
    assert (second.temperature, second.max_tokens) == (1.0, 1024 - len(seen[1].token_ids))


def test_many_prompts_and_samples(post):
    prompts = ["hello", "the cat", "你好"]
    answer = post("/v1/completions", complete(prompts, n=2, max_tokens=8)).json
    texts = [c["text"] for c in answer["choices"]]
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    for at, prompt in enumerate(prompts):
        expected = byte_level().decode((encode(prompt) * 8)[:8])
        assert texts[2 * at] == texts[2 * at + 1] == expected
    # A prompt counts once, however many answers it has.
    assert answer["usage"]["prompt_tokens"] == sum(len(encode(p)) for p in prompts)
    assert answer["usage"]["completion_tokens"] == 48
    ids = post("/v1/completions", complete([encode(p) for p in prompts], n=2, max_tokens=8)).json
    assert [c["text"] for c in ids["choices"]] == texts


def test_a_stream_is_the_answer_in_parts(post):
    content = complete("hello 🙂 the cat", max_tokens=30, n=2, logprobs=2, stop="cat")
    whole = post("/v1/completions", content).json
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = post(
        "/v1/completions", {**content, "stream": True, "stream_options": options}
    ).events
    for choice in whole["choices"]:
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert "".join(p["text"] for p in parts) == choice["text"] == "hello 🙂 the "
        assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + ["stop"]
        found = [p["logprobs"] for p in parts if p["logprobs"]]
        for name, values in choice["logprobs"].items():
            assert [v for f in found for v in f[name]] == values
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(set(e["usage"]) == set(whole["usage"]) for e in events)
    quiet = post("/v1/completions", {**content, "stream": True}).events
    assert all("usage" not in e and e["choices"] for e in quiet)


def test_log_probabilities_as_harnesses_read_them(post):
    ids = encode("hello the cat")
    content = complete([ids], echo=True, logprobs=1, max_tokens=1)
    (choice,) = post("/v1/completions", content).json["choices"]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(ids) + 1
    assert (
        "".join(found["tokens"])
        == choice["text"]
        == "hello the cat" + byte_level().decode([ids[0]])
    )
    assert found["token_logprobs"] == [None, *[-0.25] * (len(ids) - 1), -0.5]
    assert found["top_logprobs"][0] is None
    for at, (score, top) in enumerate(
        zip(found["token_logprobs"][1:-1], found["top_logprobs"][1:-1], strict=True)
    ):
        # The mock's every other token is the best one: greedy if and only if the values are equal.
        assert (score == max(top.values())) == bool(at % 2)
    assert found["text_offset"] == [
        len("".join(found["tokens"][:at])) for at in range(len(found["tokens"]))
    ]
    (scored,) = post("/v1/completions", {**content, "max_tokens": 0}).json["choices"]
    assert scored["text"] == "hello the cat"
    assert scored["logprobs"]["token_logprobs"] == found["token_logprobs"][:-1]


def test_tokens_that_are_parts_of_characters(post):
    ids = encode("🙂")
    assert len(ids) > 1
    content = complete([300, *ids], max_tokens=1 + len(ids), logprobs=0)
    (choice,) = post("/v1/completions", content).json["choices"]
    tokens = choice["logprobs"]["tokens"][1:]
    assert all(token.startswith("bytes:\\x") for token in tokens)
    raw = bytes.fromhex("".join(t.removeprefix("bytes:").replace("\\x", "") for t in tokens))
    assert raw.decode() == "🙂"


def chat(*messages, **fields):
    return {"model": "echo", "messages": list(messages), "temperature": 0, **fields}


def user(content):
    return {"role": "user", "content": content}


def test_a_chat(post):
    text = "<s>user: hello</s><s>"
    ids = byte_level().encode(text, add_special_tokens=False).ids
    answer = post("/v1/chat/completions", chat(user("hello"), max_completion_tokens=len(ids))).json
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "user: hello", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    parts = chat(user([{"type": "text", "text": "hello"}]), max_tokens=len(ids))
    assert post("/v1/chat/completions", parts).json["choices"] == answer["choices"]


def test_a_chat_in_parts(post):
    content = chat(user("hello 🙂"), max_tokens=20, logprobs=True, top_logprobs=2, n=2)
    whole = post("/v1/chat/completions", content).json
    options = {"include_usage": True}
    *events, last = post(
        "/v1/chat/completions", {**content, "stream": True, "stream_options": options}
    ).events
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(p["delta"].get("content", "") for p in parts) == choice["message"]["content"]
        assert parts[-1]["finish_reason"] == "length" and parts[-1]["delta"] == {}
        found = [entry for p in parts if p["logprobs"] for entry in p["logprobs"]["content"]]
        assert found == choice["logprobs"]["content"] and len(found) == 20
        assert {len(entry["top_logprobs"]) for entry in found} == {2}
        for entry in found:
            token, raw = entry["token"], bytes(entry["bytes"])
            escaped = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            assert token.encode() == raw or token == escaped
    assert last["usage"] == whole["usage"]


def test_control_tokens_of_users_stay_text(post):
    answer = post("/tokenize", {"model": "echo", "messages": [user("a</s>b<s>")]}).json
    special = [byte_level().token_to_id(t) for t in ("<s>", "</s>")]
    assert [i for i in answer["tokens"] if i in special] == [special[0], special[1], special[0]]
    assert (
        byte_level().decode(answer["tokens"], skip_special_tokens=False)
        == "<s>user: a</s>b<s></s><s>"
    )


def test_tools_are_written_and_read(running, post):
    tool = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}
    call = '<tool_call>{"name": "get", "arguments": {"a": 1}}</tool_call>'
    # The mock echoes the prompt: so the call that stands in it is what the model writes.
    ids = post("/tokenize", {"model": "echo", "messages": [user(call)]}).json["count"]
    content = chat(user(call), tools=[tool], max_tokens=ids - 2)
    (choice,) = post("/v1/chat/completions", content).json["choices"]
    (found,) = choice["message"]["tool_calls"]
    assert found["function"] == {"name": "get", "arguments": '{"a": 1}'}
    assert (found["type"], choice["message"]["content"]) == ("function", "user:")
    events = post("/v1/chat/completions", {**content, "stream": True}).events
    deltas = [e["choices"][0]["delta"] for e in events]
    (streamed,) = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
    assert streamed["index"] == 0 and streamed["function"] == found["function"]
    assert "".join(d.get("content", "") for d in deltas) == "user:"
    quiet = post("/v1/chat/completions", {**content, "tool_choice": "none"}).json["choices"][0]
    assert call[:20] in quiet["message"]["content"] and "tool_calls" not in quiet["message"]
    # Arguments that come back as text reach the template as an object.
    called = {"role": "assistant", "content": None, "tool_calls": [found]}
    result = {"role": "tool", "content": "1", "tool_call_id": found["id"]}
    ids = post("/tokenize", {"model": "echo", "messages": [user("x"), called, result]}).json[
        "tokens"
    ]
    assert '"arguments": {"a": 1}' in byte_level().decode(ids)


BAD_CHATS = {
    "no messages": ({"messages": []}, "messages", "messages: is empty"),
    "missing messages": ({"messages": None}, "messages", "messages: Expected `array`"),
    "role": (
        {"messages": [{"role": "boss", "content": "x"}]},
        "messages[0].role",
        "'boss' is none of system",
    ),
    "no content": (
        {"messages": [{"role": "user"}]},
        "messages[0].content",
        "is missing; send a text",
    ),
    "image": (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]},
        "messages[0].content[0]",
        "'image_url' is no part of text",
    ),
    "message field": (
        {"messages": [{**user("x"), "color": 1}]},
        "messages[0].color",
        "is no field of a message",
    ),
    "format": ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
    "forced tool": ({"tool_choice": "required"}, "tool_choice", "no tools"),
    "variables": ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x", "it reads tone"),
    "messages variable": (
        {"chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs.messages",
        "reads no such variable",
    ),
    "template": ({"chat_template": "x"}, "chat_template", "this server has no such field"),
    "two limits": ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "send one of them"),
    "top_logprobs": ({"top_logprobs": 1}, "top_logprobs", "needs logprobs true"),
    "continued": (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "set add_generation_prompt false",
    ),
    "too long": (
        {"messages": [user("the cat " * 3000)]},
        "messages",
        "more tokens than echo takes",
    ),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_a_bad_chat_names_its_field(running, case):
    fields, field, message = BAD_CHATS[case]
    answer = ask(running.server.http_port, "/v1/chat/completions", {**chat(user("x")), **fields})
    assert (answer.status, answer.error["param"]) == (400, field), answer.body
    assert message in answer.error["message"]


def test_a_model_without_a_template(running):
    answer = ask(running.server.http_port, "/v1/chat/completions", chat(user("x"), model="ids"))
    assert answer.status == 400
    assert "messages: ids has no chat template; send a prompt" in answer.error["message"]


def test_variables_of_the_template(post):
    plain = post("/tokenize", {"model": "echo", "messages": [user("x")]}).json["tokens"]
    content = {"model": "echo", "messages": [user("x")], "chat_template_kwargs": {"tone": "calm"}}
    assert (
        byte_level().decode(post("/tokenize", content).json["tokens"])
        == byte_level().decode(plain) + "calm"
    )


def test_models(post):
    listed = post("/v1/models").json
    cards = {card["id"]: card for card in listed["data"]}
    assert listed["object"] == "list" and "echo" in cards
    assert (cards["adapter"]["parent"], cards["echo"]["parent"]) == ("echo", None)
    assert cards["echo"]["root"] == "echo@3"
    assert post("/v1/models/echo").json == cards["echo"]
    assert [c["id"] for c in post("/m/echo/v1/models").json["data"]] == ["echo"]


def test_a_model_in_the_path(running, post):
    content = {"prompt": "hello", "max_tokens": 3, "temperature": 0}
    assert post("/m/echo/v1/completions", content).json["model"] == "echo"
    assert post("/m/echo/v1/completions", {**content, "model": "echo"}).json["model"] == "echo"
    other = ask(running.server.http_port, "/m/echo/v1/completions", {**content, "model": "ids"})
    assert (other.status, other.error["param"]) == (400, "model")
    assert ask(running.server.http_port, "/m/nobody/v1/completions", content).status == 404


def test_tokenize_and_back(running, post):
    answer = post(
        "/tokenize", {"model": "echo", "prompt": "hello <s>", "return_token_strs": True}
    ).json
    assert answer["tokens"] == encode("hello <s>")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 1024)
    assert answer["token_strs"][-1] == "<s>"
    back = post("/m/echo/detokenize", {"tokens": answer["tokens"]}).json
    assert back == {"prompt": "hello <s>"}
    info = post("/m/echo/tokenizer_info").json
    assert (info["eos_token"], info["chat_template"]) == ("</s>", TEMPLATE)
    bad = ask(running.server.http_port, "/detokenize", {"model": "echo", "tokens": [1, -1]})
    assert (bad.status, bad.error["param"]) == (400, "tokens[1]")
    none = ask(running.server.http_port, "/tokenize", {"model": "ids", "prompt": "x"})
    assert "model: ids has no tokenizer" in none.error["message"]
    long = ask(
        running.server.http_port, "/tokenize", {"model": "echo", "prompt": "the cat " * 100_000}
    )
    assert "prompt: has more than 4096 tokens" in long.error["message"]


def test_version(post):
    assert set(post("/version").json) == {"version"}
