"""Schemas, expressions, choices and grammars over every protocol: what the engine is given, and refusals."""

import collections
import concurrent.futures
import json
import time
from pathlib import Path

import http_harness as web
import jsonschema
import pytest
import server_harness as harness
from schema_generator import SchemaGenerator
from test_http_answers import TEMPLATE

from serving.structured.forced_calls import ForcedParser, forced_calls
from serving.values import ClientError

DEMO = Path(__file__).parent.parent.parent / "examples" / "models" / "demo-1m"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["red", "blue"]}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
HOSTILE = {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(18)]}
TOOL = {
    "type": "function",
    "function": {"name": "get", "parameters": {"properties": {"a": {"type": "integer"}}}},
}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    config = {"chat_template": TEMPLATE, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    engine = harness.mock(folder)
    submit, engine.given = engine.submit, []

    def watched(request):
        engine.given.append(request.sampling.grammar)
        submit(request)

    engine.submit = watched
    with harness.serving(engine, http_port=0) as one:
        yield one
        assert harness.eventually(one.is_empty)


def asked(running, **fields):
    """The grammar that the engine was given for a completion."""
    body = {"model": "echo", "prompt": "hello", "max_tokens": 2, **fields}
    answer = web.ask(running.server.http_port, "/v1/completions", body)
    assert answer.status == 200, answer.json
    return running.engine.given[-1]


def refused(running, path="/v1/completions", **fields):
    body = {"model": "echo", "max_tokens": 2, **fields}
    body |= {"prompt": "hello"} if path.endswith("/completions") and "chat" not in path else {}
    answer = web.ask(running.server.http_port, path, body)
    assert answer.status == 400, answer.json
    return answer.error["param"], answer.error["message"]


def test_one_grammar_by_every_name(running):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    one = asked(running, response_format=form)
    assert json.loads(one)["grammars"][0]["json_schema"]["required"] == ["name", "ok"]
    assert asked(running, structured_outputs={"json": SCHEMA}) == one
    assert asked(running, structured_outputs={"json": json.dumps(SCHEMA)}) == one
    running.client.generate("echo", "hello", max_tokens=2, json_schema=SCHEMA)
    assert running.engine.given[-1] == one
    any_object = asked(running, response_format={"type": "json_object"})
    assert asked(running, structured_outputs={"json_object": True}) == any_object
    assert asked(running, response_format={"type": "text"}) == ""
    assert "[0-9]+" in asked(running, structured_outputs={"regex": r"\d+"})
    assert "yes|no" in asked(running, structured_outputs={"choice": ["yes", "no"]})
    lark = asked(running, structured_outputs={"grammar": 'start: "a" | "b"'})
    running.client.generate("echo", "hello", max_tokens=2, lark='start: "a" | "b"')
    assert running.engine.given[-1] == lark


def test_refusals_name_the_field(running):
    assert refused(running, structured_outputs={"regex": "("})[0] == "structured_outputs.regex"
    field, message = refused(running, response_format={"type": "json_schema"})
    assert field == "response_format.json_schema.schema" and "is missing" in message
    field, message = refused(running, structured_outputs={"json": {"uniqueItems": True}})
    assert field == "structured_outputs.json" and "uniqueItems" in message
    assert "exactly one" in refused(running, structured_outputs={})[1]
    assert "exactly one" in refused(running, structured_outputs={"regex": "a", "choice": ["b"]})[1]
    assert "no such field" in refused(running, structured_outputs={"structural_tag": "x"})[1]
    with pytest.raises(ClientError, match=r"structured_output: ids has no tokenizer"):
        running.client.generate("ids", [1], regex="a")
    with pytest.raises(ValueError, match="cannot go together"):
        running.client.generate("echo", "x", regex="a", choice=["b"])
    with pytest.raises(ClientError, match=r"structured_output: has \d+ bytes"):
        running.client.generate("echo", "x", regex="a" * 200_000)


def test_a_schema_that_explodes_is_refused_and_remembered(running):
    with pytest.raises(
        ClientError, match=r"INVALID_ARGUMENT: structured_output: it .* was stopped"
    ):
        running.client.generate("echo", "x", json_schema=HOSTILE)
    begin = time.process_time()
    with pytest.raises(ClientError, match="was stopped"):
        running.client.generate("echo", "x", json_schema=HOSTILE)
    assert time.process_time() - begin < 5.0
    assert asked(running, structured_outputs={"choice": ["a"]})


def test_tools_that_must_be_called(running):
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "echo", "messages": messages, "tools": [TOOL], "max_tokens": 3}
    path = "/v1/chat/completions"
    for choice in ("required", {"type": "function", "function": {"name": "get"}}):
        answer = web.ask(running.server.http_port, path, {**body, "tool_choice": choice})
        assert answer.status == 200 and "call_0" in running.engine.given[-1]
    running.client.chat("echo", "hello", tools=[TOOL], tool_choice="get", max_tokens=3)
    assert '(", " call)*' not in running.engine.given[-1]
    other = {"type": "function", "function": {"name": "other"}}
    field, message = refused(running, path, messages=messages, tools=[TOOL], tool_choice=other)
    assert field == "tool_choice" and "none of the tools" in message
    field, message = refused(running, path, messages=messages, tool_choice="required")
    assert field == "tool_choice" and "no tools" in message


def test_forced_calls_are_read_back():
    text = '[{"name": "get", "arguments": {"a": 1}}, {"name": "get", "arguments": {}}]'
    parser = ForcedParser()
    assert parser.push(text[:20]) == ("", [])
    shown, calls = parser.push(text[20:], final=True)
    assert shown == "" and [(c.name, c.arguments) for c in calls] == [
        ("get", '{"a": 1}'),
        ("get", "{}"),
    ]
    assert ForcedParser().push(text[:30], final=True) == (text[:30], [])
    assert forced_calls([TOOL], None, "tools").lark.startswith('start: "[" call (", " call)* "]"')


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A server with the engine and a model that was trained on other things."""
    from checkpoints import hf
    from checkpoints.progress import Progress
    from jblock.engine.process.client import ProcessEngine

    path = tmp_path_factory.mktemp("structured")
    hf.convert(DEMO, path / "zoo", "demo", Progress(False))
    settings = {"max_num_seqs": 4, "max_model_len": 512, "decode_sizes": [4], "page_size": 16}
    kwargs = {"zoo": str(path / "zoo")}
    more = {"prefill_grids": [[4, 16]], "kv_memory_mb": 4}
    engine = ProcessEngine("jblock.engine.factory:build_engine", {**kwargs, **settings, **more})
    engine.models()
    with harness.serving(engine, http_port=0) as one:
        yield one


def test_answers_of_an_engine_keep_to_them(real):
    body = {
        "model": "demo",
        "prompt": "Once",
        "max_tokens": 100,
        "n": 3,
        "seed": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    }
    answer = web.ask(real.server.http_port, "/v1/completions", body).json
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop" and set(json.loads(choice["text"])) == {
            "name",
            "ok",
        }
    chunks = list(real.client.stream("demo", "Once", choice=["red fox", "blue/sea"]))
    assert "".join(c.text for c in chunks) in ("red fox", "blue/sea")
    assert real.client.generate("demo", "Once", regex=r"[a-c]{5}").text.strip("abc") == ""
    lark = 'start: "<" WORD ">"\nWORD: /[a-z]{1,8}/'
    assert real.client.generate("demo", "Once", lark=lark, temperature=1.0).text[0] == "<"


@pytest.mark.parametrize(
    ("count", "least"), [(20, 15), pytest.param(500, 450, marks=pytest.mark.long)]
)
def test_drawn_schemas_are_kept_to_or_refused_by_name(real, count, least):
    drawn = SchemaGenerator(seed=20)
    schemas = [drawn.draw() for _ in range(count)]
    ends = collections.Counter()

    def one(at):
        schema, keyword = schemas[at]
        # So hot because the model seldom ends a string by itself.
        sampling = {"max_tokens": 480, "temperature": 1.5, "seed": at, "json_schema": schema}
        try:
            answer = real.client.generate("demo", "Once upon", timeout=600.0, **sampling)
        except ClientError as error:
            assert error.code == "INVALID_ARGUMENT" and keyword is not None, (schema, error)
            assert keyword in error.message
            return "refused"
        assert keyword is None, schema
        if answer.finish_reason == "stop":
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.validate(json.loads(answer.text), schema, format_checker=checker)
        return answer.finish_reason

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        ends.update(pool.map(one, range(count)))
    assert ends["stop"] >= least, ends
