"""Every scenario runs on a tiny model and prints the keys a reader looks for."""

import argparse
import contextlib
import functools
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.__main__ import main, parse
from bench.kernels import OPS
from bench.scenarios import SCENARIOS, gpu, overlap, zoo

KEYS = {
    "block_tax": {"b1", "b8", "b32", "demo"},
    "roofline": {"decode_b1", "decode_b32", "prefill_512", "decode_32x1024"},
    "sharing": {
        "tokens_per_second_ratio",
        "tokens_per_second_ratio_15of16",
        "p95_ratio",
        "weight_bytes_ratio",
    },
    "lora": {"tokens_per_second_ratio", "registered_1000_ratio"},
    "prefix": {"ttft_ratio"},
    "trunk": {"ttft_ratio", "prefill_flops_ratio", "identical"},
    "alora": {"ttft_ratio", "identical"},
    "host": {"one_chain_b64", "one_chain_b256", "finetunes_8x32_b64", "exhausted_200"},
    "overlap": {"b8_idle", "b32_idle"},
    "stalls": {"gap_max_ms", "gap_max_ratio", "gap_p99_ratio", "prompt_ratio"},
    "hotswap": {"failed", "gap_ratio"},
    "coldstart": {"cached_ratio", "first_token_full_s", "first_token_empty_s"},
    "memory": {"one", "seven", "five"},
    "peers": {"vllm", "openvino", "transformers", "jblock"},
    "kv": {"bfloat16", "int8"},
    "oversubscription": {
        "offered",
        "finished",
        "identical",
        "within_token_rule",
        "swaps",
        "recomputes",
        "tokens_per_second",
        "tokens_per_second_recomputing",
    },
    "equivalence": {"seconds", "found", "missed", "surplus"},
    "zoo": {"stored_over_logical"},
    "convert": {"speed_over_copy_and_hash", "peak_rss_gb", "repeated_bytes"},
    "kernels": set(OPS),
    "gpu": {"not_run"},
    "deltas": {"accuracy_change_at_8x"},
    "adapt": {"measure", "compress", "quantize", "surrogate", "equivalence"},
    "registry": {"publish_s", "list_s", "inodes_per_component"},
    "front": {
        "grpc_over_engine",
        "http_over_engine",
        "ttfb_ms",
        "http_over_bare",
        "grpc_over_bare",
    },
    "structured": {"constrained_over_free", "refused_s", "p95_ratio", "exploding_refused"},
    "fairness": {
        "bound_held",
        "fcfs_breaks_bound",
        "jain",
        "flooded_ttft_ratio",
        "throughput_over_fcfs",
    },
    "restart": {"lost", "differ", "pause_s", "pause_stopped_s", "refused_alone"},
    "speculate": {"ngram_speedup", "b1_speedup", "b4_speedup", "full_ratio", "acceptance"},
    "cluster": {
        "failed",
        "identical",
        "differ",
        "pipeline_ratio",
        "hop_ms_shared_memory_idle",
        "hop_ms_grpc_idle",
    },
    "one_agent": {"step_ratio", "step_low", "step_high", "serve_ratio", "serve_low", "serve_high"},
    "faults": {"faults", "lost", "twice", "differ", "stuck"},
    "adaptive": {
        "p95_ratio",
        "accuracy_change",
        "accuracy_change_low",
        "items",
        "budget",
        "failed",
    },
    "cycles": {"tpu", "h200"},
}


SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Runs a command line once; gives what it prints last, which is also what it writes."""
    folder = tmp_path_factory.mktemp("bench")

    @functools.cache
    def run(*argv: str) -> dict:
        file, out = folder / "line.json", io.StringIO()
        with contextlib.redirect_stdout(out):
            options = ["--quick", "--cache", str(folder / "programs"), "--json", str(file)]
            if argv[0] in ("zoo", "convert") and SHARED_MEMORY.is_dir():
                options += ["--folder", str(SHARED_MEMORY)]  # waiting for a disk shows nothing
            assert main(parse(["bench", *argv, *options])) == 0
        last = out.getvalue().splitlines()[-1]
        assert file.read_text() == last + "\n"
        return json.loads(last)

    return run


def test_every_scenario_is_held_to_its_keys():
    assert set(KEYS) == set(SCENARIOS)


# They run no engine, so there is no such figure.
_NO_SERVING = {
    "kernels",
    "equivalence",
    "zoo",
    "convert",
    "deltas",
    "gpu",
    "adapt",
    "registry",
    "restart",
    "front",
    "host",
    "structured",
    "cycles",
}
# Start processes that compile everything, or several engines.
_LONG = {"coldstart", "kv", "peers", "stalls", "registry", "restart", "front", "fairness", "host"}
_LONG |= {"lora", "overlap", "oversubscription", "roofline", "block_tax", "deltas", "structured"}
_LONG |= {"adaptive", "cluster", "one_agent", "faults", "hotswap", "kernels", "speculate", "memory"}
_MARKS = {name: pytest.mark.long for name in _LONG} | {"cycles": pytest.mark.compilers}


@pytest.mark.parametrize("name", [pytest.param(n, marks=_MARKS.get(n, ())) for n in sorted(KEYS)])
def test_quick_run(name, quick):
    line = quick(name)
    assert line["scenario"] == name
    if name not in _NO_SERVING:
        assert line["compiles_on_serving_path"] == 0
    figures = line[name]
    assert KEYS[name] <= set(figures)
    if name in ("peers", "kernels", "gpu", "kv", "host", "cycles", "memory"):
        return  # One object an engine, which test_peers.py knows, an op, a dtype, a scene, a chip or a set.
    signed = ("accuracy_delta", "accuracy_change_at_8x", "ttfb_ms", "accuracy_change")
    signed += ("accuracy_change_low", "accuracy_change_high")
    assert all(value >= 0 for key, value in figures.items() if key not in signed)
    if name == "faults":
        assert all(figures[key] == 0 for key in ("lost", "twice", "differ", "stuck"))
    if name in ("block_tax", "roofline", "lora"):
        assert all(0.0001 < value < 1000 for value in figures.values())


def test_a_search_among_the_alike_finds_the_nearest(quick):
    figures = quick("equivalence", "--alike")["equivalence"]
    keys = {"alike_10000_s", "alike_10000_gb", "alike_40000_over_10000", "recall"}
    assert set(figures) == keys and figures["recall"] >= 0.99


def test_kernels_are_measured_and_tuned_where_there_is_something_to_tune(quick):
    line = quick("kernels", "--tune")
    assert set(line["kernels"]) == set(line["tuned"]) == set(OPS)
    for name, op in line["kernels"].items():
        backend = op.pop("backend")
        # None of those for CPU has any.
        assert backend in ("xla", "cpu") and op
        assert all(0 < value < 1e6 for case in op.values() for value in case.values())
        assert line["tuned"][name] == f"nothing to tune: backend {backend}"


def test_without_a_gpu_nothing_is_claimed_of_one(quick):
    line = quick("gpu")
    assert line["gpu"] == {"not_run": "there is no GPU here: jax computes on cpu"}
    assert "device" not in line


@pytest.mark.long
def test_every_figure_of_a_gpu_can_be_measured():
    """On CPU, whose own kernels serve then: nothing fails for the script's own sake."""
    figures = gpu.matmuls(quick=True)
    theirs = figures.pop("jax")
    figures |= gpu.attention(quick=True)
    theirs |= figures.pop("jax")
    assert len(theirs) == 3 and all("failed" in x for x in theirs.values()), "they want a GPU"
    assert len(figures) == 6 + 4 + 2 + 6 and "failed" not in str(figures)


def test_sharing_says_the_same_as_one_model_each(quick):
    line = quick("sharing")
    assert line["outputs"]["within_token_rule"]
    assert line["failed"] == 0
    # Two of four layers, the embedding and the head are shared by four models.
    assert line["sharing"]["weight_bytes_ratio"] < 0.7


@pytest.mark.long
def test_compressed_deltas_keep_to_their_budget(quick):
    line = quick("deltas")
    assert {r["setting"] for r in line["compressed"]} == {"all, 1/8"}
    for row in line["compressed"]:
        assert row["times_smaller"] >= 8 and row["accuracy_change"]["low"] > -0.1
    for row in line["quantized"]:
        assert 1.8 < row["times_smaller"] < 4 and row["accuracy_change"]["low"] > -0.1


def test_a_zoo_keeps_what_each_fine_tune_changed_and_no_more(quick):
    line = quick("zoo")
    rows = {row["situation"].split(":")[0]: row for row in line["situations"]}
    share = {name: row["stored_bytes"] / row["logical_bytes"] for name, row in rows.items()}
    assert len(line["situations"]) >= 12
    assert share["continued pretraining"] == 1
    assert share["BitFit"] < 0.01
    assert rows["head only"]["components"] == 1 and rows["head only"]["deltas"] == 0
    assert rows["last 2 layers only"]["cuts"] == ["layer 1"]
    assert rows["LoRA on q, k, v, o"]["blocks_of_base"] == 3
    every, few = (row for row in line["situations"] if row["situation"].startswith("mixture"))
    assert few["stored_bytes"] * 4 == every["stored_bytes"]
    assert len(line["detail"]["exports_identical"]) == 7


def test_the_tables_go_between_their_marks(quick, tmp_path):
    page = tmp_path / "page.md"
    marks = [f"<!-- bench zoo: {name} -->" for name in ("situations", "tenants")]
    page.write_text(
        "\n".join(["before", marks[0], "old", "<!-- end -->", marks[1], "<!-- end -->", ""])
    )
    zoo.write_tables(page, quick("zoo"))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end -->\n") and "old" not in text
    assert "| head only | 287.6 KB | 32.8 KB | 11.39% | 1, 0 | 3 (2) | none |" in text
    assert "| 5: before the ffn of 0, layer 1, the ffn of 1, ... |" in text
    assert "| 2: last 2 layers only | 575.2 KB | 295.9 KB | 51.45% |" in text
    page.write_text(text.replace(marks[1], ""))
    with pytest.raises(SystemExit, match="lacks <!-- bench zoo: tenants -->"):
        zoo.write_tables(page, quick("zoo"))


def test_a_killed_conversion_repeats_nothing_it_had_finished(quick):
    line = quick("convert")
    killed = line["detail"]["killed"]
    assert line["convert"]["repeated_bytes"] == 0
    assert (
        0.3 * line["detail"]["bytes"] < killed["finished_bytes"] < killed["killed_at_bytes"] * 1.2
    )


@pytest.mark.long
def test_oversubscribed_all_finish(quick):
    line = quick("oversubscription")
    figures = line["oversubscription"]
    assert figures["finished"] == figures["offered"]
    assert figures["within_token_rule"]
    assert line["recomputing"]["finished"] == figures["offered"]
    assert line["recomputing"]["within_token_rule"]
    assert line["detail"]["pages"]["squeezed"] < line["detail"]["pages"]["unloaded"]


@pytest.mark.long
def test_smaller_pages_change_little(quick):
    for dtype, figures in quick("kv")["kv"].items():
        assert figures["bytes_ratio"] <= {"bfloat16": 0.5, "int8": 0.4}[dtype]
        assert figures["top1_agreement"] > 0.9
        assert abs(figures["accuracy_delta"]) <= 0.1
        assert figures["tokens_per_second_ratio"] > 0


def test_a_prefix_seen_before_is_not_computed_again(quick):
    detail = quick("prefix")["detail"]
    # Each of three prefixes of 128 tokens was computed once and found twice.
    assert detail["cached_tokens"] == 3 * 2 * 128
    assert detail["prompt_tokens_computed"] == 3 * (128 + 3 * 16)


@pytest.mark.long
def test_swapping_fails_nothing_and_gives_memory_back(quick):
    line = quick("hotswap")
    assert line["hotswap"]["failed"] == 0
    assert line["detail"]["bytes_after"] == line["detail"]["bytes_before"]
    assert line["detail"]["swapped"]["requests"] > 0
    assert all(line["detail"]["swaps"].values())


def test_idle_time_is_what_no_span_covers():
    spans = [(0.0, 2.0), (1.0, 4.0), (6.0, 7.0), (9.0, 20.0)]
    assert overlap.gaps(spans, 1.0, 10.0) == [(4.0, 6.0), (7.0, 9.0)]
    assert overlap.covered(spans, 1.0, 10.0) == 5.0
    assert overlap.longest_gap(spans, 1.0, 12.0) == 2.0
    assert overlap.gaps(spans, 0.0, 25.0)[-1] == (20.0, 25.0)


@pytest.mark.long
def test_the_device_is_neither_always_idle_nor_always_busy(quick):
    figures = quick("overlap")["overlap"]
    assert all(0 < idle < 1 for idle in figures.values())


@pytest.mark.long
def test_curve_is_measured_beside_its_bound(quick):
    curve = quick("sharing", "--curve")["curve"]
    assert len(curve["rows"]) == len(curve["ratio"]) == len(curve["bound"])


def test_an_unknown_scenario_is_refused_with_those_known():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gone"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "block_tax" in done.stderr


def test_a_drawing_that_does_not_exist_is_refused_before_measuring(tmp_path):
    args = argparse.Namespace(scenario="lora", plot=tmp_path / "x.png", quick=True)
    with pytest.raises(SystemExit, match="sharing"):
        main(args)
