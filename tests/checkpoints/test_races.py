"""Converters, removals and gc on one zoo at the same time, killed at random: nothing is ever missing."""

import os
import random
import time

import child_runs
import pytest
import tiny_checkpoints as tiny
from tiny_checkpoints import CONFIG

from jblock.zoo import gc, lease
from jblock.zoo.fsck import fsck
from jblock.zoo.store import Zoo

# What a command may refuse because of what another one did before it.
_EXPECTED = ("no model", "is an adapter on", "was removed")


def sources(root):
    """Models that share components in many ways, and an adapter."""
    made = []
    for i in range(4):
        tensors = tiny.weights(CONFIG, seed=i % 2)
        if i > 1:  # a fine-tune of the last ffn
            name = "model.layers.1.mlp.up_proj.weight"
            tensors[name] = tensors[name] + i
        made.append(tiny.write_checkpoint(root / f"src{i}", tensors=tensors))
    return made, tiny.write_adapter(root / "adapter")


def race(tmp_path, seconds, seed):
    """Two converters and one that removes, over and over, in one zoo.

    Returns:
      How many converters came to their end, how many commands were killed.
    """
    rng = random.Random(seed)
    zoo = tmp_path / "zoo"
    checkpoints, adapter = sources(tmp_path)
    assert child_runs.run("hf", checkpoints[0], "--zoo", zoo, "--name", "m0")[0] == 0
    names = [f"m{i}" for i in range(4)]

    def command(slot):
        if slot == 2:
            if rng.random() < 0.5:
                return ("rm", rng.choice([*names, "a"]), "--zoo", zoo)
            return ("gc", "--delete", "--zoo", zoo)
        if rng.random() < 0.25:
            return ("peft", adapter, "--base", "m0", "--name", "a", "--zoo", zoo)
        i = rng.randrange(4)
        return ("hf", checkpoints[i], "--name", names[i], "--zoo", zoo)

    running, done, killed, errors = {}, 0, 0, []
    end = time.monotonic() + seconds
    while time.monotonic() < end or running:
        for slot in range(3):
            if slot not in running and time.monotonic() < end:
                argv = command(slot)
                # Every component moved in at once: the most there can be to collect.
                process, result = child_runs.start(*argv, part=1)
                due = rng.uniform(0, 0.4) if rng.random() < 0.4 else 60.0
                running[slot] = (argv[0], process, result, time.monotonic() + due)
        for slot, (what, process, result, due) in list(running.items()):
            if result.poll():
                code, err = result.recv()
                if code and not any(text in err for text in _EXPECTED):
                    errors.append((what, code, err))
                done += what in ("hf", "peft") and code == 0
            elif process.is_alive() and time.monotonic() < due:
                continue
            else:
                process.kill()
                killed += 1
            process.join()
            del running[slot]
        time.sleep(0.002)
    assert errors == []
    opened = Zoo.open(zoo)
    assert fsck(opened) == []
    # A process killed while it made its lease leaves an empty folder, or one with an empty mark, which
    # must age before it is swept.
    marks = [p / "lease" for p in (zoo / "tmp").iterdir()]
    assert [m.read_text() for m in marks if m.exists() and m.stat().st_size] == []
    for path in [*(zoo / "tmp").iterdir(), *(zoo / "tmp").glob("*/lease")]:
        os.utime(path, (1, 1))
    lease.clean(zoo / "tmp")
    assert os.listdir(zoo / "tmp") == []
    gc.collect(opened, dry_run=False)
    assert fsck(opened) == []
    for name in opened.chains():
        for step in opened.chain(name).steps:
            opened.load_component(step.component, verify=True)
    return done, killed


def test_converters_and_gc_with_kills(tmp_path):
    done, killed = race(tmp_path, seconds=4, seed=1)
    assert done > 0
    assert killed > 0


@pytest.mark.long
def test_converters_and_gc_with_kills_for_three_minutes(tmp_path):
    done, killed = race(tmp_path, seconds=180, seed=2)
    print(f"{done} conversions done, {killed} commands killed")
    assert done > 20
    assert killed > 20
