"""A server's life: warming up, serving, losing its engine, being told to stop."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import grpc
import pytest
import server_harness as harness
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from jblock.engine import api
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.mock import build_engine
from serving.server import Server, ServerConfig, serve
from serving.values import ClientError

MOCK = "jblock.engine.process.mock:build_engine"
SERVICES = ("", "jblock.v1.Inference", "jblock.v1.Models")


def health(running, service=""):
    stub = health_pb2_grpc.HealthStub(running.channel)
    status = stub.Check(health_pb2.HealthCheckRequest(service=service)).status
    return health_pb2.HealthCheckResponse.ServingStatus.Name(status)


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


@pytest.mark.parametrize(
    "module",
    [
        "serving.main",
        "serving.server",
        "serving.client",
        "serving.client_main",
        "serving.compile_main",
    ],
)
def test_no_jax_in_the_server_or_the_client(module):
    program = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("service", SERVICES)
def test_health(fast, service):
    assert health(fast, service) == "SERVING"


def test_reflection_lists_and_describes_the_services(fast):
    database = ProtoReflectionDescriptorDatabase(fast.channel)
    services = {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "jblock.v1.Inference",
        "jblock.v1.Models",
    }
    assert set(database.get_services()) == services
    described = database.FindFileContainingSymbol("jblock.v1.Inference")
    methods = [m.name for m in described.service[0].method]
    assert methods == ["Generate", "GenerateStream", "Score", "Embed", "Tokenize", "Detokenize"]


def test_until_the_engine_is_warm_requests_are_unavailable():
    engine = build_engine(start_delay=0.5)
    with harness.serving(engine, warm=False) as running:
        assert health(running) == "NOT_SERVING"
        for ask in (
            lambda: running.client.generate("echo", [1]),
            running.client.models,
            lambda: running.client.model("echo"),
        ):
            with pytest.raises(ClientError, match="UNAVAILABLE: engine: is warming up"):
                ask()
        assert harness.eventually(lambda: health(running) == "SERVING")
        assert running.client.generate("echo", [1], max_tokens=1).token_ids == (1,)


def test_a_killed_engine_fails_what_is_open_and_all_that_follows():
    engine = ProcessEngine(MOCK, {"step_delay": 0.01})
    with harness.serving(engine, metrics_port=0) as running:
        stream = running.client.stream("echo", [1], max_tokens=900)
        next(stream)
        assert scrape(running.server.metrics_port)["jblock_engine_up"] == "1.0"
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(ClientError, match=r"UNAVAILABLE: engine: .*killed by SIGKILL"):
            list(stream)
        assert all(health(running, service) == "NOT_SERVING" for service in SERVICES)
        with pytest.raises(ClientError, match=r"UNAVAILABLE: engine: .*SIGKILL.*restart"):
            running.client.generate("echo", [1])
        assert len(running.client.models()) == 1
        assert scrape(running.server.metrics_port)["jblock_engine_up"] == "0.0"
        assert running.server._dispatcher.num_open == 0


def test_a_loop_that_dies_in_this_process_is_reported_too():
    with harness.serving(build_engine(die_after_steps=3)) as running:
        with pytest.raises(ClientError, match=r"UNAVAILABLE: engine: .*told to die"):
            running.client.generate("echo", [1])
        assert health(running) == "NOT_SERVING"


def test_a_bug_of_the_engine_does_not_hang_its_clients():
    engine = build_engine(step_delay=0.01)
    with harness.serving(engine) as running:
        stream = running.client.stream("echo", [1], max_tokens=900)
        next(stream)
        engine.poll = lambda timeout: 1 / 0
        with pytest.raises(ClientError, match="UNAVAILABLE: engine: division by zero"):
            list(stream)
        assert health(running) == "NOT_SERVING"


def test_a_bug_of_the_server_is_internal_and_frees_the_pages(slow, monkeypatch):
    monkeypatch.setattr("serving.answers.TextStream.push", lambda self, ids: 1 / 0)
    with pytest.raises(ClientError, match="INTERNAL: server: failed on this request"):
        slow.client.generate("echo", [300], max_tokens=900)
    assert harness.eventually(slow.is_empty)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"fail_at_start": "zoo: '/x' is no zoo"}, ValueError, "zoo: '/x' is no zoo"),
        ({"exit_at_start": 3}, api.EngineDied, "exited with code 3"),
        (
            {"models": [{"name": "m", "tokenizer_path": "/nowhere"}]},
            ValueError,
            "tokenizer_path: /nowhere/tokenizer.json is no tokenizer",
        ),
    ],
)
def test_an_engine_that_does_not_start_ends_serve(kwargs, error, message):
    async def run():
        await serve(ServerConfig(), ProcessEngine(MOCK, kwargs), asyncio.Event())

    with pytest.raises(error, match=message):
        asyncio.run(run())


def test_stop_while_warming_up():
    async def run():
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.2, stop.set)
        return await serve(ServerConfig(), ProcessEngine(MOCK, {"start_delay": 60.0}), stop)

    begin = time.monotonic()
    assert asyncio.run(run())
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("field", ["port", "metrics_port"])
def test_a_port_that_is_taken(field):
    async def run(port):
        await Server(ServerConfig(**{field: port}), build_engine()).start()

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError):
        asyncio.run(run(taken.getsockname()[1]))


def test_a_drain_lets_open_requests_end_and_admits_no_more(tmp_path):
    engine = harness.mock(tmp_path, step_delay=0.02)
    with harness.serving(engine, drain_seconds=10.0) as running:
        stream = running.client.stream("echo", [300], max_tokens=40)
        next(stream)
        stopping = threading.Thread(target=running.call, args=(running.server.stop(),))
        stopping.start()
        assert harness.eventually(lambda: health(running) == "NOT_SERVING")
        with pytest.raises(ClientError, match="UNAVAILABLE: server: is shutting down"):
            running.client.generate("echo", [300])
        assert list(stream)[-1].usage.completion_tokens == 40
        stopping.join()


def test_a_drain_that_takes_too_long_is_cut_short(tmp_path):
    engine = harness.mock(tmp_path, step_delay=0.02)
    with harness.serving(engine, drain_seconds=0.2) as running:
        stream = running.client.stream("echo", [300], max_tokens=900)
        next(stream)
        begin = time.monotonic()
        assert running.call(running.server.stop()) is False
        assert time.monotonic() - begin < 5
        with pytest.raises(ClientError):
            list(stream)


def test_metrics(tmp_path):
    with harness.serving(harness.mock(tmp_path), metrics_port=0) as running:
        running.client.generate("echo", [300, 301], max_tokens=5)
        for name in ("nobody", "somebody"):
            with pytest.raises(ClientError):
                running.client.generate(name, [300])
        with pytest.raises(ClientError):
            running.client.generate("echo", [300], top_k=-1)
        port = running.server.metrics_port
        values = scrape(port)
        assert values["jblock_compiles_on_serving_path_total"] == "0.0"
        assert values["jblock_generated_tokens_total"] == "5.0"
        assert values["jblock_pages_free"] == values["jblock_pages_total"] == "4096.0"
        assert values['jblock_requests_total{code="OK",model="echo"}'] == "1.0"
        assert values['jblock_requests_total{code="NOT_FOUND",model=""}'] == "2.0"
        assert values['jblock_requests_total{code="INVALID_ARGUMENT",model="echo"}'] == "1.0"
        assert values['jblock_tokens_total{kind="completion",model="echo"}'] == "5.0"
        assert values['jblock_time_to_first_token_seconds_count{model="echo"}'] == "1.0"
        # The last answer's place is free once its client has read it.
        assert harness.eventually(lambda: scrape(port)["jblock_requests_open"] == "0.0")
        fields = {f.removesuffix("_total") for f in values}
        told = {f.removesuffix("_total") for f in api.EngineStats.__dataclass_fields__}
        assert told - {"tenants", "blocks"} <= {f.removeprefix("jblock_") for f in fields}
    with pytest.raises(OSError):
        scrape(port)


def test_metrics_tell_a_cancel_from_an_expired_deadline(tmp_path):
    engine = harness.mock(tmp_path, step_delay=0.01)
    with harness.serving(engine, metrics_port=0) as running:
        stream = running.client.stream("echo", [300], max_tokens=900)
        next(stream)
        stream.close()
        with pytest.raises(ClientError, match="DEADLINE_EXCEEDED"):
            running.client.generate("echo", [300], max_tokens=900, timeout=0.2)
        assert harness.eventually(running.is_empty)
        values = scrape(running.server.metrics_port)
        assert values['jblock_requests_total{code="CANCELLED",model="echo"}'] == "1.0"
        assert values['jblock_requests_total{code="DEADLINE_EXCEEDED",model="echo"}'] == "1.0"


def test_two_servers_do_not_share_a_port():
    with harness.serving(build_engine()) as running:

        async def run():
            await Server(ServerConfig(port=running.server.port), build_engine()).start()

        with pytest.raises(OSError, match="port: cannot listen on"):
            asyncio.run(run())


def test_a_compressed_request_is_understood(fast):
    request = harness.ids_request(max_tokens=1)
    answer = fast.stub.Generate(request, compression=grpc.Compression.Gzip)
    assert list(answer.token_ids) == [300]
