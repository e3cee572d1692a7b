"""Full checkpoints that differ from a known one in biases and norms only are stored as that."""

import json

import numpy as np
import pytest
import tiny_checkpoints as tiny
from converter_cli import Cli
from tiny_checkpoints import CONFIG

from jblock.zoo.store import Zoo

QWEN2 = CONFIG | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
TIED = CONFIG | {"tie_word_embeddings": True}


def with_changed(tensors, dims, seed=7):
    """A copy of tensors of which those of so many dimensions are others."""
    rng = np.random.default_rng(seed)
    return {
        n: (v + rng.standard_normal(v.shape)).astype(v.dtype) if v.ndim == dims else v
        for n, v in tensors.items()
    }


@pytest.mark.parametrize("config", [QWEN2, TIED, CONFIG], ids=["biases", "tied", "norms"])
def test_only_biases_and_norms_are_stored(tmp_path, cli, config):
    base = tiny.weights(config)
    tuned = with_changed(base, 1)
    small = sum(v.nbytes for v in tuned.values() if v.ndim == 1)
    first = tiny.write_checkpoint(tmp_path / "base", config, base)
    second = tiny.write_checkpoint(tmp_path / "tuned", config, tuned)
    cli.ok("hf", first, "--name", "base")
    plan = json.loads(cli.ok("plan", second, "--name", "tuned", "--json"))
    assert (plan["stored_bytes"], {r["kind"] for r in plan["steps"] if r["stored"]}) == (
        small,
        {"vectors"},
    )
    result = cli("hf", second, "--name", "tuned")
    assert "in biases and norms only" in result.err
    zoo = Zoo.open(cli.zoo)
    chains = [zoo.chain(n) for n in ("base", "tuned")]
    one, other = ([s.component for s in c.steps] for c in chains)
    assert one == other and chains[1].base is None
    deltas = {d for s in chains[1].steps for d in s.deltas}
    assert sum(zoo.delta(d).nbytes for d in deltas) == small
    assert cli.ok("fsck").endswith("clean\n")
    assert cli.ok("verify", "tuned", "--against", second).endswith(f"is {second}\n")
    assert cli("verify", "tuned", "--against", first).code == 1
    cli.ok("export", "tuned", "--out", tmp_path / "out")
    assert tiny.files_of(tmp_path / "out") == tiny.files_of(second)
    assert cli.ok("hf", second, "--name", "tuned") == "tuned@1 unchanged\n"
    # The base may go: its components stay for the other's sake.
    cli.ok("rm", "base")
    cli.ok("gc", "--delete")
    cli.ok("verify", "tuned", "--against", second)
    cli.ok("copy", "tuned", "--to", tmp_path / "copy")
    there = Cli(tmp_path / "copy", cli._capsys)
    there.ok("verify", "tuned", "--against", second)


def test_a_changed_matrix_makes_another_component(tmp_path, cli):
    base = tiny.weights(QWEN2)
    tuned = with_changed(base, 1)
    name = "model.layers.1.self_attn.k_proj.weight"
    tuned[name] = tuned[name].copy()
    tuned[name][-1, -1] += 1  # behind what is looked at first
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "base", QWEN2, base), "--name", "base")
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "tuned", QWEN2, tuned), "--name", "tuned")
    zoo = Zoo.open(cli.zoo)
    pairs = zip(zoo.chain("base").steps, zoo.chain("tuned").steps, strict=True)
    changed = [i for i, (a, b) in enumerate(pairs) if a.component != b.component]
    assert changed == [3]


def test_other_dtypes_are_other_components(tmp_path, cli):
    base = tiny.weights(CONFIG)
    half = {n: v.astype(tiny.BFLOAT16) for n, v in base.items()}
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "base", CONFIG, base), "--name", "base")
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "half", CONFIG, half), "--name", "half")
    zoo = Zoo.open(cli.zoo)
    assert not any(s.deltas for s in zoo.chain("half").steps)
