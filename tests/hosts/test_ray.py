"""Agents that Ray starts, on a real cluster of several nodes: one is lost and one comes, and nobody who asks
notices."""

import os
import time

import pytest
from host_agents import LONG, MOCK, free_address, secret_file

from jblock.engine import api
from jblock.engine.process.client import ProcessEngine
from jblock.hosts.credentials import from_files
from jblock.hosts.remote_child import RemoteChild
from jblock.scheduler.cluster import Cluster

pytestmark = pytest.mark.long

STREAMS, TOKENS = 6, 40


def ports() -> dict[str, int]:
    """Ports of a node's own processes: one that may choose them is not waited for long."""
    chosen = (int(free_address().rpartition(":")[2]) + i for _ in range(2) for i in (0, 1))
    names = ("dashboard_agent_listen", "metrics_agent", "metrics_export", "runtime_env_agent")
    return {f"{name}_port": port for name, port in zip(names, chosen, strict=True)}


def started(start):
    """What starts in the end: Ray gives a node 30 s, which a busy machine may not."""
    for _ in range(9):
        try:
            return start()
        except Exception as error:
            print(f"once more: {error}")
    return start()


@pytest.fixture
def nodes(monkeypatch):
    """A cluster whose head has no room for agents, and three nodes with room for one each."""
    # Before Ray is imported: how long its own processes may take to start, where the machine is busy.
    for name in ("gcs_server_port_wait_time_s", "gcs_server_request_timeout_seconds"):
        monkeypatch.setenv(f"RAY_{name}", "600")
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'jblock[ray]'")
    from ray.cluster_utils import Cluster as Nodes

    # Nodes that are busy are not dead; one whose process is gone is, after as many failures.
    patient = {
        "health_check_timeout_ms": 60_000,
        "health_check_period_ms": 1000,
        "worker_register_timeout_seconds": 600,
    }
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": patient}
    cluster = started(lambda: Nodes(initialize_head=True, head_node_args=head | ports()))
    made = [started(lambda: cluster.add_node(num_cpus=1, **ports())) for _ in range(3)]
    yield cluster, made
    cluster.shutdown()


class Load:
    """Streams that never stop: one that ends is asked for again, and each is looked at token by token."""

    def __init__(self, engine: Cluster):
        self.ended = 0
        self._engine, self._next = engine, 0
        self._got: dict[str, list[int]] = {}
        for _ in range(STREAMS):
            self._ask()

    def _ask(self) -> None:
        name = f"r{self._next}"
        self._next += 1
        self._got[name] = []
        sampling = api.SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        self._engine.submit(
            api.Request(request_id=name, model="echo", token_ids=(4, 5), sampling=sampling)
        )

    def run(self, until) -> None:
        """Goes on until something holds, and so many more have ended."""
        limit, enough = time.monotonic() + 5 * LONG, None
        while enough is None or self.ended < enough:
            assert time.monotonic() < limit, [(a.name, a.up) for a in self._engine.agents()]
            for output in self._engine.poll(0.1):
                self._got[output.request_id] += output.token_ids
                if output.finish_reason:
                    assert output.finish_reason == "length", output
                    assert self._got.pop(output.request_id) == [4, 5] * (TOKENS // 2)
                    self.ended += 1
                    self._ask()
            if enough is None and until():
                enough = self.ended + 2 * STREAMS


def test_a_node_is_lost_and_one_comes_and_requests_go_on(nodes, tmp_path):
    from jblock.hosts.ray_agents import RayAgents

    cluster, made = nodes
    files = {"secret_file": secret_file(tmp_path)}
    credentials = from_files(files)
    with RayAgents(cluster.address, 3, {"CPU": 1}, files, (MOCK,)) as fleet:

        def start(agent, served, notify):
            return ProcessEngine(
                MOCK,
                {"step_delay": 0.02},
                notify=notify,
                begin=lambda: RemoteChild(fleet.places[agent], credentials),
            )

        engine = Cluster(start, 3, models=["echo"], backoff_seconds=0.01)
        try:
            assert [m.name for m in engine.models()] == ["echo"]

            def up() -> int:
                return sum(agent.up for agent in engine.agents())

            load = Load(engine)
            load.run(lambda: up() == 3)
            assert len(set(engine.pids)) == 3 and os.getpid() not in engine.pids
            cluster.remove_node(made[1], allow_graceful=False)
            load.run(lambda: up() == 2)
            started(lambda: cluster.add_node(num_cpus=1, **ports()))
            load.run(lambda: up() == 3)
            assert engine.stats().restarts == 1
        finally:
            engine.close()
