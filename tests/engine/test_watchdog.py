"""A loop that does not come round any more is found out; one that rests, works or was paused is not."""

import threading

import pytest
from harness import SMALL

from jblock.engine import engine as agent
from jblock.engine import watchdog as watch
from jblock.engine.api import EngineDied, Request, SamplingParams
from jblock.engine.engine import ThreadEngine
from jblock.zoo.store import Zoo

MODEL = "llama_gqa_untied"


class Time:
    """A clock that a test sets."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now)

    def looks(self, watched, seconds):
        """Looks once a second for so long; returns what the last look said."""
        for _ in range(seconds):
            self.now += 1
            last = watched.seconds()
        return last


@pytest.fixture
def clock(monkeypatch):
    return Time(monkeypatch)


def test_counts_one_round_only_and_only_while_the_process_runs(clock):
    watched = watch.Watch()
    assert clock.looks(watched, 10) == 0  # nothing has begun
    with watched.rest():
        assert clock.looks(watched, 10) == 0
    assert clock.looks(watched, 1) == 0  # another round: counted from the first look at it
    assert clock.looks(watched, 10) == 10
    clock.now += 3600  # the machine slept
    assert watched.seconds() == 11
    with watched.rest():
        pass
    assert clock.looks(watched, 1) == 0


def test_an_engine_whose_device_does_not_answer_dies_and_says_so(zoo, monkeypatch):
    store = Zoo.open(zoo)
    engine = ThreadEngine(store, {MODEL: store.chain(MODEL)}, SMALL)
    back = threading.Event()
    try:
        assert engine.poll(0.01) == []
        monkeypatch.setattr(agent, "_STUCK_SECONDS", 0.2)
        monkeypatch.setattr(engine._loop, "step", lambda: back.wait(60) and [])
        engine.submit(
            Request(
                request_id="a",
                model=MODEL,
                token_ids=(1, 2),
                sampling=SamplingParams(max_tokens=2),
            )
        )
        with pytest.raises(EngineDied, match="in one step for over 0 seconds: a device call"):
            for _ in range(100):
                engine.poll(0.05)
    finally:
        back.set()
        engine.close()
