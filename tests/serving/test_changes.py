"""Models come, go and are swapped while requests run: over the wire, and with requests in the way."""

import asyncio
import concurrent.futures
import time

import pytest
import server_harness as harness

from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.mock import mock_model
from serving.client import AsyncClient
from serving.values import ClientError


@pytest.fixture
def running(tmp_path):
    """A server of "echo" and "other" whose zoo has more: versions, a misfit, a damaged tokenizer."""
    path = harness.save_tokenizer(tmp_path)
    text = {"vocab_size": harness.VOCAB_SIZE, "tokenizer_path": path}
    models = [{"name": "echo", **text}, {"name": "other"}]
    more = [
        {"name": "other", "version": 2, "offset": 1},
        {"name": "late", **text},
        {"name": "wide", "misfit": "hidden size 9 does not fit; start again with it in --models"},
        {"name": "torn", "tokenizer_path": str(tmp_path / "nowhere")},
    ]
    engine = harness.build_engine(models=models, more=more, step_delay=0.005)
    with harness.serving(engine) as one:
        yield one
        assert harness.eventually(one.is_empty)


def served(running):
    return {m.name: m.version for m in running.client.models()}


def test_a_model_is_loaded_and_unloaded(running):
    loaded = running.client.load("late")
    assert (loaded.name, loaded.version, loaded.has_tokenizer) == ("late", 1, True)
    assert running.client.model("late") == loaded
    answer = running.client.generate("late", "hello", max_tokens=1)
    assert answer.text and answer.model == "late"
    # Others stay in the version they have: "other" has a newer one in the zoo.
    assert served(running) == {"echo": 1, "late": 1, "other": 1}
    running.client.unload("late")
    assert served(running) == {"echo": 1, "other": 1}
    with pytest.raises(ClientError, match="NOT_FOUND: model: 'late' is not served"):
        running.client.generate("late", "hello")


def test_loading_a_served_model_swaps_in_its_live_version(running):
    old = running.client.stream("other", [7], max_tokens=60)
    first = next(old)
    assert running.client.load("other").version == 2
    new = running.client.generate("other", [7], max_tokens=3)
    assert (new.token_ids, new.model_version) == ((8, 8, 8), 2)
    chunks = [first, *old]
    assert [t for c in chunks for t in c.token_ids] == [7] * 60
    assert {c.model_version for c in chunks} == {1}
    assert running.client.load("other", version=1).version == 1
    assert running.client.generate("other", [7], max_tokens=1).token_ids == (7,)


def test_a_tokenizer_is_read_once(running, monkeypatch):
    codec = running.server._dispatcher.models["echo"].codec
    monkeypatch.setattr("serving.text.TextCodec.load", lambda path: 1 / 0)
    for name in ("late", "echo", "other"):
        running.client.load(name)
    models = running.server._dispatcher.models
    assert models["echo"].codec is models["late"].codec is codec


def test_requests_of_an_unloaded_model_end_well(running):
    stream = running.client.stream("other", [7], max_tokens=60)
    next(stream)
    running.client.unload("other")
    assert list(stream)[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (("load", ""), "INVALID_ARGUMENT", "name: is empty; name a model of the zoo"),
        (("load", "echo@2"), "INVALID_ARGUMENT", "put the number into version"),
        (("load", "echo", -1), "INVALID_ARGUMENT", "version: -1 is below 0; 0 is the live one"),
        (("load", "nobody"), "NOT_FOUND", "which has echo, late, other, torn, wide"),
        (("load", "../echo"), "NOT_FOUND", "'../echo' is not in the zoo"),
        (("load", "echo", 9), "NOT_FOUND", "'echo@9' is not in the zoo"),
        (("load", "wide"), "FAILED_PRECONDITION", "hidden size 9 does not fit; start again"),
        (("load", "torn"), "FAILED_PRECONDITION", "nowhere/tokenizer.json is no tokenizer"),
        (("unload", ""), "INVALID_ARGUMENT", "name: is empty"),
        (("unload", "late"), "NOT_FOUND", "'late' is not served; choose one of echo, other"),
    ],
)
def test_what_cannot_be_done_changes_nothing(running, call, code, message):
    with pytest.raises(ClientError) as caught:
        getattr(running.client, call[0])(*call[1:])
    assert caught.value.code == code
    assert message in caught.value.message
    assert served(running) == {"echo": 1, "other": 1}
    assert {m.name: m.version for m in running.engine.serve(["echo", "other@1"])} == served(running)
    assert running.client.generate("other", [7], max_tokens=1).token_ids == (7,)


def test_the_engine_goes_back_where_a_tokenizer_cannot_be_read(running):
    with pytest.raises(ClientError, match="FAILED_PRECONDITION"):
        running.client.load("torn")
    assert sorted(running.engine._models) == ["echo", "other"]


def test_the_last_model_stays(running):
    running.client.unload("other")
    with pytest.raises(ClientError, match=r"FAILED_PRECONDITION: .*'echo' is the last model"):
        running.client.unload("echo")
    assert served(running) == {"echo": 1}


def test_a_bug_of_the_engine_is_internal(running, monkeypatch):
    monkeypatch.setattr(running.engine, "serve", lambda models, base=None: 1 / 0)
    with pytest.raises(ClientError, match="INTERNAL: server: failed to change what is served"):
        running.client.load("late")
    assert served(running) == {"echo": 1, "other": 1}


def test_a_request_prepared_for_the_old_version_is_prepared_anew(running, monkeypatch):
    """The engine has switched, the server not yet: the request waits for it and runs once."""
    original = running.engine.serve

    def serve(models, base=None):
        infos = original(models, base)
        time.sleep(0.3)
        return infos

    monkeypatch.setattr(running.engine, "serve", serve)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        loading = pool.submit(running.client.load, "other")
        assert harness.eventually(lambda: running.engine._models["other"].info.version == 2)
        answer = running.client.generate("other", [7], max_tokens=2)
        assert (answer.token_ids, answer.model_version) == ((8, 8), 2)
        assert loading.result().version == 2


def test_a_change_whose_client_left_is_made_to_its_end(running, monkeypatch):
    original = running.engine.serve
    monkeypatch.setattr(
        running.engine, "serve", lambda m, base=None: (time.sleep(0.4), original(m, base))[1]
    )

    async def load():
        async with AsyncClient(running.target, timeout=0.1) as client:
            await client.load("late")

    with pytest.raises(ClientError, match="DEADLINE_EXCEEDED"):
        asyncio.run(load())
    assert harness.eventually(lambda: "late" in served(running))
    assert running.client.generate("late", "hello", max_tokens=1).text


def test_concurrent_changes_all_come_true(running):
    running.engine.zoo += [mock_model({"name": f"m{i}"}) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(running.client.load, [f"m{i}" for i in range(8)]))
        assert len(served(running)) == 10
        list(pool.map(running.client.unload, [f"m{i}" for i in range(8)]))
    assert served(running) == {"echo": 1, "other": 1}


def test_a_load_that_hangs_holds_up_no_other_change():
    models = [{"name": "echo"}, {"name": "other"}]
    engine = harness.build_engine(
        models=models,
        more=[{"name": "hung"}, {"name": "late", "offset": 5}],
        slow_model="hung",
        slow_seconds=3.0,
    )
    with harness.serving(engine) as running, concurrent.futures.ThreadPoolExecutor(1) as pool:
        loading = pool.submit(running.client.load, "hung")
        time.sleep(0.2)
        running.client.unload("other")
        running.client.load("late")
        assert running.client.generate("late", [7], max_tokens=1).token_ids == (12,)
        assert served(running) == {"echo": 1, "late": 1} and not loading.done()
        loading.result()
        # Put together with what was changed meanwhile.
        assert served(running) == {"echo": 1, "hung": 1, "late": 1}


def test_over_the_process_boundary():
    more = [{"name": "late", "offset": 5}, {"name": "wide", "misfit": "hidden size 9"}]
    engine = ProcessEngine("jblock.engine.process.mock:build_engine", {"more": more})
    with harness.serving(engine) as running:
        running.client.load("late")
        assert running.client.generate("late", [7], max_tokens=1).token_ids == (12,)
        for name, code in (("nobody", "NOT_FOUND"), ("wide", "FAILED_PRECONDITION")):
            with pytest.raises(ClientError, match=code):
                running.client.load(name)
        engine._child.kill()
        with pytest.raises(ClientError, match="UNAVAILABLE: engine"):
            running.client.load("late")


def test_while_warming_up_there_is_nothing_to_change():
    with harness.serving(harness.build_engine(start_delay=0.5), warm=False) as running:
        for call in (running.client.load, running.client.unload):
            with pytest.raises(ClientError, match="UNAVAILABLE: engine: is warming up"):
                call("echo")
