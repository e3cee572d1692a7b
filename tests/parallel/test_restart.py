"""An engine over a mesh of fake devices that is killed: its streams go on as if nothing had been."""

import os
import signal
import time
from pathlib import Path

import fake_devices
import pytest

from checkpoints import hf, peft
from checkpoints.progress import Progress
from jblock.engine.api import Output, Request, SamplingParams
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.supervisor import SupervisedEngine

ROOT = Path(__file__).parent.parent.parent
BASE, ADAPTER, EXPERTS = "demo-1m", "demo-1m-largest-lora12", "mixtral"
LONG = 300.0
TOKENS = 72


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """A base, an adapter on it and a mixture of experts."""
    path, quiet = tmp_path_factory.mktemp("restart") / "zoo", Progress(False)
    hf.convert(ROOT / "examples/models" / BASE, path, BASE, quiet)
    peft.convert(ROOT / "examples/adapters" / ADAPTER, path, BASE, ADAPTER, quiet)
    hf.convert(ROOT / "tests/fixtures/hf" / EXPERTS, path, EXPERTS, quiet)
    return path


def requests(models: tuple[str, ...]) -> list[Request]:
    """Three of each model; of these one greedy and two drawn with a seed."""
    made = []
    for i, model in enumerate(models * 3):
        drawn = {"temperature": 1.0, "seed": i} if i >= len(models) else {}
        sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True, **drawn)
        prompt = tuple(5 + (7 * j + i) % 120 for j in range(21 + i))
        made.append(Request(request_id=f"r{i}", model=model, token_ids=prompt, sampling=sampling))
    return made


def answers(engine: SupervisedEngine, asked: list[Request], kills: int) -> dict[str, list[int]]:
    """Tokens by request, from an engine whose process is killed so many times in between."""
    tokens: dict[str, list[int]] = {r.request_id: [] for r in asked}
    ends: dict[str, Output] = {}
    limit = time.monotonic() + LONG
    try:
        engine.models()
        for request in asked:
            engine.submit(request)
        wanted = 4
        while len(ends) < len(asked):
            assert time.monotonic() < limit, "not in time"
            for output in engine.poll(0.1):
                tokens[output.request_id] += output.token_ids
                if output.finish_reason:
                    ends[output.request_id] = output
            if kills and engine.is_up and all(len(t) >= wanted for t in tokens.values()):
                os.kill(engine.pid, signal.SIGKILL)
                kills, wanted = kills - 1, wanted + 8
        stats = engine.stats()
    finally:
        engine.close()
    assert {e.finish_reason for e in ends.values()} == {"length"}, ends
    assert not kills and stats.compiles_on_serving_path == 0
    return tokens


@pytest.mark.long
@pytest.mark.parametrize(
    "mesh,models",
    [
        ("tp=2", (BASE, ADAPTER)),
        ("dp=2", (BASE, ADAPTER)),
        ("ep=2", (BASE, EXPERTS)),
        ("tp=4", (BASE, ADAPTER)),
        ("ep=2,tp=2", (BASE, EXPERTS)),
        ("dp=2,tp=2", (BASE, ADAPTER)),
        ("tp=8", (BASE, ADAPTER)),
        ("dp=4,ep=2", (BASE, EXPERTS)),
    ],
)
def test_streams_go_on_over_kills(zoo, tmp_path, monkeypatch, mesh, models):
    monkeypatch.setenv("XLA_FLAGS", fake_devices.flags(8))
    kwargs = {
        "zoo": str(zoo),
        "models": list(models),
        "max_num_seqs": 8,
        "max_model_len": 128,
        "decode_sizes": [8],
        "prefill_grids": [[8, 16]],
        "kv_memory_mb": 16,
        "mesh": mesh,
    }

    def supervised() -> SupervisedEngine:
        return SupervisedEngine(
            lambda served: ProcessEngine(
                "jblock.engine.factory:build_engine",
                {**kwargs, "models": list(served) or list(models)},
                heartbeat_seconds=30.0,
            ),
            backoff_seconds=0.01,
        )

    quiet = answers(supervised(), requests(models), 0)
    assert answers(supervised(), requests(models), 2) == quiet
