"""Orbax checkpoints: trees as Flax, Tunix and MaxText lay them out, made here from tiny checkpoints by the
rules those projects document, convert into the very components of the checkpoint."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_checkpoints as tiny
from flax import nnx

LLAMA = tiny.CONFIG
QWEN2 = tiny.CONFIG | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "tie_word_embeddings": True,
}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8}
CONFIGS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}


def heads_of(config: dict, name: str) -> int:
    return config[
        "num_attention_heads" if "q_proj" in name or "o_proj" in name else "num_key_value_heads"
    ]


def nested(flat: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for name, value in flat.items():
        *keys, last = name.split(".")
        at = tree
        for key in keys:
            at = at.setdefault(key, {})
        at[last] = jnp.asarray(value)
    return tree


def with_heads(config: dict, name: str, kernel: np.ndarray) -> np.ndarray:
    """A kernel [in, out] with its heads and their dimensions apart."""
    if "o_proj" in name:
        return kernel.reshape(heads_of(config, name), -1, kernel.shape[1])
    if "self_attn" in name:
        return kernel.reshape(kernel.shape[0], heads_of(config, name), -1)
    return kernel


def tunix(config: dict, tensors: tiny.Tensors) -> dict:
    out = {}
    for name, value in tensors.items():
        short = name.removeprefix("model.").removesuffix(".weight").replace("self_attn", "attn")
        if name == "model.embed_tokens.weight":
            out["embedder.input_embedding"] = value
        elif name == "lm_head.weight":
            out["lm_head.w"] = value.T
        elif name.endswith(".bias"):
            out[short.replace("_proj.bias", "_bias")] = value
        elif value.ndim == 1:
            out[(short if short != "norm" else "final_norm") + ".w"] = value
        elif "mlp" in name:
            out[f"{short}.kernel"] = value.T
        else:
            out[f"{short}.w"] = with_heads(config, name, value.T)
    return nested(out)


MODULES = {
    "self_attn.q_proj": "self_attention.query",
    "self_attn.k_proj": "self_attention.key",
    "self_attn.v_proj": "self_attention.value",
    "self_attn.o_proj": "self_attention.out",
    "self_attn.q_norm": "self_attention.query_norm",
    "self_attn.k_norm": "self_attention.key_norm",
    "mlp.gate_proj": "mlp.wi_0",
    "mlp.up_proj": "mlp.wi_1",
    "mlp.down_proj": "mlp.wo",
    "input_layernorm": "pre_self_attention_layer_norm",
    "post_attention_layernorm": "post_self_attention_layer_norm",
}


def maxtext(config: dict, tensors: tiny.Tensors, scan: bool) -> dict:
    """As MaxText converts: of Llama it interleaves the halves of a head of q and k, and scales q."""
    out, stacked = {}, {}
    for name, value in tensors.items():
        if name == "model.embed_tokens.weight":
            out["token_embedder.embedding"] = np.pad(value, ((0, 4), (0, 0)))
        elif name == "model.norm.weight":
            out["decoder.decoder_norm.scale"] = value
        elif name == "lm_head.weight":
            out["decoder.logits_dense.kernel"] = np.pad(value.T, ((0, 0), (0, 4)))
        else:
            _, _, layer, rest = name.split(".", 3)
            module, _, kind = rest.rpartition(".")
            leaf = "bias" if kind == "bias" else "scale" if value.ndim == 1 else "kernel"
            made = value if leaf == "scale" else value.reshape(heads_of(config, name), -1)
            if leaf == "kernel":
                made = with_heads(config, name, value.T)
                if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
                    first, second = np.split(made, 2, axis=-1)
                    made = np.stack((first, second), axis=-1).reshape(made.shape)
                    if "q_proj" in name:  # head_dim 4: a factor of 2, so that nothing is rounded
                        made = made * np.float32(1 / np.sqrt(made.shape[-1]))
            target = f"{MODULES[module]}.{leaf}"
            if scan:
                stacked.setdefault(target, {})[int(layer)] = made
            else:
                out[f"decoder.layers_{layer}.{target}"] = made
    for target, layers in stacked.items():
        out[f"decoder.layers.{target}"] = np.stack([layers[i] for i in sorted(layers)], axis=1)
    return nested(out)


def flax(config: dict, tensors: tiny.Tensors) -> dict:
    out = {}
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "bias":
            out[name] = value
        elif module.endswith("embed_tokens"):
            out[f"{module}.embedding"] = value
        elif value.ndim == 1:
            out[f"{module}.scale"] = value
        else:
            out[f"{module}.kernel"] = value.T
    return nested(out)


TREES = {
    "flax": flax,
    "tunix": tunix,
    "maxtext": lambda c, t: {"params": {"params": maxtext(c, t, False)}, "step": jnp.int32(7)},
    "maxtext_scanned": lambda c, t: {"params": {"params": maxtext(c, t, True)}},
}


@pytest.fixture
def written(tmp_path):
    """A checkpoint in Hugging Face form, and the same in another layout, saved as a trainer saves it."""

    def make(family: str, layout: str) -> tuple[Path, Path]:
        config = CONFIGS[family]
        tensors = tiny.weights(config)
        hf = tiny.write_checkpoint(tmp_path / "hf", config, tensors)
        (hf / "tokenizer.json").write_text(tiny.tokenizer_json())
        run = tmp_path / "run"
        with ocp.CheckpointManager(run / "checkpoints") as manager:
            tree = TREES[layout](config, tensors)
            manager.save(7, args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree)))
            manager.wait_until_finished()
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(hf / name, run / name)
        return hf, run / "checkpoints" / "7"

    return make


@pytest.mark.parametrize("layout", TREES)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_tree_is_the_checkpoint_it_was_made_from(family, layout, written, cli):
    hf, step = written(family, layout)
    cli.ok("hf", hf, "--name", "h")
    assert "o@1 added" in cli.ok("orbax", step, "--name", "o")
    chains = {c["name"]: c for c in json.loads(cli.ok("inspect", "--json"))["chains"]}
    assert chains["o"]["steps"] == chains["h"]["steps"]
    assert chains["o"]["tokenizer"] == chains["h"]["tokenizer"]
    assert cli("verify", "o", "--against", step).code == 0


def test_a_module_of_nnx(cli, tmp_path):
    """What `nnx.state` holds, with its variables, of a module that has transformers' names."""

    class Projections(nnx.Module):
        def __init__(self, **widths: tuple[int, int]):
            for name, (inner, out) in widths.items():
                linear = nnx.Linear(inner, out, use_bias=False, rngs=nnx.Rngs(inner * out))
                setattr(self, name, linear)

    class Layer(nnx.Module):
        def __init__(self):
            self.self_attn = Projections(
                q_proj=(16, 16), k_proj=(16, 8), v_proj=(16, 8), o_proj=(16, 16)
            )
            self.mlp = Projections(gate_proj=(16, 24), up_proj=(16, 24), down_proj=(24, 16))
            self.input_layernorm = nnx.RMSNorm(16, rngs=nnx.Rngs(0))
            self.post_attention_layernorm = nnx.RMSNorm(16, rngs=nnx.Rngs(0))

    class Model(nnx.Module):
        def __init__(self):
            self.embed_tokens = nnx.Embed(32, 16, rngs=nnx.Rngs(0))
            self.layers = nnx.List([Layer(), Layer()])
            self.norm = nnx.RMSNorm(16, rngs=nnx.Rngs(0))
            self.lm_head = nnx.Linear(16, 32, use_bias=False, rngs=nnx.Rngs(1))

    model = Model()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", nnx.state(model))
    (tmp_path / "run" / "config.json").write_text(json.dumps(LLAMA))
    cli.ok("orbax", tmp_path / "run")
    cli.ok("export", "run", "--out", tmp_path / "out")
    from safetensors.numpy import load_file

    found = load_file(tmp_path / "out" / "model.safetensors")
    kernel = model.layers[1].self_attn.k_proj.kernel[...]
    np.testing.assert_array_equal(found["model.layers.1.self_attn.k_proj.weight"], kernel.T)


def test_export_and_back(written, cli, tmp_path):
    hf, _ = written("qwen3", "flax")
    cli.ok("hf", hf, "--name", "h")
    cli.ok("export", "h", "--out", tmp_path / "out", "--format", "orbax")
    assert {"config.json", "tokenizer.json", "_METADATA"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "out")
    assert tree["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"].shape == (16, 24)
    assert "lm_head" not in tree  # tied
    cli.ok("orbax", tmp_path / "out", "--name", "o")
    chains = {c["name"]: c for c in json.loads(cli.ok("inspect", "--json"))["chains"]}
    assert chains["o"]["steps"] == chains["h"]["steps"]
    assert "not empty" in cli("export", "h", "--out", tmp_path / "out", "--format", "orbax").err


def test_refusals(written, cli, tmp_path):
    hf, step = written("llama", "maxtext")
    assert "convert hf" in cli("orbax", hf).err
    assert "convert orbax" in cli("hf", step).err
    run = step.parent.parent
    (run / "config.json").rename(run / "hidden.json")
    assert "config.json" in cli("orbax", step).err
    other = LLAMA | {"intermediate_size": 20}
    (run / "config.json").write_text(json.dumps(other))
    assert "is of another model" in cli("orbax", step).err or "mlp" in cli("orbax", step).err
    fewer = LLAMA | {"num_hidden_layers": 1}
    (run / "config.json").write_text(json.dumps(fewer))
    assert "no counterpart" in cli("orbax", step).err
    more = LLAMA | {"num_hidden_layers": 3}
    (run / "config.json").write_text(json.dumps(more))
    assert "model.layers.2" in cli("orbax", step).err
    (run / "config.json").write_text(json.dumps(LLAMA))
    for file in step.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    result = cli("orbax", step)
    assert result.code == 2
    assert "copy the checkpoint again" in result.err
    assert "Traceback" not in result.err


def test_names_of_nobody(cli, tmp_path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", {"encoder": {"w": np.ones((2, 2), np.float32)}})
    (tmp_path / "run" / "config.json").write_text(json.dumps(LLAMA))
    result = cli("orbax", tmp_path / "run")
    assert result.code == 2
    assert "maxtext" in result.err
    assert "'encoder.w'" in result.err
