"""KV pools sized from what is free, and requests longer than they hold refused early."""

import dataclasses
import types

import jax
import pytest
from harness import Agent, oracle, request

from jblock.engine.config import EngineConfig
from jblock.engine.kv_cache import free_memory, sizing
from jblock.engine.kv_cache.spec import KVShape
from jblock.parallel.placement import SINGLE

MODEL = "llama_gqa_untied"
GB = 10**9


def make_root(path, available_kb: int, groups: dict[str, str], own: str):
    """A proc and sys with these files."""
    (path / "proc/self").mkdir(parents=True)
    (path / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kb} kB\n")
    (path / "proc/self/cgroup").write_text(own)
    for name, text in groups.items():
        file = path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


V2 = {
    "a/memory.max": "max\n",
    "a/memory.current": "500\n",
    "a/b/memory.max": "4000000\n",
    "a/b/memory.current": "3000000\n",
    "a/b/memory.stat": "anon 1\ninactive_file 500000\n",
}


@pytest.mark.parametrize(
    ("available_kb", "groups", "own", "wanted"),
    [
        (1000, {}, "", 1024000),
        (10**6, V2, "0::/a/b\n", 1500000),
        (1000, V2, "0::/a/b\n", 1024000),
        (10**6, V2, "0::/a\n", 1024 * 10**6),
        # In a container the path may be the host's, and the limit lie at the top.
        (10**6, {"memory.max": "70\n", "memory.current": "60\n"}, "0::/docker/x\n", 10),
        (10**6, {"memory.max": "50\n", "memory.current": "60\n"}, "0::/\n", 0),
        (
            10**6,
            {
                "memory/d/memory.limit_in_bytes": "900\n",
                "memory/d/memory.usage_in_bytes": "200\n",
                "memory/d/memory.stat": "total_inactive_file 100\n",
            },
            "5:cpu:/d\n4:memory:/d\n",
            800,
        ),
    ],
)
def test_available_ram_heeds_control_groups(tmp_path, available_kb, groups, own, wanted):
    assert free_memory.available_ram(make_root(tmp_path, available_kb, groups, own)) == wanted


def test_the_budget_is_a_share_with_a_cap_on_cpu(monkeypatch):
    monkeypatch.setattr(free_memory, "available_ram", lambda: GB)
    assert free_memory.kv_budget() == GB // 2
    monkeypatch.setattr(free_memory, "available_ram", lambda: 100 * GB)
    assert free_memory.kv_budget() == free_memory.CPU_MOST_BYTES
    # Devices that XLA makes of one CPU share its memory.
    assert free_memory.kv_budget(jax.local_devices()[:1] * 4) == free_memory.CPU_MOST_BYTES // 4


def test_the_budget_is_most_of_what_a_device_has_free(monkeypatch):
    stats = {"bytes_limit": 80 * GB, "bytes_in_use": 30 * GB}
    device = types.SimpleNamespace(
        platform="gpu", device_kind="some GPU", memory_stats=lambda: stats
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert free_memory.kv_budget() == 45 * GB
    fuller = types.SimpleNamespace(
        platform="gpu", memory_stats=lambda: stats | {"bytes_in_use": 60 * GB}
    )
    assert free_memory.kv_budget([device, fuller]) == 18 * GB
    stats.clear()
    with pytest.raises(ValueError, match=r"some GPU.*kv_memory_mb"):
        free_memory.kv_budget()


CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=96,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((4, 16),),
    host_kv_memory_mb=0,
)


def test_pools_take_what_is_free_and_no_more_than_can_be_used(zoo, monkeypatch):
    roomy = Agent.make(zoo, [MODEL], CONFIG)
    ((_, shape),) = roomy.device.pool_shapes.items()
    layers = roomy.graph.kv_layers[KVShape(shape.num_kv_heads, shape.head_dim)]
    assert shape.num_pages - 1 == layers * 4 * 6  # max_num_seqs sequences of max_model_len
    assert roomy.device.executables.compiles_on_serving_path == 0
    workspace = roomy.device._workspace(roomy.graph, roomy.device.pool_shapes)
    assert workspace > 0  # the programs' own memory was counted
    budget = workspace + 3 * layers * shape.page_bytes
    monkeypatch.setattr(free_memory, "kv_budget", lambda devices: budget)
    tight = Agent.make(zoo, [MODEL], CONFIG)
    ((_, shape),) = tight.device.pool_shapes.items()
    assert shape.num_pages - 1 == 3 * layers
    assert tight.device.max_model_len(tight.graph.routes[MODEL]) == 48

    prompt = oracle(MODEL)["prompt"]
    tight.loop.submit(request("long", MODEL, prompt[:48]))
    tight.loop.submit(request("fits", MODEL, prompt[:40]))
    outputs = tight.run()
    assert outputs["long"][-1].error_code == "INVALID_ARGUMENT"
    assert "at most 47 and one to generate" in outputs["long"][-1].error_message
    assert "kv_memory_mb" in outputs["long"][-1].error_message
    assert outputs["fits"][-1].finish_reason == "length"
    assert sum(len(o.token_ids) for o in outputs["fits"]) == 8

    budget = workspace
    with pytest.raises(ValueError, match="do not hold a page"):
        Agent.make(zoo, [MODEL], CONFIG)


def test_the_context_is_the_models_own_as_far_as_memory_goes():
    config = EngineConfig(page_size=16, max_model_len=0)
    layers = {KVShape(2, 16): 4}
    page = 4 * sizing._empty_pool(KVShape(2, 16), config, SINGLE).page_bytes

    def own(longest: int, budget: int) -> int:
        return sizing.own_context(layers, longest, budget, config, SINGLE)

    assert own(8192, 10**12) == 8192
    assert own(10**6, 10**12) == sizing.MOST_CONTEXT
    assert own(8192, 20 * page) == 20 * 16
    assert own(8192, 0) == 16
    assert sizing.own_context({}, 8192, 0, config, SINGLE) == 8192


def test_a_prompt_over_the_limit_is_told_what_helps(zoo):
    agent = Agent.make(zoo, [MODEL], dataclasses.replace(CONFIG, max_model_len=0))
    route = agent.graph.routes[MODEL]
    own = route.chain.max_position
    assert agent.device.max_model_len(route) == own
    assert agent.device.limit_remedy(route) == "shorten the prompt"
    agent.device.config = dataclasses.replace(CONFIG, max_model_len=own - 1)
    assert agent.device.limit_remedy(route).endswith(f"--max_model_len={own}")


def test_an_explicit_size_wins(zoo, monkeypatch):
    monkeypatch.setattr(free_memory, "kv_budget", lambda devices: 1 / 0)
    agent = Agent.make(zoo, [MODEL], EngineConfig(max_model_len=96, kv_memory_mb=1))
    ((key, shape),) = agent.device.pool_shapes.items()
    layers = agent.graph.kv_layers[key]
    kv = 10**6 - 10**6 // sizing.ROWS_PART
    most = layers * (kv // (layers * shape.page_bytes))
    assert shape.num_pages - 1 == sizing.round_down(most) > 0.93 * most


@pytest.mark.parametrize("pages", [1, 15, 31, 32, 33, 1000, 123_456])
def test_sizes_come_from_a_ladder(pages):
    """A little more or less of free memory is the same size, and little is lost."""
    assert pages * 15 / 16 - 1 <= sizing.round_down(pages) <= pages
    assert sizing.round_down(sizing.round_down(pages)) == sizing.round_down(pages)
    assert len({sizing.round_down(n) for n in range(10_000, 20_000)}) <= 32


def test_a_hair_less_of_free_memory_finds_the_same_programs(zoo, monkeypatch):
    def loaded(budget: int) -> tuple[int, int]:
        monkeypatch.setattr(free_memory, "kv_budget", lambda devices: budget)
        agent = Agent.make(zoo, [MODEL], dataclasses.replace(CONFIG, max_num_seqs=64))
        return tuple(p.num_pages for p in agent.device.pool_shapes.values())

    assert loaded(5_000_000) == loaded(4_990_000)
