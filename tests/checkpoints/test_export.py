"""Export: the files a model was made from come back bit by bit. Every family is in test_fixtures.py."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
from converter_cli import Cli
from tiny_checkpoints import CONFIG

from jblock.zoo.store import Zoo

# What fixtures hold beside a checkpoint, for tests alone.
TESTS_OWN = ("config_v4.json", "oracle.npz", "README.md")


def same_files(one, other):
    """Whether two folders hold the same files, but for what only tests read."""
    a, b = ({n: d for n, d in tiny.files_of(p).items() if n not in TESTS_OWN} for p in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name], name


def test_all_that_a_checkpoint_may_hold(cli, tmp_path):
    """Shards, a tied head's copy, an old rope table, a tokenizer; float32 beside bfloat16."""
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = tiny.weights(config)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(tiny.BFLOAT16)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    exponents = np.arange(0, 4, 2) / 4
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[table] = (10000.0**-exponents).astype(np.float32)
    source = tiny.write_checkpoint(tmp_path / "src", config, tensors, shards=3, generation={})
    (source / "tokenizer.json").write_text(tiny.tokenizer_json())
    (source / "tokenizer_config.json").write_text("{}")
    cli.ok("hf", source, "--name", "m")
    cli.ok("export", "m", "--out", tmp_path / "new" / "out")
    same_files(source, tmp_path / "new" / "out")
    assert not list((tmp_path / "new").glob(".*"))
    again = Cli(tmp_path / "other", cli._capsys)
    again.ok("hf", tmp_path / "new" / "out", "--name", "m")


def test_a_tokenizer_json_that_was_made_is_not_written(cli, tmp_path):
    source = tiny.write_checkpoint(tmp_path / "src")
    shutil.copy(Path(__file__).parent / "data" / "bpe.model", source / "tokenizer.model")
    result = cli("hf", source, "--name", "m")
    assert result.code == 0, result.err
    cli.ok("export", "m", "--out", tmp_path / "out")
    same_files(source, tmp_path / "out")


def test_an_adapter_with_a_tokenizer_of_its_own(cli, tmp_path):
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "base"), "--name", "base")
    source = tiny.write_adapter(tmp_path / "adapter")
    (source / "tokenizer.json").write_text(tiny.tokenizer_json())
    cli.ok("peft", source, "--base", "base", "--name", "a")
    cli.ok("export", "a", "--out", tmp_path / "out")
    same_files(source, tmp_path / "out")


def test_an_older_version(cli, tmp_path):
    first = tiny.write_checkpoint(tmp_path / "1")
    second = tiny.write_checkpoint(tmp_path / "2", tensors=tiny.weights(CONFIG, seed=1))
    cli.ok("hf", first, "--name", "m")
    cli.ok("hf", second, "--name", "m")
    cli.ok("export", "m@1", "--out", tmp_path / "out1")
    cli.ok("export", "m", "--out", tmp_path / "out2")
    same_files(first, tmp_path / "out1")
    same_files(second, tmp_path / "out2")


def test_what_is_there_is_not_overwritten_and_damage_is_not_exported(cli, tmp_path):
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "src"), "--name", "m")
    before = tiny.files_of(tmp_path / "src")
    result = cli("export", "m", "--out", tmp_path / "src")
    assert (result.code, "not empty" in result.err) == (2, True)
    assert tiny.files_of(tmp_path / "src") == before
    component = Zoo.open(cli.zoo).chain("m").steps[1].component
    weights = cli.zoo / "components" / component / "params.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    result = cli("export", "m", "--out", tmp_path / "out")
    assert (result.code, "other content" in result.err) == (2, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src", "zoo"]


@pytest.mark.parametrize(
    "files",
    [
        {"modeling_evil.py": b"import os"},
        {"pytorch_model.bin": b"\x80\x04pickle"},
        {".git-hook": b"x"},
        {"evil.so.header": b"{}"},
        {"config.json": b'{"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}'},
        {"config.json": b"{"},
    ],
)
def test_only_files_of_a_checkpoint_are_written(cli, tmp_path, files):
    source = tiny.write_checkpoint(tmp_path / "src")
    cli.ok("hf", source, "--name", "m")
    zoo = Zoo.open(cli.zoo)
    chain = zoo.chain("m")
    kept = zoo.files("sources", chain.source_files)
    with zoo.writer() as writer:
        evil = writer.put_files("sources", kept | files)
    zoo.publish(dataclasses.replace(chain, name="evil", version=0, source_files=evil))
    result = cli("export", "evil", "--out", tmp_path / "out")
    assert (result.code, "do not trust" in result.err or "no JSON" in result.err) == (2, True)
    assert not (tmp_path / "out").exists()
    assert cli("verify", "evil", "--against", source).code == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda steps: [steps[0], steps[2], steps[1], *steps[3:]],
        lambda steps: [*steps[:1], *steps[3:]],
        lambda steps: [*steps[:3], *steps[1:]],
    ],
)
@pytest.mark.parametrize("name", ["m", "a"])
def test_steps_that_its_files_do_not_have_are_told(cli, tmp_path, name, change):
    source = tiny.write_checkpoint(tmp_path / "src")
    cli.ok("hf", source, "--name", "m")
    cli.ok("peft", tiny.write_adapter(tmp_path / "adapter"), "--base", "m", "--name", "a")
    zoo = Zoo.open(cli.zoo)
    chain = zoo.chain(name)
    odd = dataclasses.replace(chain, name="odd", version=0, steps=tuple(change(chain.steps)))
    zoo.publish(odd)
    against = source if name == "m" else tmp_path / "adapter"
    for command in (
        ("export", "odd", "--out", tmp_path / "out"),
        ("export", "odd", "--format", "orbax", "--out", tmp_path / "out"),
    ):
        result = cli(*command)
        assert (result.code, result.err.count("\n"), "Traceback" in result.err) == (2, 1, False)
    assert cli("verify", "odd", "--against", against).code in (1, 2)
    assert not (tmp_path / "out").exists()


def test_code_that_a_configuration_names_is_told(cli, tmp_path):
    """As checkpoints that were saved from ones with code of their own have it."""
    config = CONFIG | {"auto_map": {"AutoModelForCausalLM": "org/repository--modeling.Model"}}
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "src", config), "--name", "m")
    result = cli("export", "m", "--out", tmp_path / "out")
    assert (result.code, "names code" in result.err) == (0, True)
