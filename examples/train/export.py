"""Reads and writes checkpoints: Hugging Face models, PEFT adapters, the tokenizer."""

import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tokenizers
from safetensors import numpy as safetensors_numpy

from examples.train import data, family
from examples.train import model as llama

PEFT_PREFIX = "base_model.model."  # what peft puts before a module's name in the wrapped model
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def round_to_bf16(params: Mapping[str, jax.Array]) -> llama.Params:
    """The float32 values that survive storage in bfloat16."""
    return {name: value.astype(jnp.bfloat16).astype(jnp.float32) for name, value in params.items()}


def _write_json(path: pathlib.Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_tensors(path: pathlib.Path, params: Mapping[str, jax.Array]) -> None:
    arrays = {
        name: np.ascontiguousarray(np.asarray(params[name]).astype(ml_dtypes.bfloat16))
        for name in sorted(params)
    }
    path.write_bytes(safetensors_numpy.save(arrays, metadata={"format": "pt"}))


def write_tokenizer(
    folder: pathlib.Path, tokenizer: tokenizers.Tokenizer, max_positions: int
) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    special = {"bos_token": data.BOS, "eos_token": data.EOS, "pad_token": data.PAD}
    _write_json(folder / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", special | settings)


def write_model(
    folder: pathlib.Path,
    config: llama.Config,
    params: Mapping[str, jax.Array],
    tokenizer: tokenizers.Tokenizer,
) -> None:
    """Writes a model directory in Hugging Face format, weights in bfloat16."""
    write_tokenizer(folder, tokenizer, config.max_positions)
    ids = {"bos_token_id": data.BOS_ID, "eos_token_id": data.EOS_ID, "pad_token_id": data.PAD_ID}
    dimensions = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied,
        "torch_dtype": "bfloat16",
    }
    _write_json(folder / "config.json", dimensions | ids)
    _write_json(folder / "generation_config.json", {"do_sample": False} | ids)
    _write_tensors(folder / "model.safetensors", params)


def write_adapter(
    folder: pathlib.Path, tune: family.FineTune, params: Mapping[str, jax.Array]
) -> None:
    """Writes a LoRA adapter as peft does: `(r, in)` A and `(out, r)` B a module, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": tune.base,
        "r": tune.rank,
        "lora_alpha": tune.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(tune.modules),
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
    }
    _write_json(folder / "adapter_config.json", settings)
    _write_tensors(
        folder / "adapter_model.safetensors",
        {PEFT_PREFIX + name: value for name, value in params.items()},
    )


def _read_tensors(path: pathlib.Path) -> llama.Params:
    return {
        name: jnp.asarray(value).astype(jnp.float32)
        for name, value in safetensors_numpy.load_file(path).items()
    }


def read_model(folder: pathlib.Path) -> llama.Params:
    """Float32 parameters of a model directory."""
    return _read_tensors(folder / "model.safetensors")


def read_adapter(folder: pathlib.Path) -> llama.Params:
    """Float32 LoRA parameters of an adapter directory, under the base's module names."""
    tensors = _read_tensors(folder / "adapter_model.safetensors")
    return {name.removeprefix(PEFT_PREFIX): value for name, value in tensors.items()}


def read_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer of a model directory."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
