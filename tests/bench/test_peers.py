"""What `bench peers` reckons itself, and that all its parts but the other engines work together."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from bench.__main__ import parse
from bench.models import TINY, MemoryZoo
from bench.peers import checkpoints, load, process
from bench.scenarios import peers
from checkpoints import hf, peft
from checkpoints.progress import Progress
from jblock.zoo.store import Zoo


def _clock(times: list[list[float]]) -> load.Clock:
    clock = load.Clock([load.Ask("base", (1,), len(t)) for t in times])
    clock.times, clock.ids = times, [[0] * len(t) for t in times]
    return clock


def test_decoding_is_timed_only_while_all_streams_decode():
    clock = _clock([[1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.0, 3.5]])
    # After 2.0 until 3.5: one token of the first stream and three of the second.
    assert clock.decode_rate == pytest.approx(4 / 1.5)
    assert clock.seconds == 4.0
    assert clock.tokens_per_second == 2.0
    assert clock.latencies == [4.0, 3.5]


def test_streams_that_never_overlap_have_no_decode_rate():
    with pytest.raises(RuntimeError, match="more tokens"):
        _ = _clock([[1.0, 2.0], [2.0, 3.0]]).decode_rate


def test_an_engine_that_stops_early_is_found_out():
    class Short:
        def run(self, clock: load.Clock) -> None:
            clock.note(0, [7, 7])

        def close(self) -> None: ...

    with pytest.raises(RuntimeError, match="brought 2 tokens, not the 3"):
        load.serve(Short(), [load.Ask("base", (1, 2), 3)])


class _Counting:
    """Notes every token of every request at once, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[load.Ask] = []

    def run(self, clock: load.Clock) -> None:
        self.asked += clock.asks
        for step in range(max(a.max_tokens for a in clock.asks)):
            for i, ask in enumerate(clock.asks):
                if step < ask.max_tokens:
                    clock.note(i, [step])

    def close(self) -> None: ...


def _spec(sizes: peers.Sizes, **fields: object) -> Mapping[str, object]:
    return {"sizes": sizes.plain(), "models": {"base": "", "tune-0": ""}, **fields}


def test_single_asks_for_every_number_of_streams_and_never_the_same_prompt_twice():
    engine = _Counting()
    result = load.single(engine, _spec(peers._QUICK), lambda _: None)
    assert set(result["decode"]) == {"1", "2"}
    assert result["prefill"] > 0
    prompts = [a.prompt for a in engine.asked]
    assert len(set(prompts)) == len(prompts)
    assert {a.max_tokens for a in engine.asked} == {8, peers._QUICK.decode_tokens, 1}


def test_tenants_share_the_requests_evenly():
    engine, sizes = _Counting(), peers.Sizes(rounds=1)
    adapters = {f"lora-{i}": "" for i in range(2)}
    result = load.tenants(engine, _spec(sizes, adapters=adapters), lambda _: None)
    last = engine.asked[-sizes.requests :]
    counts = [sum(a.model == m for a in last) for m in ("base", "tune-0", *adapters)]
    assert counts == [sizes.requests // 4] * 4
    assert all(len(a.prompt) == sizes.prompt and a.max_tokens == sizes.tokens for a in last)
    assert result["first_ids"]["lora-1"] == [0, 1, 2, 3]


_TENANTS = {
    "tokens_per_second": 100.0,
    "p95_s": 10.0,
    "peak_gb": 8.0,
    "start_s": 50.0,
    "first_ids": {"base": [1], "lora-0": [2]},
}
_SINGLE = {"decode": {"1": 10.0, "8": 40.0}, "prefill": 500.0, "start_s": 20.0}


def test_ratios_are_ours_over_theirs_and_the_best_peer_is_by_tokens():
    ours = {
        "single": {"decode": {"1": 20.0, "8": 50.0}, "prefill": 250.0, "start_s": 2.0},
        "tenants": {
            "tokens_per_second": 300.0,
            "p95_s": 3.0,
            "peak_gb": 2.0,
            "start_s": 5.0,
            "first_ids": {"base": [1], "lora-0": [3]},
            "compiles_on_serving_path": 0.0,
        },
    }
    slower = {**_TENANTS, "tokens_per_second": 50.0, "p95_s": 6.0}
    figures = {
        "jblock": {"float32": ours},
        "vllm": {"float32": {"single": _SINGLE, "tenants": _TENANTS}},
        "openvino": {"float32": {"tenants": slower}},
    }
    result = peers.summary(figures, {"transformers": "not run: no environment"})
    ratios = result["peers"]["vllm"]["float32"]["ours_over"]
    assert ratios["decode"] == {"1": 2.0, "8": 1.25}
    assert (ratios["prefill"], ratios["single_start"]) == (0.5, 0.1)
    assert (ratios["tokens_per_second"], ratios["p95"]) == (3.0, 0.3)
    assert (ratios["memory"], ratios["start"]) == (0.25, 0.1)
    assert ratios["same_first_ids"] == "1 of 2"
    assert result["peers"]["transformers"] == {"not_run": "not run: no environment"}
    best = result["best_peer"]["float32"]
    # Most tokens/s is vLLM's, the lowest latency OpenVINO's.
    assert best == {"name": "vllm", "tokens_per_second_ratio": 3.0, "p95_ratio": 0.5}
    assert result["compiles_on_serving_path"] == 0


def test_engines_without_an_environment_are_reported_with_their_recipes(tmp_path: Path):
    argv = ["bench", "peers", "--quick", "--keep", str(tmp_path), "--dtype", "float32"]
    args = parse([*argv, *(f"--only={name}" for name in peers.PEERS)])
    result = peers.run(args)["peers"]
    assert set(result) == set(peers.PEERS)
    for name in peers.PEERS:
        assert f"--{name}_python" in result[name]["not_run"]
        assert "pip install" in result[name]["not_run"]


def test_checkpoints_come_back_as_the_same_components(tmp_path: Path):
    zoo = MemoryZoo(TINY)
    zoo.add_base("base")
    zoo.add_variant("tune-0", "base", 1)
    zoo.add_adapter("lora-0", "base", 4)
    silent = Progress(bars=False, quiet=True)
    for name in ("base", "tune-0"):
        folder = checkpoints.write_model(zoo, name, tmp_path / name, "float32", 128)
        hf.convert(folder, tmp_path / "zoo", name, silent)
    base = tmp_path / "base"
    folder = checkpoints.write_adapter(zoo, "lora-0", base, tmp_path / "lora-0", "float32")
    peft.convert(folder, tmp_path / "zoo", "base", "lora-0", silent)
    store = Zoo.open(tmp_path / "zoo")
    for name in ("base", "tune-0"):
        pairs = zip(zoo.served[name].steps, store.chain(name).steps, strict=True)
        for step, stored in pairs:
            tensors = store.load_component(stored.component)
            for tensor, value in zoo.load_component(step.component).items():
                np.testing.assert_array_equal(tensors[tensor], value)
    shared = {s.component for s in store.chain("base").steps}
    own = [s for s in store.chain("tune-0").steps if s.component not in shared]
    assert len(own) == 2  # the attention and ffn of one layer
    for step, stored in zip(zoo.served["lora-0"].steps, store.chain("lora-0").steps, strict=True):
        for mine, theirs in zip(step.deltas, stored.deltas, strict=True):
            assert store.delta(theirs).spec == zoo.delta(mine).spec
            for tensor, value in zoo.load_delta(mine).items():
                np.testing.assert_array_equal(store.load_delta(theirs)[tensor], value)


def test_bfloat16_checkpoints_hold_bfloat16(tmp_path: Path):
    zoo = MemoryZoo(TINY)
    zoo.add_base("base")
    folder = checkpoints.write_model(zoo, "base", tmp_path / "base", "bfloat16", 128)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {"bfloat16"}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


_DRIVER = """
import subprocess, sys, time
from bench.peers.load import main
class Peer:
    def __init__(self, spec):
        # A child, whose memory counts too, and which must not outlive us.
        code = "x = bytearray(60_000_000); import time; time.sleep(60)"
        self.child = subprocess.Popen([sys.executable, "-c", code])
        time.sleep(0.6)
        if spec["dtype"] == "wrong":
            raise ValueError("no such dtype")
        self.notes = {"child": self.child.pid}
    def run(self, clock):
        for i, ask in enumerate(clock.asks):
            for token in range(ask.max_tokens):
                time.sleep(0.001)
                clock.note(i, [token])
    def close(self): pass
main(Peer)
"""


def _driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> process.Ran:
    (tmp_path / "tests_driver.py").write_text(_DRIVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    spec = _spec(
        peers._QUICK, work="tenants", dtype=dtype, adapters={}, folder=str(tmp_path / "out")
    )
    return process.run(sys.executable, "tests_driver", spec, 30.0)


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_driver_is_timed_with_its_children_and_leaves_none(tmp_path, monkeypatch):
    ran = _driver(tmp_path, monkeypatch, "float32")
    assert ran.result is not None and ran.result["tokens_per_second"] > 0
    assert ran.start_s >= 0.6
    assert ran.peak_bytes > 60_000_000
    deadline = time.monotonic() + 5
    while not _gone(ran.result["child"]):
        assert time.monotonic() < deadline, "the driver's child lives on"
        time.sleep(0.02)


def test_a_driver_that_fails_says_why(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="no such dtype"):
        _driver(tmp_path, monkeypatch, "wrong")


def test_a_terminated_bench_stops_the_engine_first(tmp_path: Path):
    code = (
        "import sys; from bench.peers import process; "
        f"process.run(sys.executable, 'slow_driver', {{'folder': {str(tmp_path)!r}, 'work': 'x'}}, 60)"
    )
    (tmp_path / "slow_driver.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid.new').write_text(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'pid.new')!r}, {str(tmp_path / 'pid')!r})\ntime.sleep(60)\n"
    )
    root = Path(peers.__file__).parent.parent.parent
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    bench = subprocess.Popen([sys.executable, "-c", code], env=env)
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    bench.terminate()
    assert bench.wait(10) == 128 + 15
    assert _gone(int((tmp_path / "pid").read_text()))


@pytest.mark.long
def test_ours_is_measured_through_its_server(tmp_path: Path):
    args = parse(["bench", "peers", "--quick", "--keep", str(tmp_path), "--only", "jblock"])
    result = peers.run(args)
    assert result["compiles_on_serving_path"] == 0
    for figures in result["peers"]["jblock"].values():
        assert set(figures["single"]["decode"]) == {"1", "2"}
        assert figures["tenants"]["tokens_per_second"] > 0
        assert figures["tenants"]["start_s"] > 0 and figures["tenants"]["peak_gb"] > 0
        assert set(figures["tenants"]["first_ids"]) == {"base", "tune-0", "lora-0"}
