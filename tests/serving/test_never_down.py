"""The server over engine processes that die: clients see a pause, or a clear end."""

import asyncio
import concurrent.futures
import os
import signal
import time

import pytest
import server_harness as harness
from test_lifecycle import SERVICES, health, scrape

from jblock.engine import api
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.supervisor import SupervisedEngine
from serving.server import ServerConfig, serve
from serving.values import ClientError

MOCK = "jblock.engine.process.mock:build_engine"
LONG = 60.0


def supervised(heartbeat_seconds: float = 0.0, **kwargs) -> SupervisedEngine:
    return SupervisedEngine(
        lambda served: ProcessEngine(MOCK, kwargs, heartbeat_seconds=heartbeat_seconds),
        backoff_seconds=0.01,
    )


def test_streams_see_nothing_but_a_pause():
    engine = supervised(step_delay=0.01)
    with harness.serving(engine, metrics_port=0) as running:
        streams = [running.client.stream("echo", [i, i + 1], max_tokens=200) for i in range(6)]
        for stream in streams:
            next(stream)
        os.kill(engine.pid, signal.SIGKILL)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda s: [t for c in s for t in c.token_ids], streams))
        for i, tokens in enumerate(answers):
            whole = [i, i + 1] * 100
            assert tokens == whole[-len(tokens) :] and len(tokens) > 100
        assert harness.eventually(lambda: health(running) == "SERVING", LONG)
        values = scrape(running.server.metrics_port)
        assert values["jblock_restarts_total"] == "1.0"
        assert values["jblock_resumed_requests_total"] == "6.0"
        assert values["jblock_suspects"] == "0.0"
        assert harness.eventually(running.is_empty, LONG)


def test_health_says_so_while_there_is_no_engine_and_requests_wait():
    engine = supervised(start_delay=1.0)
    with harness.serving(engine, metrics_port=0) as running:
        os.kill(engine.pid, signal.SIGKILL)
        assert harness.eventually(
            lambda: all(health(running, service) == "NOT_SERVING" for service in SERVICES), LONG
        )
        assert scrape(running.server.metrics_port)["jblock_engine_up"] == "0.0"
        assert running.client.generate("echo", [4], max_tokens=2).token_ids == (4, 4)
        assert harness.eventually(lambda: health(running) == "SERVING", LONG)


def test_a_request_that_ends_processes_is_internal_and_alone():
    engine = supervised(kill_token=500, fatal_after=2, step_delay=0.01)
    with harness.serving(engine) as running:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            prompts = [[1], [500], [2], [3]]
            futures = [
                pool.submit(running.client.generate, "echo", p, max_tokens=30, timeout=LONG)
                for p in prompts
            ]
            concurrent.futures.wait(futures)
        for prompt, future in zip(prompts, futures, strict=True):
            if prompt == [500]:
                with pytest.raises(ClientError, match=r"INTERNAL: .*while it ran alone"):
                    future.result()
            else:
                assert future.result().token_ids == (prompt[0],) * 30


def test_a_load_over_which_the_engine_dies_fails_alone():
    engine = supervised(serve_delay=LONG, more=[{"name": "late"}])
    with harness.serving(engine) as running:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            load = pool.submit(running.client.load, "late")
            time.sleep(0.3)
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(ClientError, match=r"UNAVAILABLE: .*during this change"):
                load.result()
        assert running.client.generate("echo", [4], max_tokens=2).token_ids == (4, 4)


def test_serve_ends_with_the_reason_where_restarts_do_not_help():
    """Of a server whose engine cannot come up any more, `main` makes exit code 1."""
    kwargs = {}

    def start(served):
        return ProcessEngine(MOCK, kwargs)

    async def run():
        engine = SupervisedEngine(start, backoff_seconds=0.01)

        def kill(server):
            kwargs["exit_at_start"] = 7
            os.kill(engine.pid, signal.SIGKILL)

        await asyncio.wait_for(serve(ServerConfig(), engine, asyncio.Event(), kill), LONG)

    with pytest.raises(api.EngineDied, match="processes in a row"):
        asyncio.run(run())
