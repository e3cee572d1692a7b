"""Odd content of a zoo: whatever a file holds, commands say so in a line, and none runs away with memory."""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zoos

from jblock.zoo import edges, gc
from jblock.zoo.acceptance import AcceptancePolicy
from jblock.zoo.edge_records import Edge, Score
from jblock.zoo.fsck import fsck
from jblock.zoo.inventory import edge_inventory, inventory
from jblock.zoo.records import Chain, Step, ZooError
from jblock.zoo.repair import repair
from jblock.zoo.store import Zoo
from jblock.zoo.transfer import copy

MOST_BYTES = 1 << 30  # of memory that a process which reads such zoos may take
_CONTEXT = multiprocessing.get_context("forkserver")

ODD = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, float("inf"), float("nan"), "", "x", "..",
    "../..", "0" * 64, "m@1", "a@1", "@", "\ud800", "\0", [], {}, [[]], {"a": 1}, [None], ["0" * 64],
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A zoo with all that one can hold."""
    zoo = Zoo.create(tmp_path_factory.mktemp("sound") / "zoo")
    chain = zoos.fill(zoo)
    zoos.fill(zoo, seed=1)
    zoo.publish(Chain.from_json(chain.to_json() | {"name": "a", "version": 0, "base": "m@1"}))
    zoo.alias("m", "stable", 1)
    edge = Edge(
        kind="equivalent",
        original=(Step(component=chain.steps[1].component),),
        substitute=(Step(component=zoo.chain("m", 2).steps[1].component),),
        scores={"parameter_cosine": Score(value=0.9)},
    )
    edges.put_edges(zoo, edge)
    return zoo.path


@pytest.fixture
def folder(tmp_path):
    """A folder in memory where there is one: most of a case is making and removing small files."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


def places(value, path=()):
    """Every place inside a JSON value."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*path, key))


def put(value, path, new):
    if not path:
        return new
    at = value
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return value


def damage(rng, root):
    """Changes one file of a zoo in one way; says which."""
    files = sorted(
        p for p in root.rglob("*") if p.is_file() and not {"tmp", "locks"} & set(p.parts[-3:])
    )
    path = files[rng.integers(len(files))]
    data = path.read_bytes()
    way = rng.integers(6)
    if path.suffix == ".json" and way < 4:
        value = json.loads(data)
        spots = list(places(value))
        odd = ODD[rng.integers(len(ODD))]
        spot = spots[rng.integers(len(spots))]
        if way == 0 and spot and isinstance(spot[-1], str):
            value = put(value, (*spot[:-1], "surprise"), odd)
        else:
            value = put(value, spot, odd)
        text = json.dumps(value)
        path.write_text(text, errors="surrogatepass")
        record = path.parts[-3] == "chains" and path.name != "model.json"
        if record and isinstance(value, dict) and rng.integers(2):
            # As in a zoo that someone made to do harm.
            with contextlib.suppress(ZooError):
                zoos.fit_record(Zoo.open(root), path.parts[-2], int(path.stem))
    elif way == 4:
        path.write_bytes(data[: rng.integers(len(data) + 1)])
    elif way == 5:
        path.unlink()
    else:
        changed = bytearray(data or b"x")
        for _ in range(rng.integers(1, 5)):
            changed[rng.integers(len(changed))] = rng.integers(256)
        path.write_bytes(bytes(changed))
    return str(path.relative_to(root))


def use(root, other):
    """All that reads a zoo; only a ZooError may come out."""
    try:
        zoo = Zoo.open(root)
    except ZooError:
        return
    problems = []
    found = inventory(zoo)
    edge_inventory(zoo, AcceptancePolicy())
    gc.collect(zoo, dry_run=True, problems=problems)
    for line in (*fsck(zoo), *problems, *found["problems"]):
        assert "\n" not in line
    for name in ("m", "a"):
        try:
            copy(zoo, other, name, problems=problems)
        except ZooError:
            continue
        for step in other.chain(name).steps:
            other.load_component(step.component, verify=True)
    try:
        repair(zoo)
        gc.collect(zoo, dry_run=False, problems=problems)
        assert inventory(zoo)["problems"] == [] or fsck(zoo)
    except ZooError:
        pass


def fuzz(sound, folder, seeds):
    """Damages and uses copies of a zoo, in a process of its own whose memory nothing else has grown."""
    receive, send = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=run_fuzz, args=(send, sound, folder, seeds))
    process.start()
    send.close()
    try:
        failure, peak = receive.recv()
    finally:
        process.join()
    assert failure is None, failure
    assert peak < MOST_BYTES


def run_fuzz(send, sound, folder, seeds):
    """Sends the first failure, None if there is none, and the process's peak memory in bytes."""
    # What asks for more gets a MemoryError, and the case is named.
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    os.fsync = lambda fd: None
    failure = None
    try:
        for seed in seeds:
            fuzz_once(sound, folder, seed)
    except AssertionError as e:
        failure = str(e)
    send.send((failure, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10))


def fuzz_once(sound, folder, seed):
    root, target = folder / "zoo", folder / "target"
    shutil.copytree(sound, root)
    what = "nothing"
    try:
        other = Zoo.create(target)
        what = damage(np.random.default_rng(seed), root)
        use(root, other)
        assert fsck(other) == []
    except Exception as e:
        raise AssertionError(f"seed {seed}, {what}: {type(e).__name__}: {e}") from e
    finally:
        shutil.rmtree(root)
        shutil.rmtree(target, ignore_errors=True)


def test_some_odd_files(sound, folder):
    fuzz(sound, folder, range(60))


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_many_odd_files(sound, folder, part):
    fuzz(sound, folder, range(100 + 500 * part, 600 + 500 * part))


def hungry(sound, folder, send):
    """Takes more memory than any odd file may cost."""
    globals()["damage"] = lambda rng, root: str(np.ones(MOST_BYTES, np.uint8).sum())
    run_fuzz(send, sound, folder, range(1))


def test_a_case_that_takes_much_memory_is_named(sound, tmp_path):
    receive, send = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=hungry, args=(sound, tmp_path, send))
    process.start()
    failure, peak = receive.recv()
    process.join()
    assert failure.startswith("seed 0, nothing: ") and "MemoryError" in failure
    assert peak < MOST_BYTES
