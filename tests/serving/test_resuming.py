"""Answers that go on when their server ends: what is sent again, and clients that send it."""

import asyncio
import signal

import pytest
import server_harness as harness
from test_commands import start_server  # noqa: F401 (a fixture)
from tokenizer_fixtures import byte_level

from serving.client import AsyncClient, Client
from serving.resuming import ResumableCall
from serving.v1 import jblock_pb2 as pb
from serving.values import ClientError

TEXT = "bé stöp ☃ and on, "


def texts_and_ids(chunks):
    return "".join(c.text for c in chunks), [i for c in chunks for i in c.token_ids]


@pytest.mark.parametrize("stop", [[], ["on, bé sx"], ["on, bé st"]])
def test_every_place_of_an_answer_can_be_gone_on_from(fast, stop):
    """Characters of several tokens and half a stop string are held back, and told later."""
    sampling = {"max_tokens": 40, "stop": stop, "temperature": 0.0}
    chunks = list(fast.client.stream("echo", TEXT, **sampling))
    text, ids = texts_and_ids(chunks)
    for at in range(len(chunks)):
        before, given = texts_and_ids(chunks[:at])
        request = pb.GenerateRequest(model="echo", text=TEXT, max_tokens=40, stop=stop)
        request.resume.token_ids[:] = given
        request.resume.model_version = 3
        messages = list(fast.stub.GenerateStream(request))
        assert before + "".join(m.text for m in messages) == text
        assert given + [i for m in messages for i in m.token_ids] == ids
        assert messages[-1].finish_reason == (
            pb.FINISH_REASON_STOP if "on, bé st" in stop else pb.FINISH_REASON_LENGTH
        )
        assert messages[-1].usage.completion_tokens == len(ids) - len(given)


@pytest.mark.parametrize(
    ("resume", "fields", "says"),
    [
        ({"token_ids": [1, 999]}, {}, r"resume.token_ids\[1\]: 999 is no token id"),
        ({"token_ids": [1] * 6}, {}, "resume.token_ids: 6 ids are more than max_tokens, 5"),
        ({"token_ids": [1]}, {"n": 2}, "resume: is of one answer, and n is 2"),
        ({"model_version": 2}, {}, "resume.model_version: 2 is not served any more, .* version 3"),
        (
            {"token_ids": byte_level().encode("bb").ids},
            {"stop": ["bb"]},
            "resume.token_ids: complete a stop string",
        ),
    ],
)
def test_what_is_of_no_such_answer_is_refused(fast, resume, fields, says):
    request = harness.ids_request(max_tokens=5, resume=pb.Resumption(**resume), **fields)
    with pytest.raises(Exception) as caught:
        list(fast.stub.GenerateStream(request))
    assert caught.value.code().name == (
        "FAILED_PRECONDITION" if "model_version" in resume else "INVALID_ARGUMENT"
    )
    assert caught.match(says)


def test_streams_go_on_when_their_server_was_killed(start_server):  # noqa: F811
    port = harness.free_port()

    def start():
        server = start_server("--zoo=x", f"--port={port}", "--engine=thread")
        assert server.stdout.readline().startswith("jblock: serving")
        return server

    async def other(chunks, begun):
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            async for chunk in client.stream("echo", [7, 8], max_tokens=150):
                chunks.append(chunk)
                begun.set()

    async def run():
        server, chunks, begun = start(), [], asyncio.Event()
        task = asyncio.create_task(other(chunks, begun))
        await begun.wait()
        with Client(f"127.0.0.1:{port}") as client:
            stream = client.stream("echo", [1, 2, 3], max_tokens=150, temperature=1.0)
            first = next(stream)
            server.send_signal(signal.SIGKILL)
            server.wait()
            starting = asyncio.to_thread(start)
            rest = asyncio.to_thread(list, stream)
            _, rest, _ = await asyncio.gather(starting, rest, task)
            assert client.generate("echo", [5], max_tokens=2).token_ids == (5, 5)
        return [first, *rest], chunks

    drawn, plain = asyncio.run(run())
    assert [i for c in plain for i in c.token_ids] == [7, 8] * 75
    assert len([i for c in drawn for i in c.token_ids]) == 150
    for chunks in (drawn, plain):
        assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].usage.completion_tokens == 150
        assert chunks[-1].usage.total_time >= chunks[-1].usage.time_to_first_token > 0
        assert chunks[-1].finish_reason == "length"


def lost(by_server=False):
    return ClientError("UNAVAILABLE", "gone", by_server)


def test_which_errors_are_waited_out():
    def call(seconds=30.0, **fields):
        return ResumableCall(pb.GenerateRequest(model="m", **fields), seconds, None)

    assert call().wait_after(lost(), reached=True) > 0
    # A server that ended had not looked at the call.
    assert call().wait_after(ClientError("CANCELLED", "CANCELLED"), reached=True) > 0
    for error, reached in (
        (lost(), False),  # Nobody was ever there.
        (lost(by_server=True), True),  # It is full.
        (ClientError("INTERNAL", "a fault"), True),
    ):
        with pytest.raises(ClientError, match=error.message):
            call().wait_after(error, reached)
    with pytest.raises(ClientError, match="gone"):
        call(seconds=0.0).wait_after(lost(), True)
    with pytest.raises(ClientError, match="gone"):
        call(n=2).wait_after(lost(), True)
    waiting = call()
    waits = [waiting.wait_after(lost(), True) for _ in range(7)]
    assert waits == sorted(waits) and waits[-1] == 1.0
    # While it waits for one that comes back, that may say it is not warm yet.
    assert waiting.wait_after(lost(by_server=True), True) == 1.0


def test_draws_get_a_seed_so_that_they_can_go_on():
    assert ResumableCall(pb.GenerateRequest(temperature=1.0), 1.0, None).request.HasField("seed")
    assert ResumableCall(pb.GenerateRequest(temperature=1.0, seed=3), 1.0, None).request.seed == 3
    assert not ResumableCall(pb.GenerateRequest(), 1.0, None).request.HasField("seed")
