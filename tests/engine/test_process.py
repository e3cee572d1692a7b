"""The process boundary: messages survive it, and either side's death is noticed by the other."""

import concurrent.futures
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.engine import api
from jblock.engine.process import wire
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.mock import MockEngine, build_engine

MOCK = "jblock.engine.process.mock:build_engine"


def collect(engine: api.Engine, request_id: str, seconds: float = 10.0) -> list[api.Output]:
    """Polls until the request's last output."""
    outputs: list[api.Output] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        outputs += [o for o in engine.poll(0.1) if o.request_id == request_id]
        if outputs and outputs[-1].finish_reason:
            return outputs
    raise TimeoutError(f"{request_id}: no end after {seconds} s, got {outputs}")


def eventually(check, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not yet reaped does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
requests = st.builds(
    api.Request,
    request_id=st.text(max_size=5),
    model=st.text(max_size=5),
    token_ids=ids,
    sampling=st.builds(
        api.SamplingParams,
        temperature=st.floats(0, 2),
        seed=st.none() | st.integers(0, 2**32 - 1),
        stop_token_ids=ids,
        ignore_eos=st.booleans(),
    ),
)


@settings(deadline=None)
@given(requests)
def test_a_request_survives_the_wire(request):
    assert wire.for_child(wire.pack(wire.Submit(request))) == wire.Submit(request)


def test_bytes_that_are_no_frame_are_refused():
    for frame in (b"", b"\xc1", b"\x01", b"\x93\x01\x02\x03", pickle_bytes()):
        for unpack in (wire.for_child, wire.for_parent):
            with pytest.raises(ValueError, match="is no message of the engine's boundary"):
                unpack(frame)


def pickle_bytes() -> bytes:
    import pickle

    return pickle.dumps(["submit", {}])


def test_an_object_of_ours_cannot_cross():
    with pytest.raises(TypeError):
        ProcessEngine(MOCK, {"models": object()})


@pytest.fixture(scope="module")
def engine():
    models = [{"name": "echo"}, {"name": "shift", "offset": 1, "eos_token_ids": [9]}]
    engine = ProcessEngine(MOCK, {"models": models, "step_delay": 0.002})
    yield engine
    engine.close()


def test_the_child_answers_like_the_engine_it_holds(engine):
    local = build_engine(models=[{"name": "echo"}, {"name": "shift", "offset": 1}])
    assert engine.models() == local.models()
    local.close()
    sampling = api.SamplingParams(max_tokens=5, logprobs=True)
    engine.submit(api.Request(request_id="1", model="echo", token_ids=(4, 5), sampling=sampling))
    outputs = collect(engine, "1")
    assert [t for o in outputs for t in o.token_ids] == [4, 5, 4, 5, 4]
    assert [p for o in outputs for p in o.logprobs] == [-0.5] * 5
    assert outputs[-1].finish_reason == "length"
    engine.submit(api.Request(request_id="2", model="shift", token_ids=(6, 7, 8)))
    outputs = collect(engine, "2")
    assert [t for o in outputs for t in o.token_ids] == [7, 8]
    assert outputs[-1].finish_reason == "stop"


def test_a_cancel_gives_the_pages_back(engine):
    engine.models()
    sampling = api.SamplingParams(max_tokens=900)
    engine.submit(api.Request(request_id="3", model="echo", token_ids=(1,), sampling=sampling))
    assert eventually(lambda: engine.stats().running == 1)
    assert engine.stats().pages_free < engine.stats().pages_total
    engine.cancel("3")
    assert collect(engine, "3")[-1].finish_reason == "cancelled"
    assert eventually(lambda: engine.stats().running == 0)
    assert engine.stats().pages_free == engine.stats().pages_total


def test_an_unknown_model_is_an_output_not_an_exception(engine):
    engine.submit(api.Request(request_id="4", model="none", token_ids=(1,)))
    assert collect(engine, "4")[-1].error_code == "NOT_FOUND"


def test_sigint_and_sigterm_are_the_parents_business(engine):
    engine.models()
    os.kill(engine.pid, signal.SIGINT)
    os.kill(engine.pid, signal.SIGTERM)
    engine.submit(api.Request(request_id="5", model="echo", token_ids=(1, 2)))
    assert collect(engine, "5")[-1].finish_reason == "length"


@pytest.mark.parametrize("operators", [None, "glibc.malloc.hugetlb=0"])
def test_the_child_asks_for_huge_pages_unless_the_operator_has_a_say(operators, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if operators is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", operators)
    engine = ProcessEngine(MOCK)
    try:
        engine.models()
        with open(f"/proc/{engine.pid}/environ") as file:
            environ = dict(entry.split("=", 1) for entry in file.read().split("\0") if entry)
    finally:
        engine.close()
    assert environ["GLIBC_TUNABLES"] == (operators or "glibc.malloc.hugetlb=1")


def test_a_refusal_of_the_factory_is_raised_by_models():
    engine = ProcessEngine(MOCK, {"fail_at_start": "models: 'x' is not in the zoo"})
    with pytest.raises(ValueError, match="models: 'x' is not in the zoo"):
        engine.models()
    with pytest.raises(api.EngineDied, match="code 1"):
        engine.poll(5.0)
    engine.close()
    engine.close()


@pytest.mark.parametrize(
    "factory", ["jblock.engine.process.mock:none", "no.such:thing", "nonsense"]
)
def test_a_factory_that_is_not_there_is_named(factory):
    engine = ProcessEngine(factory)
    with pytest.raises(ValueError, match=f"factory: '{factory}' cannot be loaded"):
        engine.models()
    engine.close()


def test_a_child_that_exits_at_start_is_reported_with_its_code():
    engine = ProcessEngine(MOCK, {"exit_at_start": 7})
    with pytest.raises(api.EngineDied, match="exited with code 7"):
        engine.models()
    engine.close()


def test_a_wrong_argument_is_reported_with_its_words(capfd):
    engine = ProcessEngine(MOCK, {"colour": "red"})
    with pytest.raises(api.EngineDied, match=r"TypeError.*colour"):
        engine.models()
    engine.close()
    assert "Traceback" in capfd.readouterr().err


def test_a_killed_child_ends_poll_and_models():
    engine = ProcessEngine(MOCK, {"step_delay": 0.01})
    engine.models()
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(api.EngineDied, match="killed by SIGKILL"):
        while True:
            engine.poll(5.0)
    with pytest.raises(api.EngineDied, match="killed by SIGKILL"):
        engine.models()
    engine.submit(api.Request(request_id="1", model="echo", token_ids=(1,)))
    engine.close()


def test_a_child_that_is_told_nonsense_ends():
    engine = ProcessEngine(MOCK)
    engine.models()
    engine._outbox.put(b"nonsense")
    with pytest.raises(api.EngineDied, match=r"code 1.*must run the same version of jblock"):
        while True:
            engine.poll(5.0)
    engine.close()


def test_a_child_that_talks_nonsense_is_ended():
    engine = ProcessEngine("test_process:nonsense_engine")
    with pytest.raises(api.EngineDied, match="must run the same version of jblock"):
        engine.models()
    engine.close()


def nonsense_engine():
    """Writes to the pipe past the protocol, from within the child."""
    from multiprocessing.connection import Connection

    Connection(int(sys.argv[1])).send_bytes(b"nonsense")
    time.sleep(60)


MORE = [
    {"name": "echo", "version": 2, "offset": 1},
    {"name": "late", "offset": 5},
    {"name": "wide", "misfit": "hidden size: 9 does not fit; restart with it in --models"},
]


def test_the_child_serves_other_chains_while_requests_run():
    engine = ProcessEngine(MOCK, {"more": MORE, "serve_delay": 0.3, "step_delay": 0.01})
    sampling = api.SamplingParams(max_tokens=60)
    old = api.Request(request_id="old", model="echo", token_ids=(7,), sampling=sampling, version=1)
    engine.models()
    engine.submit(old)
    outputs = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        serving = pool.submit(engine.serve, ["echo", "late"])
        while not serving.done():  # its tokens go on meanwhile
            outputs += engine.poll(1.0)
        infos = serving.result()
    assert len(outputs) > 5 and not outputs[-1].finish_reason
    assert [(m.name, m.version) for m in infos] == [("echo", 2), ("late", 1)]
    assert engine.models() == infos
    outputs += collect(engine, "old")
    assert [t for o in outputs for t in o.token_ids] == [7] * 60
    for number, (model, token) in enumerate([("echo", 8), ("late", 12)]):
        request = dataclasses.replace(old, request_id=str(number), model=model, version=0)
        engine.submit(request)
        assert collect(engine, request.request_id)[0].token_ids == (token,)
    engine.submit(dataclasses.replace(old, request_id="stale"))
    assert collect(engine, "stale")[-1].error_code == "ABORTED"
    assert engine.serve(["echo@1"])[0].version == 1
    engine.close()


@pytest.mark.parametrize(
    ("models", "error", "message"),
    [
        (["echo", "nobody"], api.UnknownChain, "'nobody' is not in the zoo, which has echo, late"),
        (["echo@9"], api.UnknownChain, "'echo@9' is not in the zoo"),
        (["echo", "wide"], ValueError, "hidden size: 9 does not fit"),
    ],
)
def test_a_refusal_to_serve_crosses_and_changes_nothing(models, error, message):
    engine = ProcessEngine(MOCK, {"more": MORE, "models": [{"name": "echo"}]})
    before = engine.models()
    with pytest.raises(error, match=message):
        engine.serve(models)
    assert engine.models() == before
    engine.submit(api.Request(request_id="1", model="echo", token_ids=(4,)))
    assert collect(engine, "1")[0].token_ids == (4,)
    engine.close()


def test_a_bug_met_while_serving_is_reported_and_the_rest_goes_on(capfd):
    engine = ProcessEngine("test_process:clumsy_engine")
    with pytest.raises(RuntimeError, match="division by zero"):
        engine.serve(["echo"])
    engine.submit(api.Request(request_id="1", model="echo", token_ids=(4,)))
    assert collect(engine, "1")[0].token_ids == (4,)
    engine.close()
    assert "Traceback" in capfd.readouterr().err


def clumsy_engine():
    """A mock whose `serve` has a bug."""
    engine = build_engine()
    engine.serve = lambda models, base=None: 1 / 0
    return engine


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_whoever_waits_for_serve_hears_of_the_end(how):
    engine = ProcessEngine(MOCK, {"serve_delay": 60.0})
    engine.models()
    end = engine.close if how == "closed" else lambda: os.kill(engine.pid, signal.SIGKILL)
    timer = threading.Timer(0.3, end)
    timer.start()
    with pytest.raises(api.EngineDied, match=how):
        engine.serve(["echo"])
    timer.join()
    engine.close()


def test_a_loop_that_dies_is_reported_with_its_words():
    engine = ProcessEngine(MOCK, {"die_after_steps": 3})
    engine.submit(api.Request(request_id="1", model="echo", token_ids=(1,)))
    outputs = []
    with pytest.raises(api.EngineDied, match="told to die after 3 steps"):
        while True:
            outputs += engine.poll(5.0)
    assert [t for o in outputs for t in o.token_ids] == [1, 1, 1]
    engine.close()


@pytest.mark.parametrize("start_delay", [0.0, 60.0], ids=["warm", "warming up"])
def test_the_child_ends_when_its_parent_is_gone(start_delay):
    program = (
        "import sys, time\n"
        "from jblock.engine.process.client import ProcessEngine\n"
        f"engine = ProcessEngine({MOCK!r}, {{'start_delay': {start_delay}}})\n"
        f"{'engine.models()' if not start_delay else 'time.sleep(0.5)'}\n"
        "print(engine.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    assert eventually(lambda: not alive(child))
    parent.stdout.close()


def test_close_while_warming_up_is_quick():
    engine = ProcessEngine(MOCK, {"start_delay": 60.0})
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < 5
    with pytest.raises(api.EngineDied, match="closed"):
        engine.models()


def test_requests_wait_for_a_page_in_the_mock():
    engine = MockEngine(build_engine()._models.values(), pages=8, page_size=16)
    sampling = api.SamplingParams(max_tokens=100)
    for name in "ab":
        engine.submit(api.Request(request_id=name, model="echo", token_ids=(1,), sampling=sampling))
    assert collect(engine, "a")[-1].finish_reason == "length"
    assert collect(engine, "b")[-1].finish_reason == "length"
    assert engine.stats().pages_free == 8
    engine.close()


def test_counters_are_there_as_soon_as_the_models_are():
    engine = ProcessEngine(MOCK, {})
    try:
        assert engine.models()
        assert engine.stats().pages_free == engine.stats().pages_total > 0
    finally:
        engine.close()
