"""The request log: a line a request, with its id, and never a word of it."""

import json

import grpc
import pytest
import server_harness as harness
from http_harness import ask

from serving.call_info import CallInfo, request_id_of
from serving.request_log import RequestLog

SECRET = "sécret words"


@pytest.fixture
def logged(tmp_path):
    path = tmp_path / "requests.jsonl"
    with harness.serving(harness.mock(tmp_path), request_log=str(path), http_port=0) as running:
        yield running, path


def lines(running, path, count):
    assert harness.eventually(lambda: path.read_text().count("\n") >= count)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_request_is_a_line_without_its_text(logged):
    running, path = logged
    request = harness.pb.GenerateRequest(model="echo", text=SECRET, max_tokens=3)
    running.stub.Generate(request, metadata=[("x-request-id", "mine-1")])
    with pytest.raises(grpc.RpcError):
        running.stub.Generate(harness.pb.GenerateRequest(model=SECRET, text=SECRET))
    with pytest.raises(grpc.RpcError):
        running.stub.Generate(
            harness.pb.GenerateRequest(model="echo", text=SECRET, max_tokens=-1),
        )
    body = {"model": "echo", "prompt": SECRET, "max_tokens": 2}
    answer = ask(running.server.http_port, "/v1/completions", body, **{"x-request-id": "mine-2"})
    assert (answer.status, answer.headers["x-request-id"]) == (200, "mine-2")
    found = lines(running, path, 4)
    assert [(e["code"], e.get("field"), e["protocol"], e["model"]) for e in found] == [
        ("OK", None, "grpc", "echo"),
        ("NOT_FOUND", "model", "grpc", ""),
        ("INVALID_ARGUMENT", "max_tokens", "grpc", "echo"),
        ("OK", None, "http", "echo"),
    ]
    assert [e["completion_tokens"] for e in found] == [3, 0, 0, 2]
    assert found[0]["prompt_tokens"] > 0 and found[0]["time_to_first_token"] > 0
    assert (found[0]["request_id"], found[3]["request_id"]) == ("mine-1", "mine-2")
    assert len({e["request_id"] for e in found}) == 4
    assert not any(word in path.read_text() for word in SECRET.split())
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_moved_away_is_made_again(logged):
    running, path = logged
    running.client.generate("echo", [1], max_tokens=1)
    lines(running, path, 1)
    path.rename(path.with_suffix(".1"))
    running.client.generate("echo", [1], max_tokens=1)
    assert harness.eventually(path.exists) and len(lines(running, path, 1)) == 1


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "\n", b"\xff", None])
def test_ids_that_no_header_holds_are_replaced(given):
    assert len(request_id_of(given)) == 32


def test_a_file_that_cannot_be_written_ends_the_start(tmp_path):
    with pytest.raises(OSError):
        RequestLog(str(tmp_path / "missing" / "log"))


def test_lines_are_lost_where_the_disk_does_not_keep_up(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.request_log._MOST_WAITING", 1)
    log = RequestLog(str(tmp_path / "log"))
    log._listener.stop()  # Nobody writes.
    for _ in range(4):
        log.ended(CallInfo(protocol="grpc"), "m", grpc.StatusCode.OK)
    log._lines.get_nowait()
    log.ended(CallInfo(protocol="grpc"), "m", grpc.StatusCode.OK)
    assert json.loads(log._lines.get_nowait().msg)["lost_before"] == 3
    log._file.close()
