"""Processes with a span of every chain each: their answers are one agent's, whoever dies."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from checkpoints import hf, peft
from checkpoints.progress import Progress
from jblock.engine import api
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.seats import share_out
from jblock.scheduler.pipeline import Pipeline
from serving.engine_processes import start_agents

ROOT = Path(__file__).parent.parent.parent
BASE, ADAPTER = "demo-1m", "demo-1m-largest-lora12"
FACTORY = "jblock.engine.factory:build_engine"
LONG = 600.0
PREFIX = tuple(5 + 7 * i % 120 for i in range(32))


@pytest.fixture(scope="module")
def kwargs(tmp_path_factory) -> dict:
    """Of an engine for a base and an adapter on it."""
    folder, quiet = tmp_path_factory.mktemp("pipeline"), Progress(False)
    hf.convert(ROOT / "examples/models" / BASE, folder / "zoo", BASE, quiet)
    peft.convert(ROOT / "examples/adapters" / ADAPTER, folder / "zoo", BASE, ADAPTER, quiet)
    return {
        "zoo": str(folder / "zoo"),
        "models": [BASE, ADAPTER],
        "executable_cache": str(folder / "programs"),
        "max_num_seqs": 8,
        "max_model_len": 128,
        "page_size": 16,
        "decode_sizes": [8],
        "prefill_grids": [[8, 16]],
        "kv_memory_mb": 16,
    }


def answers(engine: api.Engine, kill: tuple[int, ...] = ()) -> dict[str, list[int]]:
    """Tokens by request, of as many rounds as there are agents to kill, and one more."""
    engine.models()
    tokens: dict[str, list[int]] = {}
    limit = time.monotonic() + LONG
    for number, dead in enumerate((*kill, None)):
        running = set()
        for i in range(8):
            name, own = f"{number}/{i}", tuple(5 + (11 * j + i) % 120 for j in range(9 + i))
            drawn = {"temperature": 1.0, "seed": i} if i % 3 == 2 else {}
            sampling = api.SamplingParams(max_tokens=24, ignore_eos=True, **drawn)
            prompt = (*PREFIX, *own) if i < 4 else own
            model = (BASE, ADAPTER)[i % 2]
            request = api.Request(request_id=name, model=model, token_ids=prompt, sampling=sampling)
            tokens[name] = []
            running.add(name)
            engine.submit(request)
        while running:
            assert time.monotonic() < limit, "not in time"
            for output in engine.poll(0.1):
                tokens[output.request_id] += output.token_ids
                if output.finish_reason:
                    assert output.finish_reason == "length", output
                    running.remove(output.request_id)
            if dead is not None and any(len(tokens[name]) > 4 for name in running):
                os.kill(engine.pids[dead], signal.SIGKILL)
                dead = None
    return tokens


@pytest.mark.long
@pytest.mark.parametrize("agents,kill", [(2, (1, 0)), (3, (2,))])
def test_answers_are_those_of_one_agent(kwargs, agents, kill):
    alone = ProcessEngine(FACTORY, kwargs)
    try:
        expected = answers(alone)
    finally:
        alone.close()
    seats = share_out(agents, 1)
    with tempfile.TemporaryDirectory(prefix="jblock-") as folder:

        def start(agent, served, notify):
            own = {**kwargs, "span_agent": agent, "span_agents": agents, "span_folder": folder}
            own["models"] = list(served) or kwargs["models"]
            return ProcessEngine(FACTORY, own, seat=seats[agent], notify=notify)

        engine = Pipeline(start, agents, backoff_seconds=0.01)
        try:
            got = answers(engine, kill)
            stats = engine.stats()
            assert stats.compiles_on_serving_path == 0 and stats.restarts == len(kill)
            assert len(engine.agents()) == agents
        finally:
            engine.close()
    for name, tokens in got.items():
        assert tokens == expected["0/" + name.partition("/")[2]], name


@pytest.mark.parametrize("mesh", ["pp=3", "dp=2,pp=2"])
def test_another_number_of_agents_is_refused(mesh):
    with pytest.raises(ValueError, match="give pp=2"):
        start_agents({"mesh": mesh}, 2, "", 0.0)
