"""The HTTP API: refusals name the field, keys are asked for, and clients that leave cost nothing."""

import hashlib
import json
import logging
import socket
import time

import pytest
import server_harness as harness
from http_harness import ask, raw

from jblock.engine.process.mock import build_engine
from serving.tenants import Tenant, Tenants

KEY = "k" * 32


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    engine = harness.mock(tmp_path_factory.mktemp("tokenizer"))
    with harness.serving(engine, http_port=0, metrics_port=0) as one:
        yield one
        assert harness.eventually(one.is_empty)


@pytest.fixture
def busy(tmp_path):
    engine = harness.mock(tmp_path, step_delay=0.01)
    with harness.serving(engine, http_port=0, max_queue=2) as one:
        yield one


def port(running):
    return running.server.http_port


def body(**fields):
    return {"model": "echo", "prompt": [300, 301], "max_tokens": 2, "temperature": 0, **fields}


CASES = {
    "no json": (b"{", 400, None, "body: is no JSON of a request"),
    "not an object": (b"[]", 400, None, "body"),
    "not utf-8": (b'{"model": "\xff"}', 400, None, "body"),
    "deep": (b"[" * 100_000, 400, None, "body"),
    "no model": (body(model=None), 400, "model", "model: is empty; name a model"),
    "unknown model": (
        body(model="nobody"),
        404,
        "model",
        "model: 'nobody' is not served; choose one of",
    ),
    "no prompt": (body(prompt=None), 400, "prompt", "prompt: is missing"),
    "empty list": (body(prompt=[]), 400, "prompt", "prompt: is empty"),
    "list of an empty list": (body(prompt=[[]]), 400, "token_ids", "token_ids: is empty"),
    "mixed prompts": (body(prompt=["a", [1]]), 400, "prompt", "prompt"),
    "bad id": (body(prompt=[410]), 400, "token_ids[0]", "token_ids[0]: 410 is no token id of echo"),
    "huge id": (body(prompt=[2**40]), 400, "prompt", "prompt: "),
    "unknown field": (body(colour="red"), 400, "colour", "colour: this server has no such field"),
    "unknown nested": (
        body(stream_options={"x": 1}),
        400,
        "stream_options.x",
        "stream_options.x: this",
    ),
    "type": (
        body(max_tokens="many"),
        400,
        "max_tokens",
        "max_tokens: Expected `int | null`, got `str`",
    ),
    "suffix": (body(suffix="x"), 400, "suffix", "suffix: "),
    "best_of": (body(best_of=3), 400, "best_of", "best_of: this server answers as many as n"),
    "logprobs": (body(logprobs=21), 400, "logprobs", "logprobs: 21 is outside 0 to 20"),
    "top_p": (body(top_p=2), 400, "top_p", "top_p: 2.0 is outside (0, 1]"),
    "n": (body(n=17), 400, "n", "n: 17 is outside 1 to 16"),
    "huge n": (body(n=2**40), 400, "n", "n: "),
    "stop": (body(stop=[""]), 400, "stop[0]", "stop[0]: is empty"),
    "logit_bias": (body(logit_bias={"x": 1}), 400, "logit_bias.x", "logit_bias.x: is no token id"),
    "special tokens": (
        body(skip_special_tokens=False),
        400,
        "skip_special_tokens",
        "skip_special_tokens: ",
    ),
    "many prompts": (body(prompt=[[1]] * 257), 400, "prompt", "prompt: has 257 prompts"),
    "never enough places": (
        body(prompt=[[1]] * 200, n=2),
        400,
        "prompt",
        "prompt: asks for 400 answers at once, and at most 256",
    ),
    "policy": (body(model="rounded"), 400, "policy", "policy: model 'rounded' is POLICY_NEAR"),
    "engine": (body(model="broken", max_tokens=9), 500, None, "model: told to fail"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_request_names_its_field(running, case):
    content, status, field, message = CASES[case]
    answer = ask(port(running), "/v1/completions", content)
    assert (answer.status, answer.error["param"]) == (status, field)
    assert message in answer.error["message"]
    assert answer.headers["Content-Type"] == "application/json"


def test_kinds_of_errors(running):
    assert (
        ask(port(running), "/v1/completions", body(top_p=2)).error["type"]
        == "invalid_request_error"
    )
    missing = ask(port(running), "/v1/completions", body(model="nobody")).error
    assert (missing["type"], missing["code"]) == ("not_found_error", "model_not_found")
    for path, content, status in (
        ("/nothing", None, 404),
        ("/v1/completions", None, 405),
        ("/health", {}, 405),
    ):
        answer = ask(port(running), path, content)
        assert answer.status == status
        assert path in answer.error["message"]


def test_a_body_that_is_too_long(running):
    answer = ask(port(running), "/v1/completions", b" " * (9 * 2**20))
    assert answer.status == 413
    assert "body: is longer than 8388608 bytes" in answer.error["message"]
    with socket.create_connection(("127.0.0.1", port(running)), timeout=20) as one:
        one.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        try:
            for _ in range(12):
                one.sendall(chunk)
        except OSError:
            pass
        assert one.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nA" + b"a" * 100_000,
    ],
)
def test_what_is_no_http_does_no_harm(running, data):
    with socket.create_connection(("127.0.0.1", port(running)), timeout=5) as one:
        one.sendall(data)
        one.shutdown(socket.SHUT_WR)
        one.settimeout(5)
        assert one.recv(65536)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
    assert ask(port(running), "/health").status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_work(busy, stream):
    with raw(port(busy), "/v1/completions", body(max_tokens=1000, n=2, stream=stream)) as one:
        assert harness.eventually(lambda: busy.engine.stats().running == 2)
        one.close()
        begin = time.monotonic()
        assert harness.eventually(busy.is_empty)
        assert time.monotonic() - begin < 1
    assert busy.engine.stats().generated_tokens < 400


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_reads_keeps_its_place(tmp_path, stream):
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with harness.serving(harness.mock(tmp_path), http_port=0, max_queue=1) as running:
        content = {
            "model": "echo",
            "messages": [{"role": "user", "content": "hello"}],
            "stream": stream,
        }
        content |= {"max_tokens": 1000, "logprobs": True, "top_logprobs": 20}
        with raw(port(running), "/v1/chat/completions", content, small=True):
            assert harness.eventually(lambda: running.engine.stats().generated_tokens == 1000)
            time.sleep(0.3)  # More than what it takes to write the answer.
            refused = ask(port(running), "/v1/completions", body())
            assert refused.status == 503
        assert harness.eventually(running.is_empty)
        assert ask(port(running), "/v1/completions", body()).status == 200


def test_overload_says_when_to_come_back(busy):
    with raw(port(busy), "/v1/completions", body(max_tokens=1000, n=2)):
        assert harness.eventually(lambda: busy.engine.stats().running == 2)
        answer = ask(port(busy), "/v1/completions", body())
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert answer.error["code"] == "overloaded"
    assert "queue: 2 requests are open" in answer.error["message"]
    assert harness.eventually(busy.is_empty)


@pytest.fixture(scope="module")
def guarded():
    digest = hashlib.sha256(KEY.encode()).digest()
    tenants = Tenants([(digest, Tenant(name="acme", max_requests=1))])
    engine = build_engine(step_delay=0.01)
    with harness.serving(engine, http_port=0, metrics_port=0, tenants=tenants) as one:
        yield one


ROUTES = [
    ("/v1/models", None),
    ("/v1/models/echo", None),
    ("/health", None),
    ("/version", None),
    ("/v1/completions", body()),
    ("/v1/chat/completions", {}),
    ("/tokenize", {}),
    ("/detokenize", {}),
    ("/tokenizer_info", None),
    ("/m/echo/v1/completions", body()),
]


@pytest.mark.parametrize(("path", "content"), ROUTES)
@pytest.mark.parametrize("key", [None, "wrong", KEY + "0"])
def test_no_route_without_a_key(guarded, path, content, key):
    answer = ask(port(guarded), path, content, key)
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert answer.error["code"] == "invalid_api_key"
    assert "needs the header 'authorization: Bearer KEY'" in answer.error["message"]
    assert key is None or key not in answer.error["message"]


def test_a_tenant_with_a_key_gets_in_and_has_its_own_limit(guarded):
    assert ask(port(guarded), "/v1/models", key=KEY).json["data"][0]["id"] == "echo"
    many = ask(port(guarded), "/v1/completions", body(prompt=[[1], [2]]), key=KEY)
    assert (many.status, many.error["param"]) == (400, "prompt")
    content = json.dumps(body(prompt=[1], max_tokens=1000)).encode()
    with socket.create_connection(("127.0.0.1", port(guarded)), timeout=20) as one:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        one.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert harness.eventually(lambda: guarded.engine.stats().running == 1)
        answer = ask(port(guarded), "/v1/completions", body(prompt=[1]), key=KEY)
    assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
    assert answer.error["type"] == "rate_limit_error"
    assert "max_requests: tenant acme has 1 requests open" in answer.error["message"]
    assert harness.eventually(guarded.is_empty)


def test_open_health_opens_health_alone():
    digest = hashlib.sha256(KEY.encode()).digest()
    tenants = Tenants([(digest, Tenant(name="acme"))])
    with harness.serving(build_engine(), http_port=0, tenants=tenants, open_health=True) as one:
        assert ask(port(one), "/health").json == {"status": "SERVING"}
        assert ask(port(one), "/ping").status == 200
        assert ask(port(one), "/v1/models").status == 401


def test_health_of_a_server_that_warms_up_and_drains(tmp_path):
    engine = harness.mock(tmp_path, start_delay=0.5, step_delay=0.01)
    with harness.serving(engine, warm=False, http_port=0, drain_seconds=5.0) as running:
        assert ask(port(running), "/health").status == 503
        refused = ask(port(running), "/v1/completions", body())
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        running.call(running.server.warm())
        assert ask(port(running), "/health").status == 200
        with raw(port(running), "/v1/completions", body(max_tokens=60)) as one:
            assert harness.eventually(lambda: running.engine.stats().running == 1)
            assert running.call(running.server.stop()) is True
            assert one.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_a_bug_of_the_server_is_told_apart(running, monkeypatch, caplog):
    monkeypatch.setattr("serving.answers.TextStream.push", lambda self, ids: 1 / 0)
    with caplog.at_level(logging.ERROR):
        answer = ask(port(running), "/v1/completions", body())
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "ZeroDivisionError" in caplog.text
    assert harness.eventually(running.is_empty)


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(tmp_path):
    # A second after its first token, which is on its way by then.
    text = {"vocab_size": harness.VOCAB_SIZE, "tokenizer_path": harness.save_tokenizer(tmp_path)}
    late = {"name": "late", **text, "error_code": "INTERNAL", "error_after": 50}
    engine = harness.build_engine(models=[late], step_delay=0.02)
    with harness.serving(engine, http_port=0) as running:
        fields = body(model="late", max_tokens=60, stream=True)
        answer = ask(port(running), "/v1/completions", fields)
    assert answer.status == 200
    *texts, last = answer.body.decode().split("\n\n")[:-1]
    assert texts and "told to fail" in last


def test_an_error_before_the_first_token_is_the_whole_answer(tmp_path):
    text = {"vocab_size": harness.VOCAB_SIZE, "tokenizer_path": harness.save_tokenizer(tmp_path)}
    early = {"name": "early", **text, "error_code": "INTERNAL", "error_after": 0}
    with harness.serving(harness.build_engine(models=[early]), http_port=0) as running:
        fields = body(model="early", max_tokens=9, stream=True)
        answer = ask(port(running), "/v1/completions", fields)
    assert answer.status == 500
    assert "told to fail" in answer.error["message"]


def test_the_metrics_count_http_too(tmp_path):
    from test_lifecycle import scrape

    with harness.serving(harness.mock(tmp_path), http_port=0, metrics_port=0) as running:
        ask(port(running), "/v1/completions", body(max_tokens=5))
        ask(port(running), "/v1/completions", body(top_p=7))
        ask(port(running), "/v1/completions", body(model="nobody"))
        values = scrape(running.server.metrics_port)
        assert values['jblock_requests_total{code="OK",model="echo"}'] == "1.0"
        assert values['jblock_requests_total{code="INVALID_ARGUMENT",model="echo"}'] == "1.0"
        assert values['jblock_requests_total{code="NOT_FOUND",model=""}'] == "1.0"
        assert values['jblock_tokens_total{kind="completion",model="echo"}'] == "5.0"


def test_a_port_that_is_taken(running):
    with (
        pytest.raises(OSError, match="http_port: cannot listen on"),
        harness.serving(build_engine(), http_port=port(running)),
    ):
        pass


def test_a_unix_socket_has_no_http_port(tmp_path):
    from serving.server import ServerConfig

    with pytest.raises(ValueError, match="http_port: a unix socket has no port"):
        ServerConfig(host=f"unix:{tmp_path}/s", http_port=0)
