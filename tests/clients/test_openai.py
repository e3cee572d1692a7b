"""The `openai` client as it is published: completions, chats, streams, tools, errors."""

import asyncio
import typing

import pytest
import server_harness as harness

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.clients

TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "description": "gets",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = '<tool_call>{"name": "get", "arguments": {"a": 1}}</tool_call>'


@pytest.fixture(scope="module")
def client(base_url):
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as one:
        yield one


def user(content):
    return {"role": "user", "content": content}


def test_a_completion(client):
    answer = client.completions.create(
        model="echo", prompt="hello the cat", max_tokens=6, temperature=0
    )
    assert type(answer).model_validate(answer.model_dump()) == answer
    assert answer.choices[0].text == "hello the cat" * 2  # Three tokens, over and over.
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6


def test_prompts_samples_logprobs_and_echo(client):
    answer = client.completions.create(
        model="echo", prompt=["hello", "the cat"], n=2, max_tokens=3, logprobs=2, echo=True, seed=1
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text.startswith("hello") and answer.choices[2].text.startswith(
        "the cat"
    )
    found = answer.choices[0].logprobs
    assert (
        len(found.tokens)
        == len(found.token_logprobs)
        == len(found.top_logprobs)
        == len(found.text_offset)
    )


def test_a_stream_of_a_completion(client):
    stream = client.completions.create(
        model="echo",
        prompt="hello the cat",
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    whole = client.completions.create(
        model="echo", prompt="hello the cat", max_tokens=12, temperature=0
    )
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert last.choices == [] and last.usage == whole.usage


def test_a_chat(client):
    answer = client.chat.completions.create(
        model="echo",
        messages=[
            {"role": "developer", "content": "Be brief."},
            user([{"type": "text", "text": "hello"}]),
        ],
        max_completion_tokens=10,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    assert type(answer).model_validate(answer.model_dump()) == answer
    assert answer.choices[0].message.content.startswith("system: Be")
    assert len(answer.choices[0].logprobs.content) == 10
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3


def test_a_stream_of_a_chat(client):
    content = {
        "model": "echo",
        "messages": [user("hello the cat")],
        "max_tokens": 12,
        "temperature": 0,
    }
    with client.chat.completions.stream(**content) as stream:
        events = list(stream)
    whole = client.chat.completions.create(**content)
    final = next(e for e in events if e.type == "content.done")
    assert final.content == whole.choices[0].message.content


def test_tools(client):
    content = {"model": "echo", "messages": [user(CALL)], "tools": [TOOL], "temperature": 0}
    answer = client.chat.completions.create(**content, max_tokens=100)
    call = answer.choices[0].message.tool_calls[0]
    assert (call.type, call.function.name, call.function.arguments) == (
        "function",
        "get",
        '{"a": 1}',
    )
    # The answer goes back as it came, with the tool's result.
    again = client.chat.completions.create(
        model="echo",
        messages=[
            user("x"),
            answer.choices[0].message,
            {"role": "tool", "content": "2", "tool_call_id": call.id},
        ],
        max_tokens=5,
    )
    assert again.choices[0].finish_reason == "length"
    deltas = [
        d
        for chunk in client.chat.completions.create(**content, max_tokens=100, stream=True)
        for d in chunk.choices[0].delta.tool_calls or ()
    ]
    assert deltas[0].function.name == "get"


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError, match="model: 'nobody' is not served"):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="echo", prompt="x", top_p=2)
    assert (caught.value.param, caught.value.type) == ("top_p", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="colour: this server has no such field"):
        client.completions.create(model="echo", prompt="x", extra_body={"colour": 1})


def test_models(client):
    models = {model.id: model for model in client.models.list()}
    assert "echo" in models and client.models.retrieve("echo").id == "echo"


def test_the_asynchronous_client_and_leaving(running, base_url):
    async def run():
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none") as client:
            content = {"model": "echo", "messages": [user("hello")], "temperature": 0}
            answers = await asyncio.gather(
                *(client.chat.completions.create(**content, max_tokens=5) for _ in range(20))
            )
            assert len({a.choices[0].message.content for a in answers}) == 1
            stream = await client.chat.completions.create(**content, max_tokens=900, stream=True)
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(run())
    assert harness.eventually(running.is_empty, 2.0)


def test_an_answer_of_a_json_schema(real_url):
    """The client makes the schema of a model of pydantic, and reads the answer into it."""
    pydantic = pytest.importorskip("pydantic")

    class Ship(pydantic.BaseModel):
        kind: typing.Literal["boat", "raft"]
        crew: list[bool] = pydantic.Field(max_length=2)

    with openai.OpenAI(base_url=real_url, api_key="none", max_retries=0) as client:
        content = {"model": "demo", "messages": [user("A ship:")], "response_format": Ship}
        for seed in range(3):
            answer = client.chat.completions.parse(**content, max_tokens=150, seed=seed)
            assert answer.choices[0].finish_reason == "stop"
            assert isinstance(answer.choices[0].message.parsed, Ship)
        with client.chat.completions.stream(**content, max_tokens=150, seed=0) as stream:
            assert isinstance(stream.get_final_completion().choices[0].message.parsed, Ship)
