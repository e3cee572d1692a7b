"""What a client gets: text, ids, log-probabilities, why it ended, and what it took."""

import asyncio
import contextlib
import random
import threading
import time

import grpc
import prometheus_client
import pytest
import server_harness as harness
from tokenizer_fixtures import byte_level

from jblock.engine.process.mock import build_engine
from serving.client import AsyncClient, Client
from serving.dispatcher import Arrivals
from serving.text import TextCodec
from serving.v1 import jblock_pb2 as pb
from serving.v1 import jblock_pb2_grpc
from serving.values import ClientError

TEXT = "héllo 你好 🙂 the cat"


def encode(text):
    return tuple(byte_level().encode(text).ids)


def test_text_in_and_text_out(fast):
    ids = encode(TEXT)
    answer = fast.client.generate("echo", TEXT, max_tokens=len(ids))
    assert answer.text == TEXT
    assert answer.token_ids == ids
    assert answer.logprobs == ()
    assert answer.finish_reason == "length"
    assert answer.policy == "exact"
    assert (answer.model, answer.model_version) == ("echo", 3)
    assert answer.usage.prompt_tokens == answer.usage.completion_tokens == len(ids)
    assert 0 < answer.usage.time_to_first_token <= answer.usage.total_time


@pytest.mark.parametrize("model, said", [("echo", "exact"), ("rounded", "near")])
def test_a_request_that_accepts_less_than_exact_learns_what_it_got(fast, model, said):
    for accepted in ("near", "adaptive"):
        answer = fast.client.generate(model, TEXT, max_tokens=1, policy=accepted)
        assert answer.policy == said


def test_ids_in_and_ids_out(fast):
    answer = fast.client.generate("ids", [1, 2, 3], max_tokens=4, logprobs=True)
    assert (answer.text, answer.token_ids) == ("", (2, 3, 4, 2))
    assert answer.logprobs == (-0.5,) * 4


def test_a_stream_is_the_answer_in_parts(slow):
    ids = encode(TEXT)
    chunks = list(slow.client.stream("echo", TEXT, max_tokens=len(ids), logprobs=True))
    assert len(chunks) > 3
    assert "".join(c.text for c in chunks) == TEXT
    assert not any("\ufffd" in c.text for c in chunks)
    assert sum((c.token_ids for c in chunks), ()) == ids
    assert len(sum((c.logprobs for c in chunks), ())) == len(ids)
    assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert [c.usage is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {c.policy for c in chunks} == {"exact"}


def test_half_a_character_at_the_end_is_shown_as_such(fast):
    ids = encode("x🙂")
    assert len(ids) > 2
    answer = fast.client.generate("echo", ids, max_tokens=len(ids) - 1)
    assert answer.text == "x\ufffd"


@pytest.mark.parametrize("ending", [{"model": "ids"}, {"model": "echo", "stop_token_ids": [9]}])
def test_eos_and_stop_ids_end_it_and_are_not_shown(fast, ending):
    prompt = [5, 7, 8] if ending["model"] == "ids" else [6, 8, 9]
    answer = fast.client.generate(prompt=prompt, **ending)
    assert (answer.token_ids, answer.finish_reason) == ((6, 8), "stop")


def test_ignore_eos(fast):
    answer = fast.client.generate("ids", [7, 8], max_tokens=4, ignore_eos=True)
    assert answer.token_ids == (8, 9, 8, 9)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("the cat END and", ["END"], "the cat "),
        ("the cat END and", ["nowhere", "D a"], "the cat EN"),
        ("the EN cat", ["END"], "the EN cat"),
        ("a🙂b", ["🙂"], "a"),
        ("你好", ["好"], "你"),
        ("x🙂", ["\ufffd"], "x🙂"),
    ],
)
def test_stop_strings_across_tokens(slow, text, stop, expected):
    ids = encode(text)
    chunks = list(slow.client.stream("echo", text, stop=stop, max_tokens=len(ids)))
    assert "".join(c.text for c in chunks) == expected
    last = chunks[-1]
    assert last.finish_reason == ("length" if expected == text else "stop")
    # Up to the id that completed the stop string, and none after it.
    sent = sum((c.token_ids for c in chunks), ())
    assert sent == ids[: len(sent)]
    assert last.usage.completion_tokens == len(sent)
    decoded = byte_level().decode(list(sent))
    assert any(s in decoded for s in stop) == (last.finish_reason == "stop")


def test_max_tokens_defaults_to_128_or_what_is_left(fast):
    assert fast.client.generate("echo", [300]).usage.completion_tokens == 128
    answer = fast.client.generate("ids", [1] * 60)
    assert (answer.usage.completion_tokens, answer.finish_reason) == (4, "length")


def test_a_long_text_is_not_truncated_and_blocks_nobody(fast, monkeypatch):
    # As a model of far longer prompts would have it: the whole text is encoded, which takes a while.
    monkeypatch.setattr("serving.text._FIRST_LOOK", 10**6)
    monkeypatch.setattr(TextCodec, "most_characters", lambda codec, num_tokens: 10**6)
    text = "the cat sat on the mat " * 20_000
    waits = []

    def ask():
        with pytest.raises(ClientError, match=r"text: prompt has .* tokens"):
            fast.client.generate("echo", text)

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive():
        begin = time.monotonic()
        fast.client.generate("echo", [300], max_tokens=1)
        waits.append(time.monotonic() - begin)
    thread.join()
    # Were the loop blocked, one of few requests would have waited for all of the encoding.
    assert len(waits) > 10
    assert sum(waits) > 2 * max(waits)


def test_a_hundred_streams_at_once(tmp_path):
    async def one(client, number):
        prompt = encode(f"stream {number} says héllo")
        parts = [c async for c in client.stream("echo", prompt, max_tokens=3 * len(prompt))]
        return "".join(c.text for c in parts), f"stream {number} says héllo" * 3

    async def all_of_them(target):
        async with AsyncClient(target) as client:
            return await asyncio.gather(*(one(client, n) for n in range(100)))

    with harness.serving(harness.mock(tmp_path, step_delay=0.001)) as running:
        for got, expected in asyncio.run(all_of_them(running.target)):
            assert got == expected
        assert harness.eventually(running.is_empty)


def test_a_slow_reader_gets_everything_in_few_messages(slow):
    # The engine is done long before the client looks; what it brought is merged, not queued.
    stream = slow.stub.GenerateStream(harness.ids_request(max_tokens=60, ignore_eos=True))
    time.sleep(0.1)
    got = list(stream)
    assert sum(len(m.token_ids) for m in got) == 60
    assert got[-1].finish_reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_an_error_comes_behind_what_was_sent_before_it(slow, seconds):
    stream = slow.stub.GenerateStream(harness.ids_request("broken", max_tokens=9))
    time.sleep(seconds)
    got = []
    with pytest.raises(grpc.RpcError) as failed:
        for message in stream:
            got += message.token_ids
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert len(got) == 2


def test_outputs_that_nobody_reads_are_merged(slow):
    async def run():
        from jblock.engine import api

        dispatcher = slow.server._dispatcher
        (ticket,) = dispatcher.admit(Arrivals())
        with ticket:
            sampling = api.SamplingParams(max_tokens=20)
            ticket.submit(
                api.Request(
                    request_id=ticket.request_id, model="ids", token_ids=(1,), sampling=sampling
                )
            )
            await asyncio.sleep(0.6)
            taken = ticket.take()
        dispatcher.leave(ticket)
        return taken

    output = slow.call(run())
    assert len(output.token_ids) == 20
    assert output.finish_reason == "length"


def test_cancel_in_the_middle_gives_the_pages_back(slow):
    stream = slow.client.stream("echo", [300], max_tokens=900)
    next(stream)
    assert not slow.is_empty()
    stream.close()
    assert harness.eventually(slow.is_empty)
    assert slow.engine.stats().generated_tokens > 0


def test_an_async_stream_left_early_is_cancelled(slow):
    async def leave():
        async with AsyncClient(slow.target) as client:
            stream = client.stream("echo", [300], max_tokens=900)
            async for _ in stream:
                break
            await stream.aclose()
            assert await client.health() == "SERVING"
            assert (await client.generate("echo", [300], max_tokens=1)).token_ids == (300,)
            assert tuple(m.name for m in await client.models()) == harness.MODELS
            assert (await client.model("echo")).version == 3

    asyncio.run(leave())
    assert harness.eventually(slow.is_empty)


def test_a_client_that_goes_away_gives_the_pages_back(slow):
    client = Client(slow.target)
    next(client.stream("echo", [300], max_tokens=900))
    client.close()
    assert harness.eventually(slow.is_empty)


def test_clients_that_leave_at_any_moment_are_no_fault_of_the_server(tmp_path):
    draw = random.Random(0)

    async def leave(client):
        kind, moment = draw.randrange(3), draw.random() * 0.05
        with contextlib.suppress(ClientError, asyncio.CancelledError):
            if kind == 0:
                await client.generate("echo", [300], max_tokens=500, timeout=moment + 0.001)
            elif kind == 1:
                stream = client.stream("echo", [300], max_tokens=500)
                async for _ in stream:
                    if draw.random() < 0.2:
                        break
                await stream.aclose()
            else:
                task = asyncio.create_task(client.generate("echo", [300], max_tokens=500))
                await asyncio.sleep(moment)
                task.cancel()
                await task

    async def all_of_them(target):
        async with AsyncClient(target) as client:
            for _ in range(5):
                await asyncio.gather(*(leave(client) for _ in range(100)))

    with harness.serving(harness.mock(tmp_path, step_delay=0.0005)) as running:
        asyncio.run(all_of_them(running.target))
        assert harness.eventually(running.is_empty)
        metrics = prometheus_client.generate_latest(running.server._metrics.registry).decode()
        assert 'code="CANCELLED"' in metrics
        assert 'code="INTERNAL"' not in metrics


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_a_deadline_ends_the_work(slow, method):
    before = slow.engine.stats().generated_tokens
    with pytest.raises(grpc.RpcError) as caught:
        answer = getattr(slow.stub, method)(harness.ids_request(max_tokens=900), timeout=0.2)
        list(answer)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert harness.eventually(slow.is_empty)
    assert slow.engine.stats().generated_tokens - before < 100


def test_models(fast):
    assert tuple(m.name for m in fast.client.models()) == harness.MODELS
    echo = fast.client.model("echo")
    assert (echo.version, echo.family, echo.vocab_size) == (3, "mock", harness.VOCAB_SIZE)
    assert (echo.max_model_len, echo.has_tokenizer) == (1024, True)
    assert (echo.blocks, echo.shared_blocks) == (5, 4)
    assert fast.client.model("adapter").base == "echo@3"
    assert not fast.client.model("ids").has_tokenizer


def test_a_client_that_does_not_read_gets_few_messages_once_it_does(tmp_path):
    # One message a token would be 1.4 MB; flow control lets little of that leave before.
    engine = build_engine(models=[{"name": "echo", "max_model_len": 30_000}])
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    with harness.serving(engine) as running, grpc.insecure_channel(running.target, options) as to:
        request = harness.ids_request(ids=(1, 2), max_tokens=20_000, logprobs=True)
        stream = jblock_pb2_grpc.InferenceStub(to).GenerateStream(request)
        assert harness.eventually(lambda: engine.stats().generated_tokens == 20_000, 30)
        messages = list(stream)
        assert sum(len(m.token_ids) for m in messages) == 20_000
        assert len(messages) < 10_000
