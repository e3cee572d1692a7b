"""Bottleneck adapters that cannot be served are refused, with the field, the value and the remedy."""

import json

import numpy as np
import pytest
import tiny_checkpoints as tiny
from converter_cli import Cli

from checkpoints.adapters.adapterhub import _reads
from checkpoints.errors import CheckpointError

HIDDEN, RANK = tiny.CONFIG["hidden_size"], 4
CONFIG = {
    "name": "mine",
    "model_name": "base",
    "model_type": "llama",
    "version": "adapters.1.3.0",
    "config": {
        "mh_adapter": False,
        "output_adapter": True,
        "reduction_factor": HIDDEN / RANK,
        "non_linearity": "relu",
        "original_ln_before": True,
        "original_ln_after": True,
        "residual_before_ln": True,
        "scaling": 1.0,
        "leave_out": [],
        "phm_dim": 4,
    },
}
DOWN = "model.layers.0.output_adapters.adapters.mine.adapter_down.0.weight"


def tensors():
    """A trained adapter by CONFIG."""
    rng = np.random.default_rng(0)
    shapes = {"adapter_down.0.weight": (RANK, HIDDEN), "adapter_down.0.bias": (RANK,)}
    shapes |= {"adapter_up.weight": (HIDDEN, RANK), "adapter_up.bias": (HIDDEN,)}
    return {
        f"model.layers.{i}.output_adapters.adapters.mine.{name}": rng.standard_normal(shape).astype(
            "f4"
        )
        for i in range(tiny.CONFIG["num_hidden_layers"])
        for name, shape in shapes.items()
    }


def write(path, config=CONFIG, values=None):
    """An adapter's folder; returns it."""
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    tiny.write_safetensors(path / "adapter.safetensors", tensors() if values is None else values)
    return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A zoo with the base."""
    path = tmp_path_factory.mktemp("hub")
    return tiny.write_checkpoint(path / "src"), path / "zoo"


@pytest.fixture
def cli(zoo, capsys):
    """The converter on it."""
    source, path = zoo
    cli = Cli(path, capsys)
    if not path.exists():
        cli.ok("hf", source, "--name", "base")
    return cli


def refused(cli, source, *words):
    """It ends with an error that has all words."""
    result = cli("peft", source, "--base", "base", "--name", "bad")
    assert result.code == 2
    for word in words:
        assert word in result.err, result.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ln_after": True}, ["ln_after", "cannot be served"]),
        ({"use_gating": True}, ["use_gating"]),
        ({"phm_layer": True}, ["phm_layer"]),
        ({"inv_adapter": "nice"}, ["inv_adapter"]),
        ({"some_new_option": 3}, ["some_new_option"]),
        ({"architecture": "lora"}, ["architecture", "lora", "PEFT"]),
        ({"non_linearity": "swelu"}, ["non_linearity", "swelu", "relu"]),
        ({"non_linearity": None}, ["non_linearity"]),
        ({"original_ln_after": False}, ["original_ln_after", "residual_before_ln"]),
        ({"residual_before_ln": "post_add"}, ["residual_before_ln", "post_add"]),
        ({"residual_before_ln": False}, ["original_ln_after"]),
        ({"is_parallel": "yes"}, ["is_parallel", "yes"]),
        ({"scaling": "loud"}, ["scaling", "loud"]),
        ({"scaling": 1e300}, ["scaling", "float32"]),
        ({"scaling": "learned"}, ["'scaling'", "missing"]),
        ({"reduction_factor": 0}, ["reduction_factor", "over 0"]),
        ({"reduction_factor": {"7": 4}}, ["reduction_factor", "None"]),
        ({"reduction_factor": 2}, [DOWN, "rank 8"]),
        ({"leave_out": [0]}, ["layers.0", "surplus"]),
        ({"leave_out": 0.5}, ["leave_out"]),
        ({"mh_adapter": True}, ["layer 0", "missing"]),
        ({"output_adapter": False}, ["surplus"]),
    ],
)
def test_options(tmp_path, cli, change, words):
    config = CONFIG | {"config": CONFIG["config"] | change}
    refused(cli, write(tmp_path / "a", config), *words)


def test_files(tmp_path, cli):
    """What is no adapter of this base, pickled, or lacks something."""
    refused(cli, write(tmp_path / "name", CONFIG | {"name": "other"}), "other", DOWN[:20])
    refused(cli, write(tmp_path / "config", CONFIG | {"config": None}), "config")
    refused(cli, write(tmp_path / "model", CONFIG | {"model_name": 3}), "model_name")
    head = tensors() | {"heads.mine.weight": np.ones((2, 2), "f4")}
    refused(cli, write(tmp_path / "head", values=head), "heads.mine.weight", "with_head=False")
    more = tensors() | {DOWN.replace("down.0.weight", "down.0.more"): np.ones(2, "f4")}
    refused(cli, write(tmp_path / "more", values=more), "down.0.more", "surplus")
    pickled = write(tmp_path / "pickled")
    (pickled / "adapter.safetensors").rename(pickled / "pytorch_adapter.bin")
    refused(cli, pickled, "pickle", "use_safetensors=True")
    headless = write(tmp_path / "headless")
    (headless / "head_config.json").write_text("{}")
    refused(cli, headless, "model_head.safetensors", "with_head=False")
    result = cli("peft", write(tmp_path / "fine"), "--base", "base", "--name", "fine")
    assert result.code == 0, result.err


def test_what_a_bottleneck_reads():
    """Whatever the order of sums, it has to be x + h and what the bottleneck makes of one of them."""
    keys = ("original_ln_before", "residual_before_ln", "original_ln_after")
    good = {
        (True, True, True): "sum",
        (True, False, False): "sum",
        (False, True, True): "output",
        (False, False, True): "output",
    }
    for bits in range(8):
        values = tuple(bool(bits >> i & 1) for i in range(3))
        options = dict(zip(keys, values, strict=True))
        if values in good:
            assert _reads(options) == good[values]
        else:
            with pytest.raises(CheckpointError, match="original_ln_after"):
                _reads(options)
    assert _reads({"is_parallel": True}) == "input"
