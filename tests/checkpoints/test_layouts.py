"""Checkpoints as they are published: named, laid out and accompanied in other ways, with the same numbers.

Each must become the same components as the plain one, come back byte by byte, and be taken by `verify` and
`plan` as by `hf`; or be refused with a message that says what it is and what to do.
"""

import json

import numpy as np
import pytest
import tiny_checkpoints as tiny
from test_bad_input import refused
from test_export import same_files
from tiny_checkpoints import CONFIG

from checkpoints import naming
from jblock.zoo.store import Zoo

TIED = CONFIG | {"tie_word_embeddings": True}
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
MOE = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "head_dim": 4,
    "intermediate_size": 24,
}
MIXTURES = {
    "mixtral": CONFIG | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 3},
    "qwen3_moe": CONFIG | {"architectures": ["Qwen3MoeForCausalLM"]} | MOE,
    "qwen2_moe": CONFIG
    | {"architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 20}
    | MOE,
}


def components(cli, name):
    return [s.component for s in Zoo.open(cli.zoo).chain(name).steps]


def taken(cli, source, name="m"):
    """Converts a checkpoint, and holds the other commands to it."""
    cli.ok("hf", source, "--name", name)
    cli.ok("verify", name, "--against", source)
    planned = json.loads(cli.ok("plan", source, "--name", "again", "--json"))
    assert planned["stored_bytes"] == 0
    out = source.parent / f"{name}-out"
    cli.ok("export", name, "--out", out)
    same_files(source, out)


def write(folder, config=CONFIG, tensors=None, **options):
    return tiny.write_checkpoint(folder, config, tensors, **options)


def renamed(tensors, rename):
    return {rename(n): v for n, v in tensors.items()}


# What a model does not need is dropped by its name.


def mask(dtype):
    return np.tril(np.ones((1, 1, 8, 8), dtype))


BUFFERS = {
    "rope of a layer": {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)},
    "rope outside of layers": {"model.rotary_emb.inv_freq": np.full(2, np.inf, np.float16)},
    "two ropes": {
        "model.rotary_emb.inv_freq": np.ones(2, np.float64),
        "model.rotary_emb_local.original_inv_freq": np.ones(2, tiny.BFLOAT16),
    },
    "cosines": {"model.layers.1.self_attn.rotary_emb.cos_cached": np.ones((1, 1, 8, 4), "f4")},
    "position ids": {"model.position_ids": np.arange(8)},
    "a mask": {"model.causal_mask": mask(bool)},
    "a score of masked positions": {"model.layers.0.attn.masked_bias": np.float16(-np.inf)},
    "an embedding's scale": {"model.embed_tokens.embed_scale": np.array(4.0)},
}


def test_buffers_are_left_out_whatever_they_hold(cli, tmp_path):
    config = CONFIG | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    tensors = tiny.weights(CONFIG)
    cli.ok("hf", write(tmp_path / "plain", config, tensors), "--name", "plain")
    for what, extra in BUFFERS.items():
        source = write(tmp_path / "one", config, tensors | extra)
        result = cli("hf", source, "--name", "one")
        assert "left out" in result.err and min(extra) in result.err, (what, result)
        assert components(cli, "one") == components(cli, "plain")
    every = {name: value for extra in BUFFERS.values() for name, value in extra.items()}
    taken(cli, write(tmp_path / "src", config, tensors | every))


GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    **{"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 8, "vocab_size": 32},
}
NEOX = {k: v for k, v in CONFIG.items() if k not in ("num_key_value_heads", "rms_norm_eps")} | {
    "architectures": ["GPTNeoXForCausalLM"],
    "rotary_pct": 0.5,
}


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, bool, np.float64])
@pytest.mark.parametrize(
    ("config", "stem"),
    [(GPT2, "transformer.h.{}.attn."), (NEOX, "gpt_neox.layers.{}.attention.")],
)
def test_masks_are_no_biases(cli, tmp_path, config, stem, dtype):
    tensors = tiny.weights(config)
    for i in range(2):
        tensors[stem.format(i) + "bias"] = mask(dtype) * 0  # not even a causal one
        tensors[stem.format(i) + "masked_bias"] = np.array(-1e9, np.float64)
    taken(cli, write(tmp_path / "src", config, tensors))


# Names and layouts that say the same.


@pytest.mark.parametrize("config", [TIED, GPT2], ids=["llama", "gpt2"])
def test_the_inner_model_alone(cli, tmp_path, config):
    """Saved without its head, names begin within it, as embedding models are published."""
    prefix = "transformer." if config is GPT2 else "model."
    tensors = tiny.weights(config)
    cli.ok("hf", write(tmp_path / "whole", config, tensors), "--name", "whole")
    bare = renamed(tensors, lambda n: n.removeprefix(prefix))
    taken(cli, write(tmp_path / "src", config, bare))
    assert components(cli, "m") == components(cli, "whole")


def test_a_tied_model_with_only_a_head(cli, tmp_path):
    tensors = tiny.weights(TIED)
    cli.ok("hf", write(tmp_path / "whole", TIED, tensors), "--name", "whole")
    tensors[HEAD] = tensors.pop(EMBED)
    taken(cli, write(tmp_path / "src", TIED, tensors))
    assert components(cli, "m") == components(cli, "whole")


@pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("dtype", [np.float32, tiny.BFLOAT16])
def test_experts_in_one_tensor(cli, tmp_path, config, dtype):
    tensors = tiny.weights(config, dtype=dtype)
    cli.ok("hf", write(tmp_path / "apart", config, tensors), "--name", "apart")
    taken(cli, write(tmp_path / "src", config, fused(tensors)))
    assert components(cli, "m") == components(cli, "apart")


def fused(tensors):
    """As transformers 5 saves a mixture with save_original_format=False."""
    out = dict(tensors)
    for i in range(2):
        of = "mlp" if f"model.layers.{i}.mlp.gate.weight" in out else "block_sparse_moe"
        gate, up, down = (
            ("gate_proj", "up_proj", "down_proj") if of == "mlp" else ("w1", "w3", "w2")
        )
        layer = f"model.layers.{i}."

        def pop(part, layer=layer, of=of):
            return np.stack([out.pop(f"{layer}{of}.experts.{e}.{part}.weight") for e in range(3)])

        both = np.concatenate([pop(gate), pop(up)], axis=1)
        out[f"{layer}mlp.experts.gate_up_proj"] = both
        out[f"{layer}mlp.experts.down_proj"] = pop(down)
        out[f"{layer}mlp.gate.weight"] = out.pop(f"{layer}{of}.gate.weight")
    return out


def test_fused_experts_of_another_shape_are_refused(cli, tmp_path):
    config = MIXTURES["qwen3_moe"]
    tensors = fused(tiny.weights(config))
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = np.ascontiguousarray(tensors[name].transpose(0, 2, 1))
    result = cli("hf", write(tmp_path / "src", config, tensors), "--name", "m")
    assert result.code == 2 and f"{name!r} has shape [3, 8, 16]" in result.err
    assert "[3, 16, 8]" in result.err


# The index and its files, as transformers takes them.


def edit_index(source, change):
    path = source / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))


def test_an_index_that_names_only_the_one_file(cli, tmp_path):
    source = write(tmp_path / "src")
    rows = dict.fromkeys(tiny.weights(CONFIG), "model.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": rows}))
    taken(cli, source)


def swap(rows):
    files = sorted(set(rows.values()))
    rows[EMBED] = files[rows[EMBED] == files[0]]


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.pop(NORM),
        lambda rows: rows.update({"model.gone.weight": rows[NORM]}),
        swap,
    ],
    ids=["a tensor without a row", "a row without a tensor", "a row of another file"],
)
def test_the_files_are_followed_where_the_index_differs(cli, tmp_path, change):
    cli.ok("hf", write(tmp_path / "plain"), "--name", "plain")
    source = write(tmp_path / "src", shards=2)
    edit_index(source, change)
    result = cli("hf", source, "--name", "m")
    assert "index.json disagrees" in result.err
    taken(cli, source)
    assert components(cli, "m") == components(cli, "plain")


def test_an_adapter_config_left_over_beside_a_model(cli, tmp_path):
    source = write(tmp_path / "src")
    (source / "adapter_config.json").write_text(json.dumps(tiny.ADAPTER))
    cli.ok("hf", source, "--name", "m")
    cli.ok("verify", "m", "--against", source)
    cli.ok("plan", source, "--name", "n")


# Names of which none is expected.

PREFIXES = {
    "torch.compile": (lambda n: f"_orig_mod.{n}", ["'_orig_mod.'", "torch.compile"]),
    "data parallel": (lambda n: f"module.{n}", ["'module.'", "no prefix"]),
    "a wrapper in front": (lambda n: f"language_model.{n}", ["'language_model.'", "multimodal"]),
    "a wrapper within": (
        lambda n: n.replace("model.", "model.language_model."),
        ["'model.language_model.'", "'model.'"],
    ),
    "peft": (lambda n: f"base_model.model.{n}", ["'base_model.model.'", "merge_and_unload"]),
    "an adapter's base": (lambda n: n.replace("_proj.w", "_proj.base_layer.w"), ["base_layer."]),
    "something else": (lambda n: f"student.{n}", ["'student.'", "no prefix"]),
}


@pytest.mark.parametrize(("rename", "words"), PREFIXES.values(), ids=PREFIXES.keys())
def test_a_prefix_is_told(cli, tmp_path, rename, words):
    cli.ok("hf", write(tmp_path / "other"), "--name", "other")
    tensors = renamed(tiny.weights(CONFIG), rename)
    refused(cli, words, "hf", write(tmp_path / "src", tensors=tensors), "--name", "m")


def test_names_that_have_nothing_in_common_are_not_explained():
    assert naming.explain(["a.b.weight"], ["model.layers.0.q.weight"]) == ""
    assert naming.explain([], ["model.norm.weight"]) == ""


# Contents that are something else.


def empty(tensors):
    tensors[EMBED] = np.zeros(0, np.float32)


def empty_rows(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((0, 16), np.float32)


def with_adapter(tensors):
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 16), np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (empty, ["empty", "ZeRO-3"]),
        (empty_rows, ["empty", "ZeRO-3"]),
        (lambda t: t.update({NORM: t[NORM].astype(np.float64)}), ["float64", "bfloat16"]),
        (lambda t: t.update({EMBED: t[EMBED].astype(np.int64)}), ["int64", "unquantized"]),
        (lambda t: t.update({EMBED: t[EMBED].astype(bool)}), ["bool", "packed"]),
        (with_adapter, ["lora_A", "merge_and_unload"]),
    ],
)
def test_tensors_that_cannot_be_weights(cli, tmp_path, change, words):
    cli.ok("hf", write(tmp_path / "other"), "--name", "other")
    tensors = tiny.weights(CONFIG)
    change(tensors)
    refused(cli, words, "hf", write(tmp_path / "src", tensors=tensors), "--name", "m")


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ids", [32, [2, 999], -1])
def test_an_end_outside_the_vocabulary(cli, tmp_path, where, ids):
    cli.ok("hf", write(tmp_path / "other"), "--name", "other")
    source = write(tmp_path / "src", generation={})
    data = json.loads((source / where).read_text()) | {"eos_token_id": ids}
    (source / where).write_text(json.dumps(data))
    bad = str(ids[1] if isinstance(ids, list) else ids)
    refused(cli, [where, "eos_token_id", bad, "0 to 31", "correct"], "hf", source, "--name", "m")


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"load_in_4bit": True},
    ],
)
def test_a_section_of_bitsandbytes_over_floats(cli, tmp_path, section):
    cli.ok("hf", write(tmp_path / "other"), "--name", "other")
    config = CONFIG | {"quantization_config": section}
    source = write(tmp_path / "src", config, tiny.weights(CONFIG))
    words = ["bitsandbytes", "plain floats", "QLoRA", "remove the section"]
    refused(cli, words, "hf", source, "--name", "m")


# Folders and files that are something else.


def only(*names):
    def make(folder):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"{}")
        return folder

    return make


def a_file(name):
    def make(folder):
        folder.mkdir()
        (folder / name).write_bytes(b"GGUF" if name.endswith(".gguf") else b"{}")
        return folder / name

    return make


SHARDS = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (only("adapter_config.json"), ["is an adapter", "jblock convert peft"]),
        (only("params.json", "consolidated.safetensors"), ["maker's own layout"]),
        (only("model-q4.gguf"), ["model-q4.gguf", "GGUF"]),
        (only("readme"), ["no config.json"]),
        (a_file("model.safetensors"), ["one weight file", "give its folder"]),
        (a_file("model.gguf"), ["GGUF"]),
        (a_file("model.zip"), ["is a file"]),
        (only(*SHARDS), ["2 shards", "model.safetensors.index.json"]),
        (only("config.json", "consolidated.safetensors"), ["consolidated", "layout"]),
    ],
)
def test_what_is_no_checkpoint(cli, tmp_path, make, words):
    cli.ok("hf", write(tmp_path / "other"), "--name", "other")
    source = make(tmp_path / "src")
    if (tmp_path / "src" / "config.json").exists():
        (tmp_path / "src" / "config.json").write_text(json.dumps(CONFIG))
    refused(cli, words, "hf", source, "--name", "m")


def test_a_mistyped_folder(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.ok("hf", write(tmp_path / "other"), "--name", "other")
    refused(cli, ["no folder org/model", "Hub"], "hf", "./org/model", "--name", "m")
    refused(cli, ["no folder other/nowhere", "check"], "hf", "other/nowhere", "--name", "m")


def test_a_model_is_no_adapter(cli, tmp_path):
    source = write(tmp_path / "src")
    cli.ok("hf", source, "--name", "base")
    argv = ("--base", "base", "--name", "m")
    refused(cli, ["whole model", "jblock convert hf"], "peft", source, *argv)
    (tmp_path / "none").mkdir()
    refused(cli, ["adapter_config.json"], "peft", tmp_path / "none", *argv)
