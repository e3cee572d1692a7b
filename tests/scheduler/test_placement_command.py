"""`jblock placement`: over a zoo of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from zoos import fill

from jblock.zoo.store import Zoo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """Two models without a block in common."""
    path = tmp_path_factory.mktemp("zoo") / "zoo"
    made = Zoo.create(path)
    fill(made, "one", 0)
    fill(made, "two", 1)
    return path


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jblock", "placement", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_it_says_where_what_lies_and_why(zoo, tmp_path):
    ask = ["--zoo", zoo, "--agent", "a0=1", "--agent", "a1=1x2@host/zone", "--popularity", "one=20"]
    done = run(*ask)
    assert done.returncode == 0, done.stderr
    assert "one: 20 rows a second" in done.stdout and "one span" in done.stdout
    data = json.loads(run(*ask, "--json").stdout)
    assert {c["chain"]: c["popularity"] for c in data["chains"]} == {"one": 20, "two": 1}
    assert sum(len(a["blocks"]) for a in data["agents"]) >= 6
    # What was printed is where it stays.
    before = tmp_path / "before.json"
    before.write_text(json.dumps(data))
    again = json.loads(run(*ask, "--json", "--previous", before).stdout)
    assert again["placement"] == data["placement"]


def test_agents_from_a_file(zoo, tmp_path):
    """Two agents that hold one model each."""
    file = tmp_path / "agents.json"
    given = {
        "agents": [{"name": "a", "memory": 500, "host": "x"}, {"name": "b", "memory": 500}],
        "links": {"far": {"seconds": 0.01, "bytes_per_second": 1e8}},
        "popularity": {"two": 3.5},
    }
    file.write_text(json.dumps(given))
    data = json.loads(run("--zoo", zoo, "--agents", file, "--json").stdout)
    assert [a["agent"] for a in data["agents"]] == ["a", "b"]
    assert all(a["used"] <= 500 for a in data["agents"])
    file.write_text(json.dumps({"agents": [{"name": "a", "memory": 100}]}))
    done = run("--zoo", zoo, "--agents", file)
    assert done.returncode == 1 and "has 100" in done.stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "give --agent NAME=GIB"),
        (["--agent", "a"], "agent 'a': give NAME=GIB"),
        (["--agent", "a=1", "--popularity", "three=1"], "model 'three' is not placed"),
        (["--agent", "a=1", "--popularity", "one=many"], "popularity of 'one' is 'many'"),
        (["--agent", "a=1", "--models", "three"], "three"),
    ],
)
def test_what_it_cannot_use_is_named(zoo, more, says):
    done = run("--zoo", zoo, *more)
    assert done.returncode == 1 and says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
