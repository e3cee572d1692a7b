"""What is refused: exit code 2, one line that names what is wrong, and an unchanged zoo."""

import contextlib
import json
import os

import numpy as np
import pytest
import tiny_checkpoints as tiny
from converter_cli import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import ADAPTER, CONFIG

from checkpoints import hf, peft
from checkpoints.errors import CheckpointError
from checkpoints.progress import Progress
from checkpoints.safetensors_file import read_header

GATE = "model.layers.1.mlp.gate_proj.weight"
QA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
VA = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"


def refused(cli, words, *argv):
    """Runs a command that must refuse, and says why in a line that has all the words."""
    before = tiny.files_of(cli.zoo)
    result = cli(*argv)
    assert result.code == 2, result
    error = result.err.splitlines()[-1]
    assert error.startswith("jblock-convert: error: ")
    assert all(word in error for word in words), error
    assert tiny.files_of(cli.zoo) == before
    assert not any((cli.zoo / "tmp").iterdir())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A zoo with two models and an adapter. What is refused leaves it as it is, so one is enough."""
    root = tmp_path_factory.mktemp("bad-input")
    source = tiny.write_checkpoint(root / "src")
    quiet = Progress(quiet=True)
    for name in ("base", "other"):
        hf.convert(source, root / "zoo", name, quiet)
    peft.convert(tiny.write_adapter(root / "adapter"), root / "zoo", "base", "first", quiet)
    return root / "zoo"


@pytest.fixture
def cli(zoo, capsys):
    """The converter on that zoo."""
    return Cli(zoo, capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": None, "model_type": "mamba"}, ["mamba"]),
        ({"architectures": ["A", "B"]}, ["architectures"]),
        (
            {
                "architectures": ["PlamoForCausalLM"],
                "auto_map": {"AutoModelForCausalLM": "modeling_plamo.PlamoForCausalLM"},
            },
            ["auto_map", "never run", "PlamoForCausalLM"],
        ),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "silu"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "llama3"]),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, ["mrope", "llama3"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, ["factor"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["llama3", "low_freq_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters"]),
        ({"rope_parameters": {"rope_theta": 5.0}}, ["rope_theta", "5.0"]),
        ({"rope_theta": -1}, ["rope_theta", "-1"]),
        ({"rope_theta": 10**400}, ["rope_theta", "float32"]),
        ({"rms_norm_eps": 1e300}, ["rms_norm_eps", "float32"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"attention_bias": True}, ["q_proj.bias", "missing"]),
        ({"mlp_bias": True}, ["mlp.gate_proj.bias", "missing"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads 3"]),
        ({"num_attention_heads": 3}, ["head_dim"]),
        ({"head_dim": 3}, ["head_dim"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"vocab_size": "32"}, ["vocab_size", "'32'"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"eos_token_id": 32}, ["eos_token_id", "32"]),
        ({"num_hidden_layers": 3}, ["model.layers.2", "missing"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ({"num_hidden_layers": 1}, ["model.layers.1", "surplus"]),
        ({"intermediate_size": 32}, ["mlp.gate_proj", "[24, 16]", "[32, 16]"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight", "tie_word_embeddings"]),
    ],
)
def test_config(tmp_path, cli, change, words):
    source = tiny.write_checkpoint(tmp_path / "src", tensors=tiny.weights(CONFIG))
    (source / "config.json").write_text(json.dumps(CONFIG | change))
    refused(cli, words, "hf", source, "--name", "bad")


def drop(tensors):
    del tensors[GATE]


def add(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)


def nan(tensors):
    tensors[GATE][3, 3] = np.nan


def inf(tensors):
    tensors[GATE][0, 0] = -np.inf


def reshape(tensors):
    tensors[GATE] = tensors[GATE].T


@pytest.mark.parametrize("dtype", [np.float32, np.float16, tiny.BFLOAT16])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop, ["missing", GATE]),
        (add, ["surplus", "q_proj.bias"]),
        (nan, ["NaN", GATE, "element 51"]),
        (inf, ["Inf", GATE, "element 0"]),
        (reshape, [GATE, "[16, 24]", "[24, 16]"]),
    ],
)
def test_tensors(tmp_path, cli, damage, words, dtype):
    tensors = tiny.weights(CONFIG, dtype=dtype, seed=9)
    damage(tensors)
    refused(cli, words, "hf", tiny.write_checkpoint(tmp_path / "s", tensors=tensors), "--name", "b")


def entry(**change):
    """Header bytes with the first tensor's entry changed."""

    def edit(raw):
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header["model.embed_tokens.weight"] |= change
        encoded = json.dumps(header).encode()
        return len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :]

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:7],
        lambda raw: b"",
        lambda raw: raw + b"\0",
        lambda raw: (1 << 40).to_bytes(8, "little") + raw[8:],
        lambda raw: (2).to_bytes(8, "little") + b"[]",
        lambda raw: raw[:8] + b"x" + raw[9:],
        entry(dtype="F8_E4M3"),
        entry(dtype="I64"),
        entry(dtype=[]),
        entry(shape=[10**30]),
        entry(shape=[-32, -16]),
        entry(shape=[32, 17]),
        entry(data_offsets=[4, 2052]),
        entry(data_offsets=[0, 1 << 50]),
        entry(data_offsets=None),
    ],
)
def test_safetensors_files(tmp_path, cli, edit):
    source = tiny.write_checkpoint(tmp_path / "src")
    path = source / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))
    refused(cli, ["model.safetensors"], "hf", source, "--name", "bad")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_to_a_file_is_told_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    tiny.write_safetensors(path, {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        for info in read_header(path)[1].values():
            info.read()


def test_shards_and_their_index(tmp_path, cli):
    source = tiny.write_checkpoint(tmp_path / "src", shards=2)
    index = source / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def with_map(change):
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | change}))

    with_map({GATE: "../model.safetensors"})
    refused(cli, ["../model.safetensors"], "hf", source, "--name", "bad")
    with_map({GATE: "model-00003-of-00002.safetensors"})
    refused(cli, ["model-00003-of-00002.safetensors"], "hf", source, "--name", "bad")
    index.write_text("{")
    refused(cli, ["index.json"], "hf", source, "--name", "bad")
    with_map({})
    (source / "model.safetensors").write_bytes(b"")
    refused(cli, ["other files", "out of date"], "hf", source, "--name", "bad")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pth", "consolidated.00.pt"])
def test_pickle_is_refused_by_name(tmp_path, cli, file):
    source = tiny.write_checkpoint(tmp_path / "src")
    (source / "model.safetensors").unlink()
    (source / file).write_bytes(b"\x80\x04.")
    refused(cli, [file, "pickle", "model.safetensors"], "hf", source, "--name", "bad")


@pytest.mark.parametrize(
    "name", ["", "..", ".x", "a/b", "../a", "a..b", "a.", "/a", "-a", "a b", "a\n", "ü", "x" * 129]
)
def test_names(tmp_path, cli, name):
    refused(cli, ["name"], "hf", tiny.write_checkpoint(tmp_path / "src"), f"--name={name}")


@pytest.mark.parametrize("name", ["nothing", "../base", "base@9"])
def test_unknown_models(tmp_path, cli, name):
    refused(cli, [name], "verify", name, "--against", tmp_path)


def test_folders(tmp_path, cli):
    refused(cli, ["no folder", "nowhere"], "hf", tmp_path / "nowhere", "--name", "bad")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_text(json.dumps(CONFIG))
    refused(cli, ["model.safetensors"], "hf", tmp_path / "src", "--name", "bad")
    (tmp_path / "src" / "config.json").write_text('{"vocab_size": NaN}')
    refused(cli, ["config.json", "NaN"], "hf", tmp_path / "src", "--name", "bad")
    (tmp_path / "src" / "config.json").write_text('{"note": 1e999}')
    refused(cli, ["config.json", "1e999"], "hf", tmp_path / "src", "--name", "bad")
    (tmp_path / "src" / "config.json").write_text("[" * 100_000)
    refused(cli, ["config.json"], "hf", tmp_path / "src", "--name", "bad")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_are_not_waited_for(tmp_path, cli, name):
    source = tiny.write_checkpoint(tmp_path / "src")
    (source / name).unlink()
    os.mkfifo(source / name)
    refused(cli, [name], "hf", source, "--name", "bad")


def test_a_folder_that_is_no_zoo_is_left_alone(tmp_path, capsys):
    cli = Cli(tmp_path / "zoo", capsys)
    source = tiny.write_checkpoint(tmp_path / "src")
    cli.zoo.mkdir()
    (cli.zoo / "holiday.jpg").write_bytes(b"x")
    assert cli("hf", source, "--name", "m").code == 2
    assert cli("list").code == 2
    assert tiny.files_of(cli.zoo) == {"holiday.jpg": b"x"}


def test_a_bad_first_checkpoint_makes_no_zoo(tmp_path, capsys):
    cli = Cli(tmp_path / "zoo", capsys)
    tensors = tiny.weights(CONFIG)
    drop(tensors)
    assert (
        cli("hf", tiny.write_checkpoint(tmp_path / "s", tensors=tensors), "--name", "m").code == 2
    )
    assert not cli.zoo.exists()


def test_tokenizers(tmp_path, cli):
    source = tiny.write_checkpoint(tmp_path / "src")
    (source / "tokenizer.json").write_text("{}")
    refused(cli, ["tokenizer.json"], "hf", source, "--name", "bad")
    # The library panics on this one, with an exception that is no Exception.
    normalizer = {"type": "Precompiled", "precompiled_charsmap": ""}
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    whole = {"version": "1.0", "normalizer": normalizer, "model": model}
    (source / "tokenizer.json").write_text(json.dumps(whole))
    refused(cli, ["tokenizer.json", "charsmap"], "hf", source, "--name", "bad")
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text("{}")
    refused(cli, ["vocab.json", "tokenizer.json"], "hf", source, "--name", "bad")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, ["peft_type", "LOHA", "merge"]),
        ({"peft_type": "VERA"}, ["peft_type", "VERA", "'IA3'"]),
        ({"peft_type": "OFT"}, ["peft_type", "OFT"]),
        ({"peft_type": "IA3"}, ["r is 4", "cannot be served"]),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 0}, ["cannot be served"]),
        ({"task_type": "SEQ_CLS"}, ["task_type"]),
        ({"use_dora": True}, ["lora_magnitude_vector", "missing"]),
        ({"use_dora": True, "lora_bias": True}, ["lora_bias", "use_dora"]),
        ({"lora_bias": True}, ["lora_B.bias", "missing"]),
        ({"bias": "some"}, ["bias", "some"]),
        ({"modules_to_save": ["lm_head"]}, ["lm_head.weight", "modules_to_save", "missing"]),
        ({"modules_to_save": "lm_head"}, ["modules_to_save", "list"]),
        ({"ensure_weight_tying": True}, ["ensure_weight_tying"]),
        ({"trainable_token_indices": [3]}, ["trainable_token_indices"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
        ({"target_parameters": ["experts.w"]}, ["target_parameters"]),
        ({"some_new_option": 3}, ["some_new_option"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["pissa"]),
        ({"r": 0}, ["r is 0"]),
        ({"r": 8}, [QA, "[4, 16]", "[8, 16]"]),
        ({"lora_alpha": None}, ["lora_alpha"]),
        ({"lora_alpha": 10**400}, ["lora_alpha", "float32"]),
        ({"alpha_pattern": {"q_proj": 1e300}}, ["alpha_pattern", "float32"]),
        ({"use_rslora": "no"}, ["use_rslora", "bool"]),
        ({"rank_pattern": {"q_proj": 2}}, [QA, "rank_pattern"]),
        ({"rank_pattern": {"(q|k)_proj": 4}}, ["rank_pattern", "groups"]),
        ({"rank_pattern": {"[": 4}}, ["rank_pattern"]),
        ({"rank_pattern": {".*.*.*.*.*": 4}}, ["rank_pattern", "repetitions"]),
        ({"rank_pattern": {"q_proj": "4"}}, ["rank_pattern", "'4'"]),
        ({"rank_pattern": [4]}, ["rank_pattern"]),
        ({"alpha_pattern": {"q_proj": "x"}}, ["alpha_pattern"]),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "o_proj"]}, ["o_proj", "missing"]),
        ({"target_modules": ["q_proj", "v_proj"]}, ["down_proj", "surplus"]),
        ({"target_modules": 5}, ["target_modules", "5"]),
        ({"target_modules": [["q_proj"]]}, ["target_modules"]),
        ({"layers_to_transform": [0]}, ["layers.1", "surplus", "layers_to_transform"]),
        ({"layers_to_transform": 1}, ["layers.0", "surplus"]),
        ({"layers_to_transform": "all"}, ["layers_to_transform", "all"]),
        ({"base_model_name_or_path": ["base"]}, ["base_model_name_or_path"]),
        ({"base_model_name_or_path": "org/other"}, ["other", "--base"]),
    ],
)
def test_adapter_config(tmp_path, cli, change, words):
    source = tiny.write_adapter(tmp_path / "adapter", ADAPTER | change)
    refused(cli, words, "peft", source, "--base", "base", "--name", "bad")


def lose_b(tensors):
    del tensors[VA.replace("lora_A", "lora_B")]


def other_layers(tensors):
    tensors |= tiny.adapter_weights(layers=3)


def other_module(tensors):
    tensors[QA.replace("q_proj", "x_proj")] = np.zeros((4, 16), np.float32)


def other_width(tensors):
    tensors[VA] = np.zeros((4, 32), np.float32)


def a_nan(tensors):
    tensors[VA][1, 1] = np.nan


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_b, ["layers.1.self_attn.v_proj.lora_B", "missing"]),
        (other_layers, ["layers.2.", "another base"]),
        (other_module, ["x_proj", "another base"]),
        (other_width, [VA, "[4, 32]", "[4, 16]", "another base"]),
        (a_nan, [VA, "NaN"]),
        (dict.clear, ["missing"]),
    ],
)
def test_adapter_tensors(tmp_path, cli, damage, words):
    tensors = tiny.adapter_weights(seed=5)
    damage(tensors)
    source = tiny.write_adapter(tmp_path / "adapter", tensors=tensors)
    refused(cli, words, "peft", source, "--base", "base", "--name", "bad")


def test_adapters_need_a_base(tmp_path, cli):
    source = tiny.write_adapter(tmp_path / "adapter")
    refused(
        cli, ["known: base, first, other"], "peft", source, "--base", "bass", "--name", "second"
    )
    refused(cli, ["base"], "peft", source, "--base", "base", "--name", "base")
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")
    refused(cli, ["adapter_model.bin", "pickle"], "peft", source, "--base", "base", "--name", "x")


@pytest.mark.parametrize("argv", [[], ["hf"], ["frobnicate"], ["hf", "src"], ["list", "--nope"]])
def test_usage(cli, argv):
    assert cli(*argv).code == 2
