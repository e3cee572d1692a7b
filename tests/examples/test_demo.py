"""The demo: its token rule, its numbers, and itself on a part of the family."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples import demo_load, demo_reference, demo_report, demo_server, demo_zoo
from examples.demo_reference import END, NEAR_TIE, DemoError, Item, compare
from serving.values import Model

ROOT = Path(__file__).parent.parent.parent
SOME = ("demo-1m-add", "demo-1m-upper", "demo-1m-copy-lora4")
ITEM = Item(
    model="demo-1m-add",
    prompt="add 01 02 =",
    prompt_ids=(0, 5, 6),
    max_tokens=8,
    tokens=(7, 8, 9, END),
    text="003",
    gaps=(5.0, NEAR_TIE / 2, NEAR_TIE * 2, 4.0),
    expected="003",
)
CUT_SHORT = dataclasses.replace(ITEM, tokens=(7, 8), gaps=(5.0, 5.0), text="00", max_tokens=2)


@pytest.mark.parametrize(
    ("item", "ids", "finish", "text", "same", "position"),
    [
        pytest.param(ITEM, (7, 8, 9), "stop", "003", True, None, id="identical"),
        pytest.param(CUT_SHORT, (7, 8), "length", "00", True, None, id="identical, cut short"),
        pytest.param(ITEM, (7, 1, 2, 3, 4), "stop", "?", True, 1, id="parts at a near tie"),
        pytest.param(ITEM, (7,), "stop", "?", True, 1, id="ends at a near tie"),
        pytest.param(ITEM, (1, 8, 9), "stop", "?", False, 0, id="other token, clear lead"),
        pytest.param(ITEM, (7, 8, 1), "stop", "?", False, 2, id="just above the bound"),
        pytest.param(ITEM, (7, 8), "stop", "?", False, 2, id="ends too early"),
        pytest.param(ITEM, (7, 8, 9, 1), "length", "?", False, 3, id="goes on past the end"),
        pytest.param(ITEM, (7, 8, 9), "length", "003", False, 3, id="ended for another reason"),
        pytest.param(ITEM, (), "length", "", False, 0, id="empty"),
        pytest.param(CUT_SHORT, (7, 8, 9), "length", "003", False, 2, id="longer than allowed"),
        pytest.param(CUT_SHORT, (7, 8), "stop", "00", False, 2, id="stopped where it was cut"),
        pytest.param(ITEM, (7, 8, 9), "stop", "03", False, None, id="same ids, other text"),
    ],
)
def test_the_token_rule(item, ids, finish, text, same, position):
    verdict = compare(item, ids, finish, text)
    assert (verdict.same, verdict.position) == (same, position)
    assert bool(verdict.reason) == (not same)


def test_the_reference_is_complete():
    items = demo_reference.load(ROOT / "examples" / "reference.json")
    family = demo_zoo.load_family(())
    assert len(items) >= 440
    assert {i.model for i in items} == set(family)
    for item in items:
        assert compare(item, _ids(item), _finish(item), item.text).position is None


def _ids(item: Item) -> tuple[int, ...]:
    return tuple(t for t in item.tokens if t != END)


def _finish(item: Item) -> str:
    return "stop" if item.tokens[-1] == END else "length"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not there"),
        ("{", "is damaged"),
        ('{"items": [{}]}', "is damaged"),
        (
            '{"items": [{"finish": "stop", "output_ids": [1], "gaps": []}]}',
            "1 output_ids but 0 gaps",
        ),
    ],
)
def test_a_bad_reference_is_named(tmp_path, content, says):
    path = tmp_path / "reference.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DemoError, match=says):
        demo_reference.load(path)


def test_an_unknown_model_is_named():
    with pytest.raises(DemoError, match=r"'nobody' is none of the family: demo-1m, "):
        demo_zoo.load_family(["nobody"])


def test_adapters_bring_their_base():
    family = demo_zoo.load_family(["demo-1m-copy-lora4"])
    assert [e["name"] for e in demo_zoo.with_bases(family)] == ["demo-1m", "demo-1m-copy-lora4"]


def test_the_order_mixes_models_and_repeats():
    items = [dataclasses.replace(ITEM, model=m) for m in SOME for _ in range(20)]
    first, again = demo_load.shuffled(items), demo_load.shuffled(items)
    assert first == again and first != items and len(first) == len(items)
    assert demo_load.shuffled(items, 7) == first[:7]


def test_failures_and_mismatches_are_counted_and_shown(capsys):
    from rich.console import Console

    def answer(**fields) -> demo_load.Answer:
        good = {"token_ids": (7, 8, 9), "text": "003", "finish_reason": "stop", "total_ms": 20.0}
        return demo_load.Answer(**{"item": ITEM, "as_text": True, **good, **fields})

    run = demo_report.Run(
        family=demo_zoo.load_family(()),
        models=[
            Model(
                name=ITEM.model,
                version=1,
                family="llama",
                vocab_size=10,
                max_model_len=10,
                has_tokenizer=True,
                base="",
                blocks=4,
                shared_blocks=3,
            )
        ],
        answers=[
            answer(),
            answer(token_ids=(7, 1), text="?"),
            answer(token_ids=(1,), text="?"),
            answer(token_ids=(), error="UNAVAILABLE: engine: gone"),
        ],
        seconds=2.0,
        warm_up_seconds=3.0,
        totals={"logical_bytes": 20, "stored_bytes": 10},
        counters={"block_rows": 30.0, "block_calls": 4.0, "model_rows": 30, "model_calls": 10},
    )
    numbers = demo_report.summary(run)
    assert numbers["requests"] == 4
    assert (numbers["failed"], numbers["mismatched"], numbers["near_ties"]) == (1, 1, 1)
    assert (numbers["rows_per_block_call"], numbers["rows_per_model_call"]) == (7.5, 3.0)
    assert numbers["tokens_per_second"] == 3.0 and numbers["p50_ms"] == 20.0
    demo_report.show(run, Console(width=110))
    shown = capsys.readouterr().out
    assert "UNAVAILABLE: engine: gone" in shown and "transformers has 7" in shown
    assert "1 of 3" in shown and "2 of 4" in shown and "2.0 times less" in shown


def test_a_server_that_cannot_start_says_why(tmp_path):
    began = time.monotonic()
    with (
        pytest.raises(DemoError, match=r"ended with code 2 .*\n.*server\.log"),
        demo_server.start(tmp_path / "none", ["a"], tmp_path / "server.log") as server,
    ):
        server.wait_until_ready()
    assert server.process.poll() is not None
    assert time.monotonic() - began < 60


def run_demo(folder: Path, *arguments: str, timeout: float) -> subprocess.CompletedProcess:
    """The demo as `make demo` runs it, with nothing compiled before."""
    return subprocess.run(
        [sys.executable, "-m", "examples.demo", f"--folder={folder / 'demo-run'}", *arguments],
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def environment(folder: Path) -> dict[str, str]:
    """With a cache of compiled programs of its own."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}


def test_a_part_of_the_demo_twice(tmp_path):
    for _ in range(2):
        done = run_demo(tmp_path, f"--models={','.join(SOME)}", "--requests=12", timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        numbers = json.loads(done.stdout.splitlines()[-1])
        assert numbers["tenants"] == 3 and numbers["requests"] == 12
        assert numbers["failed"] == numbers["mismatched"] == 0
        assert numbers["compiles_on_serving_path"] == 0
        assert numbers["stored_bytes"] < numbers["logical_bytes"]
        assert numbers["rows_per_block_call"] > 0 and numbers["tokens_per_second"] > 0
        for name in SOME:
            assert name in done.stdout


@pytest.mark.long
def test_wrong_answers_fail_the_demo(tmp_path):
    data = json.loads((ROOT / "examples" / "reference.json").read_text())
    items = [i for i in data["items"] if i["model"] == "demo-1m-add"][:4]
    items[0]["output_ids"][0] += 1
    path = tmp_path / "reference.json"
    path.write_text(json.dumps({"items": items}))
    done = run_demo(tmp_path, "--models=demo-1m-add", f"--reference={path}", timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["mismatched"] == 1
    assert "PROBLEM: demo-1m-add" in done.stdout


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM]
)
def test_stopped_while_it_asks_it_leaves_nothing_behind(tmp_path, number):
    folder = tmp_path / "demo-run"
    # One at a time, so that it still asks when the signal comes.
    flags = [f"--folder={folder}", "--models=demo-1m", "--streams=1"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "examples.demo", *flags],
        cwd=ROOT,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in process.stdout:
            if "Asking" in line:
                break
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert not processes_naming(str(folder))


def processes_naming(text: str) -> list[str]:
    """Command lines of this machine that contain a text; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if text in line]


@pytest.mark.long
def test_the_whole_demo(tmp_path):
    done = run_demo(tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers["tenants"] == 12 and numbers["requests"] >= 440
    assert numbers["failed"] == numbers["mismatched"] == numbers["compiles_on_serving_path"] == 0
    assert numbers["rows_per_block_call"] > numbers["rows_per_model_call"]
    assert numbers["stored_bytes"] < numbers["logical_bytes"] / 2
