"""Engine processes that die, freeze or do not come up, under requests that must not notice."""

import dataclasses
import functools
import os
import signal
import threading
import time

import pytest
from polled import LONG, Reader, echoed, request, until

from jblock.engine import api
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.supervisor import SupervisedEngine
from jblock.engine.process.suspects import Held, Suspects

MOCK = "jblock.engine.process.mock:build_engine"
KILLER, FREEZER = 500, 501


class Processes:
    """Starts mock engines and remembers them.

    Attributes:
      started: what each process was told to serve.
    """

    def __init__(self, heartbeat_seconds: float = 0.0, **kwargs):
        self.started: list[tuple[str, ...]] = []
        self.kwargs = {"step_delay": 0.005, **kwargs}
        self._heartbeat = heartbeat_seconds

    def __call__(self, served) -> ProcessEngine:
        self.started.append(tuple(served))
        return ProcessEngine(MOCK, self.kwargs, heartbeat_seconds=self._heartbeat)


@pytest.fixture
def supervised():
    """Makes an engine and its reader; both are gone afterwards."""
    made = []

    def make(heartbeat_seconds: float = 0.0, **kwargs):
        processes = Processes(heartbeat_seconds, **kwargs)
        engine = SupervisedEngine(processes, backoff_seconds=0.01)
        reader = Reader(engine)
        reader.start()
        made.append((engine, reader))
        return engine, reader, processes

    yield make
    for engine, reader in made:
        reader.stopping = True
        reader.join(LONG)
        engine.close()


def test_streams_go_on_after_kills_as_if_nothing_had_been(supervised):
    engine, reader, processes = supervised()
    prompts = {f"r{i}": (i + 1, i + 2, i + 3) for i in range(8)}
    for i, (name, prompt) in enumerate(prompts.items()):
        # Half of them are drawn; of these some without a seed of the client's.
        drawn = {"temperature": 1.0, "seed": i if i % 4 else None} if i % 2 else {}
        engine.submit(request(name, prompt, prompt_logprobs=True, **drawn))
    for wanted in (5, 20, 40):
        until(functools.partial(all_have, reader, wanted))
        until(lambda: engine.is_up)
        os.kill(engine.pid, signal.SIGKILL)
    until(lambda: len(reader.ends) == 8)
    assert len(processes.started) == 4
    assert {e.finish_reason for e in reader.ends.values()} == {"length"}
    for i, (name, prompt) in enumerate(prompts.items()):
        got, plain = reader.tokens[name], echoed(prompt, 60)
        assert len(got) == 60
        if i % 2:
            seed = engine_seed(got, plain)
            assert i % 4 == 0 or seed == i
        else:
            assert got == plain
        assert len(reader.prompt_logprobs[name]) == 2  # once, not once a process
    stats = engine.stats()
    assert stats.restarts == 3 and stats.suspects == 0
    assert stats.generated_tokens >= 8 * 60  # of all processes together
    assert stats.resumed_requests == 24


def all_have(reader, count: int) -> bool:
    return len(reader.tokens) == 8 and all(len(t) > count for t in reader.tokens.values())


def engine_seed(got, plain) -> int | None:
    """The one small seed whose draws these are, or None: one that was drawn, which cannot be looked up."""
    for seed in range(8):
        if got == [(t + hash((seed, i))) % 512 for i, t in enumerate(plain)]:
            return seed
    return None


def test_a_request_without_a_seed_goes_on_with_the_one_it_was_given(supervised):
    engine, reader, _ = supervised()
    engine.submit(request("r", (5,), temperature=1.0, max_tokens=40))
    until(lambda: len(reader.tokens.get("r", ())) > 4)
    seed = engine._open["r"].request.sampling.seed
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: "r" in reader.ends)
    assert reader.tokens["r"] == [(5 + hash((seed, i))) % 512 for i in range(40)]


def test_a_frozen_process_is_noticed_and_replaced(supervised):
    engine, reader, _ = supervised(heartbeat_seconds=2.0)
    engine.submit(request("r", max_tokens=200))
    until(lambda: len(reader.tokens.get("r", ())) > 4)
    os.kill(engine.pid, signal.SIGSTOP)
    until(lambda: "r" in reader.ends)
    assert reader.tokens["r"] == echoed((7, 8, 9), 200)
    assert engine.stats().restarts == 1


def test_a_healthy_process_with_nothing_to_say_is_left_alone(supervised):
    engine, reader, _ = supervised(heartbeat_seconds=2.0)
    until(lambda: engine.is_up)
    pid = engine.pid
    time.sleep(5.0)
    assert engine.pid == pid and engine.stats().restarts == 0 and reader.failure is None


@pytest.mark.parametrize(
    "how", ["kill_token", pytest.param("freeze_token", marks=pytest.mark.long)]
)
def test_of_24_the_one_that_ends_processes_is_refused_alone(supervised, how):
    limit = {"heartbeat_seconds": 2.0} if how == "freeze_token" else {}
    engine, reader, _ = supervised(**limit, **{how: KILLER, "fatal_after": 6})
    names = [f"r{i}" for i in range(24)]
    for i, name in enumerate(names):
        prompt = (KILLER, 3) if i == 13 else (i + 1, i + 2)
        engine.submit(request(name, prompt, max_tokens=40))
    until(lambda: len(reader.ends) == 24, 4 * LONG)
    errors = {n: e for n, e in reader.ends.items() if e.finish_reason == "error"}
    assert list(errors) == ["r13"]
    assert errors["r13"].error_code == "INTERNAL"
    assert "while it ran alone" in errors["r13"].error_message
    for i, name in enumerate(names):
        if i != 13:
            assert reader.tokens[name] == echoed((i + 1, i + 2), 40)
    # All together twice, then halves: 24, 12, 6, 3, then 1 or 2, then 1.
    assert engine.stats().restarts <= 8
    engine.submit(request("later", max_tokens=5))
    until(lambda: "later" in reader.ends)
    assert reader.tokens["later"] == echoed((7, 8, 9), 5)


def test_two_that_end_processes_are_both_found(supervised):
    engine, reader, _ = supervised(kill_token=KILLER, fatal_after=2)
    for i in range(9):
        prompt = (KILLER, 3) if i in (2, 7) else (i + 1, i + 2)
        engine.submit(request(f"r{i}", prompt, max_tokens=30))
    until(lambda: len(reader.ends) == 9, 4 * LONG)
    assert {n for n, e in reader.ends.items() if e.finish_reason == "error"} == {"r2", "r7"}


def test_one_alone_is_refused_only_at_its_third_death(supervised):
    engine, reader, processes = supervised(kill_token=KILLER, fatal_after=3)
    engine.submit(request("r", (KILLER, 1)))
    until(lambda: "r" in reader.ends)
    assert reader.ends["r"].error_code == "INTERNAL"
    assert reader.tokens["r"] == [KILLER, 1, KILLER]  # what was delivered is not sent again
    until(lambda: engine.is_up)
    assert len(processes.started) == 4


def test_a_request_that_comes_while_there_is_no_process_waits_for_one(supervised):
    engine, reader, _ = supervised(start_delay=0.5)
    until(lambda: engine.is_up)
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: not engine.is_up)
    engine.submit(request("r", max_tokens=3))
    engine.submit(request("gone", max_tokens=3))
    engine.cancel("gone")
    engine.submit(request("r", max_tokens=3))
    until(lambda: "r" in reader.ends and "gone" in reader.ends)
    assert reader.ends["gone"].finish_reason == "cancelled"
    assert "already in flight" in reader.ends["r"].error_message


def test_what_was_cancelled_is_not_resumed(supervised):
    engine, reader, _ = supervised()
    for name in ("a", "b"):
        engine.submit(request(name, max_tokens=900))
    until(lambda: len(reader.tokens) == 2)
    os.kill(engine.pid, signal.SIGSTOP)
    engine.cancel("a")
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: "a" in reader.ends)
    before = len(reader.tokens["b"])
    until(lambda: len(reader.tokens["b"]) > before + 5)
    assert reader.ends["a"].finish_reason == "cancelled"
    engine.cancel("b")
    until(lambda: "b" in reader.ends)


def test_a_new_process_serves_what_was_served_last(supervised):
    more = [{"name": "echo", "version": 2, "offset": 1}, {"name": "late", "offset": 5}]
    engine, _, processes = supervised(more=more)
    until(lambda: engine.is_up)
    infos = engine.serve(["echo", "late"])
    assert [(m.name, m.version) for m in engine.models()] == [("echo", 2), ("late", 1)]
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: len(processes.started) == 2)
    assert processes.started == [(), tuple(f"{m.name}@{m.version}" for m in infos)]


def test_a_change_during_which_the_process_dies_fails_alone(supervised):
    engine, reader, _ = supervised(serve_delay=LONG)
    engine.submit(request("r", max_tokens=100))
    until(lambda: len(reader.tokens.get("r", ())) > 4)
    timer = threading.Timer(0.3, lambda: os.kill(engine.pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(api.EngineDied, match="during this change"):
        engine.serve(["echo"])
    timer.join()
    until(lambda: "r" in reader.ends)
    assert reader.tokens["r"] == echoed((7, 8, 9), 100)


def test_where_restarts_do_not_help_the_engine_is_given_up(supervised):
    engine, reader, processes = supervised()
    until(lambda: engine.is_up)
    processes.kwargs["exit_at_start"] = 7
    engine.submit(request("r", max_tokens=900))
    until(lambda: "r" in reader.tokens)
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: reader.failure is not None)
    assert isinstance(reader.failure, api.EngineDied)
    assert "exited with code 7" in str(reader.failure)
    assert "processes in a row" in str(reader.failure)
    assert 3 <= len(processes.started) <= 10
    with pytest.raises(api.EngineDied):
        engine.serve(["echo"])


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [({"fail_at_start": "zoo: none"}, ValueError), ({"exit_at_start": 3}, api.EngineDied)],
)
def test_a_first_start_that_fails_is_not_tried_again(supervised, kwargs, error):
    _, reader, processes = supervised(**kwargs)
    until(lambda: reader.failure is not None)
    assert isinstance(reader.failure, error)
    assert len(processes.started) == 1


def held(count: int, delivered: int = 0) -> dict[str, Held]:
    requests = {str(i): Held(request(str(i))) for i in range(count)}
    for one in requests.values():
        one.delivered += [1] * delivered
    return requests


@pytest.mark.parametrize("count", [1, 2, 3, 24, 64, 200])
@pytest.mark.parametrize("in_steps", [True, False], ids=["in its steps", "while it is read"])
def test_every_position_of_a_killer_is_found_in_few_deaths(count, in_steps):
    for killer in {0, count // 2, count - 1}:
        requests, suspects, deaths = held(count), Suspects(), 0
        while True:
            there = [h for h in requests.values() if h.submitted]
            for one in suspects.next(requests):
                one.resumed()
                there.append(one)
            if str(killer) in {h.id for h in there}:
                deaths += 1
                running = {h.id for h in there if in_steps or h.id != str(killer)}
                refused = suspects.died(requests, running)
                if refused is not None:
                    break
                continue
            for one in there:
                one.take(api.Output(request_id=one.id, token_ids=(1, 2, 3)))
        assert refused == str(killer)
        assert deaths <= 3 + count.bit_length() + (0 if in_steps else 2)


def test_innocents_are_resumed_without_limit():
    requests, suspects = held(5), Suspects()
    for _ in range(100):
        given = suspects.next(requests)
        assert len(given) == 5
        for one in given:
            one.resumed()
            one.take(api.Output(request_id=one.id, token_ids=(1, 2, 3)))
        assert suspects.died(requests, requests) is None


def test_what_was_delivered_before_comes_with_a_request():
    first = dataclasses.replace(request("r"), generated=(7, 8))
    assert Held(first).resumed().generated == (7, 8)
