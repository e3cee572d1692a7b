"""Chats, scores and tokens over gRPC, our clients, and the conversation in a terminal."""

import asyncio
import json

import grpc
import pytest
import server_harness as harness
from shell import jblock_client
from test_http_answers import TEMPLATE
from tokenizer_fixtures import byte_level

from serving.client import AsyncClient
from serving.v1 import jblock_pb2 as pb
from serving.values import ClientError, ToolCall

CALL = '<tool_call>{"name": "get", "arguments": {"a": 1}}</tool_call>'
TOOL = {"name": "get", "description": "gets", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    config = {"chat_template": TEMPLATE, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with harness.serving(harness.mock(folder)) as one:
        yield one
        assert harness.eventually(one.is_empty)


def prompt(*turns, tools=()):
    """The ids that the template makes of (role, content) pairs."""
    text = "".join(f"<s>{role}: {content}</s>" for role, content in turns)
    text += "".join(json.dumps({"type": "function", "function": t}) for t in tools) + "<s>"
    return tuple(byte_level().encode(text, add_special_tokens=False).ids)


def test_a_chat_is_the_template_s_text(running):
    expected = prompt(("user", "hello"))
    answer = running.client.chat("echo", "hello", max_tokens=len(expected))
    assert answer.token_ids == expected and answer.text == "user: hello"
    assert answer.usage.prompt_tokens == len(expected)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "and?"},
    ]
    expected = prompt(*((m["role"], m["content"]) for m in messages))
    chunks = list(running.client.chat_stream("echo", messages, max_tokens=len(expected)))
    assert sum((c.token_ids for c in chunks), ()) == expected
    with pytest.raises(ClientError, match="has no chat template"):
        running.client.chat("ids", "hello")


def test_a_chat_without_a_limit_goes_on_to_the_models_length(running):
    answer = running.client.chat("echo", "hello")
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 1024


def test_tools_both_ways(running):
    length = len(prompt(("user", CALL)))
    answer = running.client.chat("echo", CALL, tools=[TOOL], max_tokens=length - 2)
    (call,) = answer.tool_calls
    assert (call.name, call.arguments, answer.text) == ("get", '{"a": 1}', "user:")
    openais = {"type": "function", "function": TOOL}
    parts = list(running.client.chat_stream("echo", CALL, tools=[openais], max_tokens=length - 2))
    assert [c.name for p in parts for c in p.tool_calls] == ["get"]
    # Back to the model, with what the function returned.
    history = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": call.id},
    ]
    text = byte_level().decode(running.client.chat("echo", history, max_tokens=90).token_ids)
    assert '<tool_call>{"name": "get", "arguments": {"a": 1}}</tool_call>' in text
    assert isinstance(call, ToolCall)


def chat(*messages, **fields):
    return pb.GenerateRequest(model="echo", chat=pb.Chat(messages=messages, **fields))


HELLO = pb.ChatMessage(role="user", content="hello")
BAD = {
    "no messages": (chat(), "chat.messages: is empty"),
    "role": (chat(pb.ChatMessage(role="boss")), "chat.messages[0].role: 'boss' is none of system"),
    "arguments": (
        chat(HELLO, pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(arguments="{")])),
        "chat.messages[1].tool_calls[0].arguments: '{' is no JSON",
    ),
    "tool": (chat(HELLO, tools=[pb.Function()]), "chat.tools[0].name: is empty"),
    "schema": (chat(HELLO, tools=[pb.Function(name="f", parameters="x")]), "parameters: 'x' is no"),
    "variable": (
        chat(HELLO, template_variables={"x": "1"}),
        "x: the model's chat template reads no",
    ),
    "variable's value": (chat(HELLO, template_variables={"tone": "{"}), "tone: '{' is no JSON"),
    "continued": (chat(continue_final_message=True), "chat.messages: is empty"),
    "too long": (
        chat(pb.ChatMessage(role="user", content="a b " * 3000)),
        "messages: make a prompt",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_chat(running, case):
    request, message = BAD[case]
    with pytest.raises(grpc.RpcError) as caught:
        running.stub.Generate(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert message in caught.value.details()


def test_variables_and_going_on(running):
    count = len(prompt(("user", "x")))
    answer = running.client.chat(
        "echo", "x", template_variables={"tone": " calm"}, max_tokens=count + 5
    )
    assert answer.text.endswith(" calm")
    history = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The"}]
    going_on = running.client.chat(
        "echo", history, continue_final_message=True, max_tokens=1
    ).usage.prompt_tokens
    text = "<s>user: x</s><s>assistant: The"
    assert going_on == len(byte_level().encode(text, add_special_tokens=False).ids)


def test_score(running):
    ids = byte_level().encode("the cat sat").ids
    for request in (
        pb.ScoreRequest(model="echo", text="the cat sat"),
        pb.ScoreRequest(model="echo", token_ids=pb.TokenIds(ids=ids)),
    ):
        scored = running.stub.Score(request)
        assert list(scored.token_ids) == ids
        assert list(scored.logprobs) == [-0.25] * (len(ids) - 1)
        assert scored.total == -0.25 * (len(ids) - 1)
        # The mock's every other token is the best one.
        equal = [b.logprob == p for b, p in zip(scored.best, scored.logprobs, strict=True)]
        assert equal == [bool(at % 2) for at in range(len(equal))]
        assert (scored.model, scored.model_version) == ("echo", 3)
    chat_scored = running.stub.Score(pb.ScoreRequest(model="echo", chat=pb.Chat(messages=[HELLO])))
    assert tuple(chat_scored.token_ids) == prompt(("user", "hello"))
    for request, code in (
        (pb.ScoreRequest(model="nobody", text="x"), "NOT_FOUND"),
        (pb.ScoreRequest(model="echo"), "INVALID_ARGUMENT"),
        (pb.ScoreRequest(model="rounded", text="x"), "INVALID_ARGUMENT"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            running.stub.Score(request)
        assert caught.value.code().name == code


def test_tokenize_and_back(running):
    ids = byte_level().encode("hello <s>").ids
    made = running.stub.Tokenize(pb.TokenizeRequest(model="echo", text="hello <s>"))
    assert list(made.token_ids) == ids
    chats = running.stub.Tokenize(pb.TokenizeRequest(model="echo", chat=pb.Chat(messages=[HELLO])))
    assert tuple(chats.token_ids) == prompt(("user", "hello"))
    for skip, text in ((False, "hello <s>"), (True, "hello ")):
        request = pb.DetokenizeRequest(model="echo", token_ids=ids, skip_special_tokens=skip)
        assert running.stub.Detokenize(request).text == text
    for call, request, message in (
        (running.stub.Tokenize, pb.TokenizeRequest(model="ids", text="x"), "ids has no tokenizer"),
        (running.stub.Tokenize, pb.TokenizeRequest(text="x"), "model: is empty"),
        (
            running.stub.Tokenize,
            pb.TokenizeRequest(model="echo", text="a " * 10**6),
            "text: has more",
        ),
        (
            running.stub.Detokenize,
            pb.DetokenizeRequest(model="echo", token_ids=[1, 410]),
            "token_ids[1]: 410 is no token id of echo",
        ),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        assert message in caught.value.details()


def test_the_asynchronous_client(running):
    async def ask():
        async with AsyncClient(running.target, timeout=20.0) as client:
            whole = await client.chat("echo", "hello", max_tokens=8)
            parts = [c async for c in client.chat_stream("echo", "hello", max_tokens=8)]
            return whole.text, "".join(p.text for p in parts)

    whole, parts = asyncio.run(ask())
    assert whole == parts


@pytest.mark.parametrize("messages", [[{"role": 1}], [{"colour": "x"}], [7], None])
def test_messages_that_fit_no_request(running, messages):
    with pytest.raises(ValueError, match="messages: "):
        running.client.chat("echo", messages)


def command(running, *args, text=""):
    return jblock_client(f"--target={running.target}", *args, stdin=text)


def test_the_command(running):
    count = len(prompt(("user", "hello")))
    once = command(running, "chat", "--model=echo", "--prompt=hello", f"--max_tokens={count}")
    assert (once.returncode, once.stdout) == (0, "user: hello\n")
    piped = command(
        running, "chat", "--model=echo", "--prompt=-", f"--max_tokens={count}", text="hello"
    )
    assert piped.stdout == once.stdout
    talk = command(
        running,
        "chat",
        "--model=echo",
        "--system=Be brief.",
        "--max_tokens=30",
        text="hello\n\nmore\n",
    )
    first, second = talk.stdout.splitlines()
    assert first.startswith("system: Be brief.user: hello")
    assert talk.returncode == 0 and second.startswith("system: Be brief.user: hello")
    noted = command(running, "generate", "--model=echo", "--prompt=hello", "--max_tokens=1")
    assert "echo is an instruct model; `jblock-client chat` asks it" in noted.stderr
    plain = command(running, "generate", "--model=ids", "--token_ids=1", "--max_tokens=1")
    assert plain.stderr == ""
    none = command(running, "chat", "--model=ids", "--prompt=x")
    assert none.returncode == 2 and "ids has no chat template" in none.stderr
