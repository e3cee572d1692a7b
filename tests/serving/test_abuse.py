"""What hostile clients send: nothing crashes, nothing stays, each gets an answer that says what is wrong, and
others are served meanwhile. The whole count of fuzzed cases runs with the long tests."""

import contextlib
import json
import random
import socket

import grpc
import pytest
import server_harness as harness
from http_harness import ask, raw

from serving.http import connection
from serving.v1 import jblock_pb2 as pb

SECONDS = 20.0
FEW, MANY = 100, 7000  # Cases of each of three kinds.
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    engine = harness.mock(tmp_path_factory.mktemp("tokenizer"))
    with harness.serving(engine, http_port=0) as server:
        yield server
        assert harness.eventually(server.is_empty)


@pytest.fixture(autouse=True)
def others_are_served(running):
    yield
    body = {"model": "echo", "prompt": [300, 301], "max_tokens": 4}
    assert ask(running.server.http_port, "/v1/completions", body).status == 200
    assert len(running.client.generate("echo", [300, 301], max_tokens=4).token_ids) == 4
    assert harness.eventually(running.is_empty)


def sent(port: int, data: bytes, ends: bool = False) -> bytes:
    """What the server answers to these bytes; a client that `ends` them has left, for the server."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as one:
        with contextlib.suppress(ConnectionError):
            one.sendall(data)
            if ends:
                one.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := one.recv(65536):
                answer += piece
    return answer


def head(body: bytes, path: bytes = b"/v1/completions") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (
        path,
        len(body),
        body,
    )


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The data with some bytes replaced, dropped, doubled or cut off."""
    found = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(4):
            case 0:
                found[at : at + 1] = bytes((rng.randrange(256),))
            case 1:
                del found[at : at + rng.randrange(1, 9)]
            case 2:
                found[at:at] = found[at : at + rng.randrange(1, 99)]
            case 3:
                found[at:at] = rng.choice((b"\0", b"\r\n", b"{", b"]", b'"', b"9" * 40, b"\xff"))
    return bytes(found)


def random_value(rng: random.Random, depth: int = 3):
    """A value of JSON, of any kind."""
    match rng.randrange(9 if depth else 6):
        case 0:
            return None
        case 1:
            return rng.choice((True, False))
        case 2:
            return rng.choice((0, -1, 2**31, 2**64, -(2**70), 10**30))
        case 3:
            return rng.choice((0.5, -1.0, 1e308, 1e-320))
        case 4:
            return rng.choice(("", "a", "\0", "é" * 50, "\ud800", "exact", "nobody"))
        case 5:
            return []
        case 6 | 7:
            return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
        case _:
            return {str(rng.randrange(5)): random_value(rng, depth - 1) for _ in range(3)}


@pytest.mark.parametrize("count", COUNTS)
def test_malformed_http_is_answered_or_closed(running, count):
    rng = random.Random(0)
    good = head(b'{"model": "echo", "prompt": [300], "max_tokens": 2}')
    for _ in range(count):
        answer = sent(running.server.http_port, mutated(rng, good), ends=True)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 "), answer
        assert not answer.startswith(b"HTTP/1.1 500"), answer


@pytest.mark.parametrize("count", COUNTS)
def test_malformed_json_is_refused_by_name(running, count):
    rng = random.Random(1)
    chat = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    plain = {"model": "echo", "prompt": "hello", "max_tokens": 2, "stream": False}
    for at in range(count):
        path, good = (b"/v1/chat/completions", chat) if at % 2 else (b"/v1/completions", plain)
        if rng.random() < 0.5:
            body = mutated(rng, json.dumps(good).encode())
        else:
            field = rng.choice([*good, "n", "stop", "logit_bias", "seed", "top_p", "logprobs"])
            body = json.dumps({**good, field: random_value(rng)}).encode()
        answer = sent(running.server.http_port, head(body, path))
        status = int(answer[9:12])
        assert status in (200, 400, 404, 503), (body, answer)
        if status != 200:
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert error["message"], body


@pytest.mark.parametrize("count", COUNTS)
def test_malformed_messages_are_invalid(running, count):
    rng = random.Random(2)
    good = pb.GenerateRequest(
        model="echo", text="hello", max_tokens=2, stop=["x"], logit_bias={5: 1.0}
    ).SerializeToString()
    calls = [
        running.channel.unary_unary(f"/jblock.v1.Inference/{name}")
        for name in ("Generate", "Score", "Tokenize", "Detokenize")
    ]
    refusals = ("INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION")
    for at in range(count):
        data = mutated(rng, good) if rng.random() < 0.7 else rng.randbytes(rng.randrange(1, 80))
        try:
            calls[at % 4](data, timeout=SECONDS)
        except grpc.RpcError as error:
            assert error.code().name in refusals, (data, error.code(), error.details())


def test_a_message_of_64_megabytes_is_refused(running):
    call = running.channel.unary_unary("/jblock.v1.Inference/Generate")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\0" * (64 << 20), timeout=60.0)
    assert caught.value.code().name == "RESOURCE_EXHAUSTED"
    data = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 67108864\r\n\r\n"
    assert sent(running.server.http_port, data).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "headers",
    [
        b"".join(b"h%d: x\r\n" % i for i in range(1000)) + b"\r\n",
        b"a: " + b"x" * 100_000 + b"\r\n\r\n",
        b"a: " + b"x" * 1_000_000,
    ],
    ids=["many", "long", "endless"],
)
def test_a_flood_of_headers_is_refused(running, headers):
    answer = sent(running.server.http_port, b"GET /health HTTP/1.1\r\n" + headers)
    # The answer may be lost to a client that is still sending when the connection is closed.
    assert answer.startswith(b"HTTP/1.1 431") or (answer == b"" and len(headers) > 10_000)


def test_headers_that_never_end_are_refused(running, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    port = running.server.http_port
    for data in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as one:
            one.sendall(data)
            assert one.recv(65536).startswith(b"HTTP/1.1 408")
            assert one.recv(65536) == b""


def test_a_body_that_never_ends_is_refused(running, monkeypatch):
    from serving.http import exchange

    monkeypatch.setattr(exchange, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", running.server.http_port), timeout=SECONDS) as one:
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert one.recv(65536).startswith(b"HTTP/1.1 408")


def test_who_closes_its_half_has_left(running):
    body = {"model": "echo", "prompt": [300], "max_tokens": 1000, "stream": True}
    with raw(running.server.http_port, "/v1/completions", body) as one:
        assert one.recv(65536).startswith(b"HTTP/1.1 200")
        one.shutdown(socket.SHUT_WR)
        assert harness.eventually(running.is_empty)


def test_guessed_keys_learn_nothing(tmp_path):
    import hashlib
    import secrets

    from serving.tenants import Tenant, Tenants

    key = secrets.token_hex(32)
    tenants = Tenants([(hashlib.sha256(key.encode()).digest(), Tenant(name="acme"))])
    engine = harness.mock(tmp_path)
    with harness.serving(engine, http_port=0, tenants=tenants) as server:
        port = server.server.http_port
        answers = {ask(port, "/v1/models", key=secrets.token_hex(32)).body for _ in range(50)}
        assert len(answers) == 1
        near = key[:-1] + ("0" if key[-1] != "0" else "1")
        assert ask(port, "/v1/models", key=near).body in answers
        assert ask(port, "/v1/models", key=key).status == 200


@pytest.mark.long
def test_ten_thousand_connections(tmp_path):
    """Idle ones, ones whose headers do not end, and slow readers: others are served, and all is freed."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 21_000
    if hard < wanted:
        pytest.skip(f"this user may open {hard} files; the test needs {wanted}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        engine = harness.mock(tmp_path, step_delay=0.001)
        with harness.serving(engine, http_port=0, max_queue=64) as server:
            port = server.server.http_port
            body = {"model": "echo", "prompt": [300], "max_tokens": 3}
            with contextlib.ExitStack() as stack:
                for at in range(10_000):
                    one = stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
                    if at % 2:
                        one.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
                    if at % 500 == 0:
                        assert ask(port, "/v1/completions", body).status == 200
                assert ask(port, "/v1/completions", body).status == 200
            assert harness.eventually(server.is_empty)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
