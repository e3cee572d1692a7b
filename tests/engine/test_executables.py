"""Programs: made once, kept on disk, rebuilt when what is there cannot be trusted to be whole."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from harness import Agent, collect_tokens, oracle, request
from jax.experimental.compilation_cache import compilation_cache

from jblock.engine import factory
from jblock.engine.config import Bucket, EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.engine.runner.latency_profile import Profile
from jblock.pallas_kernels import backends, self_test
from jblock.zoo.store import Zoo

MODEL = "llama_gqa_untied"
CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=160,
    page_size=16,
    decode_sizes=(1, 4),
    prefill_grids=((1, 16), (4, 16)),
    kv_memory_mb=1,
)


FEW = dataclasses.replace(CONFIG, decode_sizes=(4,), prefill_grids=((4, 16),))


def engine(zoo, cache: ExecutableCache, config: EngineConfig = FEW) -> ThreadEngine:
    """An engine with its loop in a thread."""
    store = Zoo.open(zoo)
    return ThreadEngine(store, {MODEL: store.chain(MODEL)}, config, cache)


@pytest.fixture(scope="module")
def first_start(zoo, tmp_path_factory) -> Path:
    """What a first start compiles and measures, which it must have done to answer."""
    folder = tmp_path_factory.mktemp("first") / "cache"
    one = engine(zoo, ExecutableCache(folder))
    one.wait_until_warm()
    assert greedy(one) == oracle(MODEL)["greedy"].tolist()
    stats = one.stats()
    one.close()
    assert stats.compiles_in_background > 0 and stats.compiles_on_serving_path == 0
    return folder


@pytest.fixture
def folder(first_start, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(first_start, tmp_path / "cache")


def greedy(engine: ThreadEngine) -> list[int]:
    """The oracle's prompt, continued."""
    engine.submit(request("r", MODEL, oracle(MODEL)["prompt"]))
    tokens: list[int] = []
    while True:
        for output in engine.poll(10):
            tokens.extend(output.token_ids)
            if output.finish_reason:
                return tokens


def test_a_second_start_compiles_nothing(zoo, folder):
    one = engine(zoo, ExecutableCache(folder))
    one.wait_until_warm()
    assert greedy(one) == oracle(MODEL)["greedy"].tolist()
    stats = one.stats()
    assert stats.compiles_in_background == stats.compiles_on_serving_path == 0
    one.close()

    # Damage: one entry cut short, one flipped, one that is no program at all.
    entries = sorted(folder.glob("*.xla"))
    entries[0].write_bytes(entries[0].read_bytes()[:100])
    flipped = bytearray(entries[1].read_bytes())
    flipped[200] ^= 1
    entries[1].write_bytes(flipped)
    entries[2].write_bytes(b"")
    one = engine(zoo, ExecutableCache(folder))
    one.wait_until_warm()
    assert greedy(one) == oracle(MODEL)["greedy"].tolist()
    assert one.stats().compiles_in_background == 3
    one.close()


def test_serves_on_the_first_tier_and_takes_the_others_up_as_they_come(zoo, tmp_path):
    one = engine(zoo, ExecutableCache(tmp_path / "cache"), CONFIG)
    assert greedy(one) == oracle(MODEL)["greedy"].tolist()
    one.wait_until_warm()
    assert set(one._loop.device.buckets) == {
        Bucket(1, 1),
        Bucket(4, 1),
        Bucket(1, 16),
        Bucket(4, 16),
    }
    settled = one.stats().compiles_in_background
    assert greedy(one) == oracle(MODEL)["greedy"].tolist()
    stats = one.stats()
    assert stats.compiles_in_background == settled and stats.compiles_on_serving_path == 0
    one.close()


def test_a_miss_on_the_serving_path_is_counted(zoo, tmp_path):
    agent = Agent.make(zoo, [MODEL], CONFIG)
    agent.device.executables.cache = None
    agent.generate({"r": (MODEL, [5, 6])}, max_tokens=2)
    assert agent.loop.stats().compiles_on_serving_path > 0


def test_kernels_are_tested_again_only_where_none_passed_before(tmp_path, monkeypatch):
    results, tested = [{"matmul": "off"}, {}, {}], []
    monkeypatch.setattr(self_test, "run", lambda kv: tested.append(kv) or results.pop(0))
    for kv_dtype in ("float32", "float32", "float32", "int8"):
        factory._tested(tmp_path, kv_dtype, "")
    assert tested == ["float32", "float32", "int8"]
    for path in tmp_path.glob("*.xla"):
        path.write_bytes(b"x" + path.read_bytes()[1:])
    results.append({})
    factory._tested(tmp_path, "float32", "")
    assert tested[3:] == ["float32"]


def test_kernels_whose_self_test_did_not_end_are_not_tried_again_by_default(tmp_path, monkeypatch):
    served, tested = [], []

    def hangs(kv):
        tested.append(kv)
        raise KeyboardInterrupt

    monkeypatch.setattr(self_test, "run", hangs)
    monkeypatch.setattr(backends, "serve", lambda *args: served.append(args))
    with pytest.raises(KeyboardInterrupt):
        factory._tested(tmp_path, "bfloat16", "gpu")
    factory._tested(tmp_path, "bfloat16", "gpu")
    assert tested == ["bfloat16"] and served == [("gpu", "xla")]
    with pytest.raises(KeyboardInterrupt):  # somebody named the kernels
        factory._tested(tmp_path, "bfloat16", "")


def test_refuses_a_folder_others_can_write_to(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    os.chmod(folder, 0o777)
    with pytest.raises(ValueError, match="chmod"):
        ExecutableCache(folder)


def test_every_folder_it_makes_is_its_users_alone(tmp_path):
    before = os.umask(0)
    try:
        ExecutableCache(tmp_path / "cache" / "jblock" / "executables")
    finally:
        os.umask(before)
    made = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
    assert [folder.stat().st_mode & 0o777 for folder in made] == [0o700] * 3


def test_says_how_to_move_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
        ExecutableCache(tmp_path / "cache" / "jblock")


def test_requests_with_options_wait_for_their_programs(zoo, tmp_path):
    one = engine(zoo, ExecutableCache(tmp_path / "cache"))
    prompt = oracle(MODEL)["prompt"]
    one.submit(request("sampled", MODEL, prompt, temperature=0.7, seed=3, max_tokens=4))
    one.submit(request("plain", MODEL, prompt))
    ended = []
    while len(ended) < 2:
        ended.extend(o.request_id for o in one.poll(10) if o.finish_reason == "length")
    one.wait_until_warm()
    assert one.stats().compiles_on_serving_path == 0
    one.close()


def test_programs_are_renewed_while_a_request_runs(zoo, folder):
    one = engine(zoo, ExecutableCache(folder))
    one.wait_until_warm()
    device = one._loop.device
    keys = list(device.segment_keys(one._loop.graph))
    old = [device.executables.get(key) for key in keys]
    one.submit(request("r", MODEL, oracle(MODEL)["prompt"]))
    one.renew()
    assert collect_tokens(one, ["r"])["r"] == oracle(MODEL)["greedy"].tolist()
    assert keys
    for key, before in zip(keys, old, strict=True):
        assert device.executables.get(key) is not before
    assert greedy(one) == oracle(MODEL)["greedy"].tolist()
    assert one.stats().compiles_on_serving_path == 0
    one.close()


def test_a_head_that_picks_gives_what_head_and_sampler_give(zoo, folder):
    """To the bit: which of them a row meets depends on the other rows of its batch."""
    one = engine(zoo, ExecutableCache(folder))
    one.wait_until_warm()
    device = one._loop.device
    one.close()
    heads = [k for k in device.segment_keys(one._loop.graph) if k.kind == "greedy_head"]
    assert heads
    (head,) = (i.layers[0] for i in one._loop.graph.instances if i.is_head)
    registers = device.state.registers[head.width]
    registers = jax.random.normal(jax.random.key(0), registers.shape, registers.dtype)
    for key in heads:
        count = key.bucket.num_seqs
        index = np.zeros((count, 6), np.int32)
        index[:, 1], index[:, 3], index[:, 4] = 1, np.arange(count), np.arange(count)[::-1]
        last = np.full(device.executables.geometry.max_num_seqs, 7, np.int32)
        args = (head.params, head.tables, registers)
        get = device.executables.get
        together = get(key)(*args, jax.device_put(last), index)
        separate = get(dataclasses.replace(key, kind="head"))(*args, index)
        sampler = device._sampler.program("greedy", separate[0])
        apart = sampler(separate[0], separate[0], jax.device_put(last), separate[1])
        for a, b in zip(together, apart, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_profile_is_measured_kept_and_mended(zoo, folder):
    for file in folder.glob("profile-*.json"):
        file.unlink()
    one = engine(zoo, ExecutableCache(folder))
    one.wait_until_warm()
    measured = dict(one._loop.profile._seconds)
    # Embedding, layer and head on two grids.
    assert len(measured) == 3 * 2 and all(s > 0 for s in measured.values())
    assert greedy(one) == oracle(MODEL)["greedy"].tolist()
    one.close()

    (file,) = folder.glob("profile-*.json")
    # As a machine leaves it that was busy at the time; what seems too fast holds.
    names = sorted(measured)
    file.write_text(json.dumps({n: 1e-9 if n == names[0] else 100.0 for n in names}))
    two = engine(zoo, ExecutableCache(folder))
    two.wait_until_warm()
    mended = two._loop.profile._seconds
    assert mended.keys() == measured.keys() and mended[names[0]] == 1e-9
    assert all(mended[n] < 100.0 for n in names)
    assert json.loads(file.read_text()) == mended
    two.close()

    for damage in ("{", "[1]", '{"layer": "slow"}', '{"layer": -1.0}'):
        file.write_text(damage)
        assert Profile(two._loop.device)._seconds == {}


def test_programs_out_of_jaxs_own_cache_are_not_kept(zoo, tmp_path):
    """They could be stored and loaded, and would fail when they are called."""
    wanted = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path / "jax"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        for folder in ("one", "two", "two"):
            served = engine(zoo, ExecutableCache(tmp_path / folder))
            assert greedy(served) == oracle(MODEL)["greedy"].tolist()
            served.close()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
