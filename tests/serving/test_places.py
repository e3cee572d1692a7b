"""A place in the queue is taken until the answer is read; what can never have one is told so."""

import asyncio
import collections
import logging
import threading
import time

import grpc
import pytest
import server_harness as harness

from jblock.engine.process.mock import build_engine
from serving.client import AsyncClient
from serving.tenants import Tenant, Tenants
from serving.v1 import jblock_pb2 as pb
from serving.v1 import jblock_pb2_grpc
from serving.values import ClientError

# So that an answer of some 100 KB does not fit what a client takes unread.
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))
BIG = {"max_tokens": 1000, "ignore_eos": True, "top_logprobs": 20}


def unread(target, method):
    """A call whose answer nobody reads."""
    channel = grpc.insecure_channel(target, SMALL_WINDOW)
    # On the wire a unary call is a stream of one message; a stub of a stream reads only what it is asked for.
    call = channel.unary_stream(
        f"/jblock.v1.Inference/{method}",
        pb.GenerateRequest.SerializeToString,
        pb.GenerateResponse.FromString,
    )
    return call(harness.ids_request(**BIG)), channel


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_an_answer_that_nobody_reads_keeps_its_place(tmp_path, method):
    with harness.serving(harness.mock(tmp_path), max_queue=2, drain_seconds=20.0) as running:
        calls = [unread(running.target, method) for _ in range(2)]
        assert harness.eventually(lambda: running.engine.stats().generated_tokens == 2000)
        assert harness.eventually(lambda: running.engine.stats().running == 0)
        with pytest.raises(ClientError, match="UNAVAILABLE: queue: 2 requests are open"):
            running.client.generate("echo", [300], max_tokens=1)
        # Reading it to its end gives the place back, and so does leaving.
        assert sum(len(m.token_ids) for m in calls[0][0]) == 1000
        assert harness.eventually(lambda: running.server._dispatcher.num_open == 1)
        calls[1][0].cancel()
        assert harness.eventually(running.is_empty)
        for _, channel in calls:
            channel.close()


def test_a_drain_does_not_wait_for_those_who_do_not_read(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("serving.dispatcher._UNREAD_SECONDS", 0.3)
    with harness.serving(harness.mock(tmp_path), drain_seconds=20.0) as running:
        _, channel = unread(running.target, "GenerateStream")
        assert harness.eventually(lambda: running.engine.stats().generated_tokens == 1000)
        begin = time.monotonic()
        with caplog.at_level(logging.WARNING):
            assert running.call(running.server.stop()) is False
        assert time.monotonic() - begin < 5
        assert "1 requests were not over" in caplog.text
        channel.close()


def test_what_a_drain_cuts_is_told_and_logged(tmp_path, caplog):
    engine = harness.mock(tmp_path, step_delay=0.02)
    with harness.serving(engine, drain_seconds=0.1) as running:
        stream = running.client.stream("echo", [300], max_tokens=900)
        next(stream)
        with caplog.at_level(logging.WARNING):
            running.call(running.server.stop())
        with pytest.raises(ClientError, match="UNAVAILABLE: server: shut down before this request"):
            list(stream)
        assert "1 requests were not over after drain_seconds, 0.1" in caplog.text


def test_a_second_signal_hurries_a_drain(tmp_path):
    engine = harness.mock(tmp_path, step_delay=0.02)
    with harness.serving(engine, drain_seconds=60.0) as running:
        stream = running.client.stream("echo", [300], max_tokens=1000)
        next(stream)

        async def stop():
            hurry = asyncio.Event()
            asyncio.get_running_loop().call_later(0.2, hurry.set)
            return await running.server.stop(hurry)

        begin = time.monotonic()
        assert running.call(stop()) is False
        assert 0.2 < time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("tenant", "most"), [(Tenant(name="acme", max_requests=2), 2), (Tenant(name="beta"), 3)]
)
def test_more_samples_than_a_tenant_may_ever_have(tenant, most):
    key = "k" * 32
    import hashlib

    tenants = Tenants([(hashlib.sha256(key.encode()).digest(), tenant)])
    with harness.serving(build_engine(), max_queue=6, tenants=tenants) as running:
        request = harness.ids_request(n=most + 1, max_tokens=1)
        with pytest.raises(grpc.RpcError) as caught:
            running.stub.Generate(request, metadata=[("authorization", f"Bearer {key}")])
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert (
            f"n: asks for {most + 1} answers at once, and at most {most} requests may be open"
            in caught.value.details()
        )


def test_more_samples_than_the_queue_has_places():
    with harness.serving(build_engine(), max_queue=4) as running:
        with pytest.raises(ClientError, match="INVALID_ARGUMENT: n: asks for 5 answers at once"):
            running.client.generate("echo", [1], n=5, max_tokens=1)
        assert len(running.client.generate("echo", [1], n=4, max_tokens=1).choices) == 4


def test_thousands_of_calls_at_once_are_refused_in_words_of_ours():
    async def flood(target):
        codes = collections.Counter()
        async with AsyncClient(target) as client:

            async def one():
                try:
                    await client.generate("echo", [1], max_tokens=1)
                    codes["OK"] += 1
                except ClientError as error:
                    codes[error.code] += 1
                    assert "requests are open" in error.message

            await asyncio.gather(*(one() for _ in range(2500)))
        return codes

    with harness.serving(build_engine(step_delay=0.01), max_queue=16) as running:
        codes = asyncio.run(flood(running.target))
    assert codes["OK"] > 0
    assert set(codes) <= {"OK", "UNAVAILABLE"}


def test_places_are_taken_all_or_none(tmp_path):
    engine = harness.mock(tmp_path, step_delay=0.02)
    with harness.serving(engine, max_queue=4) as running:
        stub = jblock_pb2_grpc.InferenceStub(running.channel)
        stream = stub.GenerateStream(harness.ids_request(max_tokens=900, n=3))
        next(stream)
        with pytest.raises(ClientError, match="queue: 3 requests are open"):
            running.client.generate("echo", [300], n=2)
        assert running.client.generate("echo", [300], max_tokens=1).token_ids == (300,)
        stream.cancel()
        assert harness.eventually(running.is_empty)


def test_a_flood_of_threads_leaves_no_place_taken(tmp_path):
    with harness.serving(harness.mock(tmp_path), max_queue=4) as running:

        def ask():
            try:
                running.client.generate("echo", [300], max_tokens=2)
            except ClientError as error:
                assert error.code == "UNAVAILABLE"

        threads = [threading.Thread(target=ask) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert harness.eventually(running.is_empty)
