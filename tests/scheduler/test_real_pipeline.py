"""Processes with a span of every chain each: their answers are one agent's, whoever dies."""

import tempfile

import pytest
from demo_agents import answers

from jblock.engine.process.client import FACTORY, ProcessEngine
from jblock.engine.process.seats import share_out
from jblock.scheduler.pipeline import Pipeline
from serving.engine_processes import start_agents


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
