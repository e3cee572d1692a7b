"""What inference gateways and vLLM's tools ask of a server: metrics by vLLM's names, adapters over HTTP."""

import contextlib
import dataclasses
import threading
from types import SimpleNamespace

import prometheus_client
import pytest
import server_harness as harness
from http_harness import ask, raw
from test_lifecycle import scrape

from jblock.engine import api
from jblock.engine.stats_records import total
from serving.metrics import Metrics


@contextlib.contextmanager
def serving(folder, **config):
    engine = harness.mock(folder, step_delay=0.01)
    with harness.serving(engine, http_port=0, metrics_port=0, **config) as running:
        yield running


@pytest.mark.parametrize(("names", "prefix"), [("jblock", "jblock_"), ("vllm", "vllm:")])
def test_gauges_for_gateways(tmp_path, names, prefix):
    with serving(tmp_path, metrics_names=names) as running:
        body = {"model": "adapter", "prompt": [300], "max_tokens": 500, "stream": True}
        with raw(running.server.http_port, "/v1/completions", body) as one:
            assert one.recv(4096)
            values = scrape(running.server.metrics_port)
            assert values[f"{prefix}num_requests_running"] == "1.0"
            assert values[f"{prefix}num_requests_waiting"] == "0.0"
            assert 0 < float(values[f"{prefix}kv_cache_usage_perc"]) < 1
            (lora,) = [key for key in values if key.startswith(f"{prefix}lora_requests_info")]
            assert 'running_lora_adapters="adapter"' in lora
        assert harness.eventually(running.is_empty)
        (lora,) = [
            key
            for key in scrape(running.server.metrics_port)
            if key.startswith(f"{prefix}lora_requests_info")
        ]
        assert 'running_lora_adapters=""' in lora
        assert running.client.generate("echo", [300, 301], max_tokens=2)
        values = scrape(running.server.metrics_port)
        assert values[f'{prefix}time_to_first_token_seconds_count{{model="echo"}}'] == "1.0"
        assert ("vllm:prompt_tokens_total" in values) == (names == "vllm")
        assert "jblock_steps_total" in values  # What is not vLLM's keeps its name.


def test_adapters_that_wait_are_told_from_those_that_run(tmp_path):
    engine = harness.mock(tmp_path, step_delay=0.01, max_num_seqs=1)
    with harness.serving(engine, metrics_port=0) as running:
        first = running.client.stream("adapter", [300], max_tokens=900)
        next(first)
        second = running.client.stream("lora", [300], max_tokens=2)
        waiting = threading.Thread(target=lambda: list(second))
        waiting.start()

        def told():
            page = scrape(running.server.metrics_port)
            return next(key for key in page if key.startswith("jblock_lora_requests_info"))

        assert harness.eventually(lambda: 'waiting_lora_adapters="lora"' in told())
        assert 'running_lora_adapters="adapter"' in told()
        first.close()
        waiting.join()
        assert harness.eventually(lambda: 'waiting_lora_adapters=""' in told())


def test_blocks_and_slots_are_told():
    blocks = (
        api.BlockStats(block="layer_1", kind="layer", models=3, batches=5, rows=40, seconds=0.5),
        api.BlockStats(block="other", rows=2),
    )
    stats = api.EngineStats(adapter_slots=8, kv_offloads=4, blocks=blocks)
    metrics = Metrics(lambda: stats, lambda: 0, lambda: 1, adapters=lambda: ({"b", "a"}, {"c"}))
    text = prometheus_client.generate_latest(metrics.registry).decode()
    labels = '{block="layer_1",kind="layer"}'
    for line in (
        f"jblock_block_models{labels} 3.0",
        f"jblock_block_batches_total{labels} 5.0",
        f"jblock_block_batch_rows_total{labels} 40.0",
        f"jblock_block_seconds_total{labels} 0.5",
        'jblock_block_batch_rows_total{block="other",kind=""} 2.0',
        "jblock_kv_offloads_total 4.0",
        "jblock_swaps_total 4.0",  # As it was called before.
    ):
        assert line in text.splitlines()
    info = 'max_lora="8",running_lora_adapters="a,b",waiting_lora_adapters="c"'
    assert f"jblock_lora_requests_info{{{info}}}" in text


def test_blocks_of_several_engines_are_added_up():
    one = api.BlockStats(block="a", kind="layer", models=2, rows=3, seconds=0.25, kv_bytes=8)
    other = api.BlockStats(block="b", rows=1)
    both = total([api.EngineStats(blocks=(one, other)), api.EngineStats(blocks=(one,))])
    twice = api.BlockStats(block="a", kind="layer", models=2, rows=6, seconds=0.5, kv_bytes=16)
    assert both.blocks == (twice, other)


def test_many_blocks_are_told_as_the_busiest_and_the_others():
    from jblock.engine.graph.graph import BlockInstance
    from jblock.engine.runner.step import BlockQueues
    from jblock.engine.stats import BlockTable

    def block(name, size):
        layer = SimpleNamespace(kind="layer", weights=(SimpleNamespace(size=size),))
        segment = SimpleNamespace(layers=(layer,), kv_shape="shape", kv_layers=2)
        return BlockInstance(name=name, segments=(segment,), singles=(segment,))

    blocks = [block(f"layer_{at}", 10 * at) for at in range(70)]
    queues = BlockQueues(blocks)
    for at, (_, queue) in enumerate(queues):
        queue.rows, queue.batches = at, 1
    route = _Route((blocks[1], blocks[69]))
    sequence = SimpleNamespace(route=route, pages=SimpleNamespace(count=3))
    kv = SimpleNamespace(page_bytes={"shape": 100})
    sequences = SimpleNamespace(running={"a": sequence, "b": sequence}, waiting=(), kv=kv)
    graph = SimpleNamespace(users={blocks[69]: 4, blocks[1]: 5})
    *told, other = BlockTable().of(queues, sequences, graph)
    assert [b.block for b in told] == [f"layer_{at}" for at in range(69, 5, -1)]
    assert (told[0].models, told[0].weight_bytes, told[0].kv_bytes) == (4, 690, 2 * 3 * 2 * 100)
    assert (other.block, other.models, other.weight_bytes) == ("other", 5, 10 * sum(range(6)))
    assert (other.rows, other.batches, other.kv_bytes) == (sum(range(6)), 6, 1200)


@dataclasses.dataclass(eq=False)
class _Route:
    """One object, found by its identity as the engine's are."""

    instances: tuple


def test_adapters_come_and_go_in_vllms_form(tmp_path):
    with serving(tmp_path) as running:
        port = running.server.http_port
        gone = ask(port, "/v1/unload_lora_adapter", {"lora_name": "adapter"})
        assert gone.status == 200
        body = {"model": "adapter", "prompt": [300], "max_tokens": 1}
        assert ask(port, "/v1/completions", body).status == 404
        back = ask(port, "/v1/load_lora_adapter", {"lora_name": "adapter"})
        assert back.status == 200
        assert ask(port, "/v1/completions", body).status == 200
        path = {"lora_name": "other", "lora_path": "/etc"}
        assert ask(port, "/v1/load_lora_adapter", path).error["param"] == "lora_path"
        assert ask(port, "/v1/load_lora_adapter", {"lora_name": "nobody"}).status == 404


def test_only_admins_change_what_is_served(tmp_path):
    import hashlib

    from serving.tenants import Tenant, Tenants

    tenants = Tenants([(hashlib.sha256(b"key").digest(), Tenant(name="acme"))])
    with serving(tmp_path, tenants=tenants) as running:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            answer = ask(running.server.http_port, path, {"lora_name": "adapter"}, key="key")
            assert answer.status == 403
