"""Killed converters, full disks and converters at the same time: the zoo is sound every time."""

import random
import time

import child_runs
import pytest
import tiny_checkpoints as tiny
from tiny_checkpoints import CONFIG

from jblock.zoo.fsck import fsck
from jblock.zoo.store import Zoo


def kill_once(zoo, argv, name, delay):
    """Kills a converter after `delay` seconds, checks the zoo, and runs it to its end.

    Returns:
      Whether the kill came before the converter was done, and how long the whole run took.
    """
    process, result = child_runs.start(*argv)
    time.sleep(delay)
    killed = not result.poll()
    process.kill()
    process.join()
    # A first run may have been killed before there was a zoo.
    if (zoo / "zoo.json").exists():
        assert fsck(Zoo.open(zoo)) == []
        # fsck swept what the dead writer left, unless it had only begun to make its lease.
        assert not any((p / "lease").exists() for p in (zoo / "tmp").iterdir())
    begin = time.monotonic()
    code, err = child_runs.run(*argv)
    took = time.monotonic() - begin
    assert code == 0, err
    opened = Zoo.open(zoo)
    for step in opened.chain(name).steps:
        opened.load_component(step.component, verify=True)
    assert opened.versions(name) == [1]
    return killed, took


def kill_many(tmp_path, times, seed):
    """Kills `times` converters at random moments of their work, in one zoo."""
    rng = random.Random(seed)
    zoo = tmp_path / "zoo"
    adapter = tiny.write_adapter(tmp_path / "adapter", tensors=tiny.adapter_weights(seed=seed))
    # How long one takes here and now, so that the moments cover all of it.
    probe = tiny.write_checkpoint(tmp_path / "probe")
    for name in ("warm", "m"):  # the first one waits for the process that the others fork from
        begin = time.monotonic()
        assert child_runs.run("hf", probe, "--zoo", tmp_path / name, "--name", "m")[0] == 0
        whole = time.monotonic() - begin
    killed = 0
    for i in range(times):
        if i % 4 == 3:
            argv = ("peft", adapter, "--zoo", zoo, "--base", "m0", "--name", f"m{i}")
        else:
            # Every other model shares its weights with the one before.
            tensors = tiny.weights(CONFIG, seed=i // 2)
            source = tiny.write_checkpoint(tmp_path / f"src{i}", tensors=tensors)
            argv = ("hf", source, "--zoo", zoo, "--name", f"m{i}")
        hit, took = kill_once(zoo, argv, f"m{i}", rng.uniform(0, 0.8 * whole))
        killed += hit
        if argv[0] == "hf":
            whole = took  # the machine may have become faster or slower
    assert fsck(Zoo.open(zoo)) == []
    assert Zoo.open(zoo).chains() == sorted(f"m{i}" for i in range(times))
    assert killed >= times // 5  # else the moments were no moments of its work


def test_kill_9_twenty_times(tmp_path):
    kill_many(tmp_path, times=20, seed=1)


@pytest.mark.long
def test_kill_9_two_hundred_times(tmp_path):
    kill_many(tmp_path, times=200, seed=2)


@pytest.mark.parametrize("limit", [8, 300, 1200, 2000])
def test_a_full_disk_is_told_and_leaves_the_zoo_as_it_was(tmp_path, limit):
    zoo = tmp_path / "zoo"
    source = tiny.write_checkpoint(tmp_path / "src")
    assert child_runs.run("hf", source, "--zoo", zoo, "--name", "m")[0] == 0
    before = tiny.files_of(zoo)
    other = tiny.write_checkpoint(tmp_path / "other", tensors=tiny.weights(CONFIG, seed=1))
    code, err = child_runs.run("hf", other, "--zoo", zoo, "--name", "o", file_limit=limit)
    assert code == 2, err
    assert "no space left" in err
    assert "Traceback" not in err
    assert tiny.files_of(zoo) == before
    assert fsck(Zoo.open(zoo)) == []
    assert child_runs.run("hf", other, "--zoo", zoo, "--name", "o")[0] == 0


def test_a_disk_that_fills_up_at_the_last_moment_changes_no_model(tmp_path):
    zoo = tmp_path / "zoo"
    source = tiny.write_checkpoint(tmp_path / "src", CONFIG | {"note": "x" * 4000})
    # Every other file fits; the record of the chain, which holds the config and more, does not.
    limit = (source / "config.json").stat().st_size + 100
    code, err = child_runs.run("hf", source, "--zoo", zoo, "--name", "m", file_limit=limit)
    assert code == 2
    assert "no space left" in err
    assert Zoo.open(zoo).chains() == []
    assert fsck(Zoo.open(zoo)) == []
    assert child_runs.run("hf", source, "--zoo", zoo, "--name", "m")[0] == 0


def test_converters_at_the_same_time(tmp_path):
    zoo = tmp_path / "zoo"
    seeds = {"a": [0, 1, 2], "b": [0], "c": [1]}
    running = []
    for name, of_name in seeds.items():
        for seed in of_name:
            tensors = tiny.weights(CONFIG, seed=seed)
            source = tiny.write_checkpoint(tmp_path / f"{name}{seed}", tensors=tensors)
            running.append(child_runs.start("hf", source, "--zoo", zoo, "--name", name))
    for process, result in running:
        code, err = result.recv()
        process.join()
        assert code == 0, err
    opened = Zoo.open(zoo)
    assert fsck(opened) == []
    assert {name: opened.versions(name) for name in opened.chains()} == {
        "a": [1, 2, 3],
        "b": [1],
        "c": [1],
    }
    assert opened.chain("b").steps in [opened.chain("a", v).steps for v in (1, 2, 3)]
    assert len(list((zoo / "components").iterdir())) == 3 * len(opened.chain("b").steps)
