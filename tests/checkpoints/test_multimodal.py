"""The text models of multimodal checkpoints: added, verified, and written again as text models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from checkpoints.opening import open_checkpoint
from jblock.families import family_for
from jblock.families.multimodal import text_name
from jblock.zoo.store import Zoo

FIXTURES = Path(__file__).parent.parent / "fixtures" / "hf"
WRAPPED = {
    "gemma3_vision": ("gemma3", "Gemma3ForCausalLM"),
    "mistral3": ("mistral", "MistralForCausalLM"),
    "qwen2_5_vl": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3_vl": ("qwen3", "Qwen3ForCausalLM"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_text_model_is_added_and_comes_back_bit_by_bit(cli, tmp_path, name):
    source = FIXTURES / name
    result = cli("hf", source, "--name", "m")
    assert result.code == 0, result.err
    files = safetensors.numpy.load_file(source / "model.safetensors")
    wanted = {text_name(n): v for n, v in files.items() if text_name(n) is not None}
    assert f"{len(files) - len(wanted)} tensors of its other parts" in result.err
    cli.ok("verify", "m", "--against", source)

    cli.ok("export", "m", "--out", tmp_path / "out")
    got = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == wanted.keys()
    for tensor, value in got.items():
        assert value.tobytes() == wanted[tensor].tobytes(), tensor
    family, architecture = WRAPPED[name]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert "vision_config" not in config and family_for(config).name == family

    # What was written is the same model.
    cli.ok("hf", tmp_path / "out", "--name", "again")
    zoo = Zoo.open(cli.zoo)
    assert zoo.chain("again").steps == zoo.chain("m").steps


def test_shards_without_the_text_model_are_left_out(cli, tmp_path):
    source = tmp_path / "src"
    shutil.copytree(FIXTURES / "mistral3", source)
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    files, weight_map = {}, {}
    for name, value in tensors.items():
        first = text_name(name) is None or "layers.0" in name
        file = (
            f"model-0000{1 if text_name(name) is None else 2 if first else 3}-of-00003.safetensors"
        )
        files.setdefault(file, {})[name] = value
        weight_map[name] = file
    for file, inside in files.items():
        safetensors.numpy.save_file(inside, source / file, {"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    cli.ok("hf", source, "--name", "m")
    cli.ok("export", "m", "--out", tmp_path / "out")
    written = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert written == ["model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    cli.ok("hf", tmp_path / "out", "--name", "again")


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_says_whether_the_head_is_tied(tmp_path, tied):
    """Published configs leave it out, and releases of transformers mean different things by that."""
    source = tmp_path / "src"
    shutil.copytree(FIXTURES / "mistral3", source)
    config = json.loads((source / "config.json").read_text())
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(config))
    if tied:
        tensors = safetensors.numpy.load_file(source / "model.safetensors")
        del tensors["language_model.lm_head.weight"]
        safetensors.numpy.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    head = open_checkpoint(source).plan.steps[-1].tensors["weight"]
    assert head == ("model.embed_tokens.weight" if tied else "lm_head.weight")


def test_fields_that_a_text_config_leaves_out(tmp_path):
    """Gemma 3 4B gives seven fields of its text model."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vision_config": {},
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    plan = family_for(config).plan(config)
    attention, wide = plan.steps[1].spec, plan.steps[11].spec
    assert (plan.vocab_size, plan.max_position) == (262208, 131072)
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (8, 4, 256)
    assert (attention.sliding_window, attention.rope.theta) == (1024, 1e4)
    assert (wide.sliding_window, wide.rope.kind, wide.rope.theta) == (None, "linear", 1e6)


def test_tensors_that_come_to_one_name_are_refused(cli, tmp_path):
    source = tmp_path / "src"
    shutil.copytree(FIXTURES / "mistral3", source)
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors["model.language_model.norm.weight"] = np.ones(32, np.float32)
    safetensors.numpy.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = cli("hf", source, "--name", "m")
    assert result.code == 2 and "would both be 'model.norm.weight'" in result.err
