"""Tiny checkpoints and adapters on disk, as transformers and peft write them, without torch."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jblock.families import family_for

DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "uint8": "U8",
    "bool": "BOOL",
}
LAYERS = 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "base_model_name_or_path": "base",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
# What each module of CONFIG's layers takes and gives.
WIDTHS = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (16, 8),
    "self_attn.v_proj": (16, 8),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (16, 24),
    "mlp.up_proj": (16, 24),
    "mlp.down_proj": (24, 16),
}

Tensors = dict[str, np.ndarray]


def weights(config: Mapping[str, Any], seed: int = 0, dtype: Any = np.float32) -> Tensors:
    """Random tensors under the names and shapes that a config promises."""
    rng = np.random.default_rng(seed)
    out = {}
    for step in family_for(config).plan(config).steps:
        shapes = step.spec.tensors()
        for name, source in step.tensors.items():
            out.setdefault(source, rng.standard_normal(shapes[name]).astype(dtype))
    return out


def adapter_weights(seed: int = 0, rank: int = 4, layers: int = LAYERS) -> Tensors:
    """Random LoRA tensors for ADAPTER's target modules."""
    rng = np.random.default_rng(seed)
    out = {}
    for i in range(layers):
        for module, (inner, width) in WIDTHS.items():
            if module.rsplit(".", 1)[-1] in ADAPTER["target_modules"]:
                name = f"base_model.model.model.layers.{i}.{module}"
                out[f"{name}.lora_A.weight"] = rng.standard_normal((rank, inner)).astype("f4")
                out[f"{name}.lora_B.weight"] = rng.standard_normal((width, rank)).astype("f4")
    return out


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the format byte by byte, so that tests do not lean on the library they replace."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in tensors.items():
        raw = np.ascontiguousarray(value).tobytes()
        header[name] = {
            "dtype": DTYPES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def write_checkpoint(
    path: Path,
    config: Mapping[str, Any] = CONFIG,
    tensors: Tensors | None = None,
    shards: int = 1,
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """A checkpoint folder; returns it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    tensors = weights(config) if tensors is None else tensors
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors)
        return path
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        weight_map |= dict.fromkeys(part, file)
        write_safetensors(path / file, part)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_adapter(
    path: Path, config: Mapping[str, Any] = ADAPTER, tensors: Tensors | None = None
) -> Path:
    """An adapter folder; returns it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = adapter_weights() if tensors is None else tensors
    write_safetensors(path / "adapter_model.safetensors", tensors)
    return path


def tokenizer_json(size: int = 32) -> str:
    """The smallest tokenizer.json that loads: one word an id."""
    vocab = {f"w{i}": i for i in range(size)}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
        }
    )


def files_of(root: Path) -> dict[str, bytes]:
    """Every file under a folder with its bytes: what "unchanged" is checked by.

    Without `locks`, where the turns of those who publish are counted.
    """
    files = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}
    return {n: p.read_bytes() for n, p in files.items() if not n.startswith("locks/")}


BFLOAT16 = ml_dtypes.bfloat16
