"""Checkpoint folders made on the spot, tensor by tensor: bases of random weights and full fine-tunes of them.

All is bfloat16, the dtype in which models are published.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench.models import ModelShape
from checkpoints.safetensors_file import TensorInfo
from checkpoints.source import open_source
from jblock.families import family_for

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NAMES = {BFLOAT16: "BF16", np.dtype(np.float32): "F32"}
_PIECE = 1 << 24  # numbers drawn at a time


def llama_config(shape: ModelShape, dtype: str, max_position: int) -> dict[str, Any]:
    """The config.json of a Llama of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def mixtral_config(shape: ModelShape, experts: int, max_position: int) -> dict[str, Any]:
    """The config.json of a Mixtral whose experts together are as large as the shape's ffn."""
    config = llama_config(shape, "bfloat16", max_position)
    del config["mlp_bias"]
    return config | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": shape.intermediate_size // experts,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a config promises, in the order of the layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for step in family_for(config).plan(config).steps:
        own = step.spec.tensors()
        for name, tensor in step.tensors.items():
            shapes.setdefault(tensor, own[name])
    return shapes


def write_base(folder: Path, config: Mapping[str, Any], seed: int, shards: int = 1) -> Path:
    """Writes a checkpoint of random weights, one tensor in memory at a time; returns its folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = tensor_shapes(config)
    random = np.random.SFC64(seed)
    parts = list(_split(shapes, shards))
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for file, part in zip(files if shards > 1 else ["model.safetensors"], parts, strict=True):
        with (folder / file).open("xb") as f:
            f.write(_header(part, BFLOAT16))
            for shape in part.values():
                for bits in _random_bits(random, int(np.prod(shape))):
                    f.write(_weights(bits, len(shape)).data)
    if shards > 1:
        weight_map = {n: file for file, part in zip(files, parts, strict=True) for n in part}
        size = 2 * sum(int(np.prod(s)) for s in shapes.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_tuned(folder: Path, base: Path, changed: Callable[[str], bool], seed: int) -> Path:
    """Copies a checkpoint, with other weights in the tensors that `changed` says by name.

    Each of their numbers moves by up to three units in its last place (1%), about as far as bfloat16
    fine-tunes do.
    """
    random = np.random.SFC64(seed)

    def move(info: TensorInfo, value: np.ndarray) -> np.ndarray:
        noise = np.concatenate(list(_random_bits(random, value.size)))
        return value.view(np.uint16) ^ (noise & np.uint16(3)).reshape(value.shape)

    return rewrite(folder, base, changed, move)


def rewrite(
    folder: Path,
    base: Path,
    changed: Callable[[str], bool],
    new: Callable[[TensorInfo, np.ndarray], np.ndarray],
) -> Path:
    """Copies a checkpoint, with `new(info, old)` in the place of every tensor that `changed` names.

    Raises:
      ValueError: `changed` names none of them.
    """
    shutil.copytree(base, folder)
    tensors = [t for name, t in open_source(folder).tensors.items() if changed(name)]
    if not tensors:
        raise ValueError(f"{base} has no tensor that is to be changed")
    for info in tensors:
        value = new(info, info.read())
        with info.path.open("r+b") as f:
            f.seek(info.start)
            f.write(np.ascontiguousarray(value).view(np.uint8).data)
    return folder


def write_longer_vocabulary(folder: Path, base: Path, tokens: int, seed: int) -> Path:
    """Copies an untied Llama with so many more rows in its embedding and its head."""
    folder.mkdir(parents=True)
    config = json.loads((base / "config.json").read_text())
    config["vocab_size"] += tokens
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    source, random = open_source(base), np.random.SFC64(seed)
    shapes = tensor_shapes(config)
    with (folder / "model.safetensors").open("xb") as f:
        f.write(_header(shapes, BFLOAT16))
        for name, shape in shapes.items():
            old = source.read(name)
            f.write(old.view(np.uint16).data)
            for bits in _random_bits(random, int(np.prod(shape)) - old.size):
                f.write(_weights(bits, len(shape)).data)
    return folder


def write_lora(
    folder: Path, base: Path, rank: int, modules: tuple[str, ...], seed: int, alpha: float = 16.0
) -> Path:
    """Writes a LoRA adapter for every module of a checkpoint named so.

    It is float32, as PEFT makes and saves adapters of bfloat16 models by itself
    (`autocast_adapter_dtype`).
    """
    folder.mkdir(parents=True)
    random = np.random.Generator(np.random.SFC64(seed))
    tensors: dict[str, np.ndarray] = {}
    for name, info in open_source(base).tensors.items():
        path = name.removesuffix(".weight")
        if path.rsplit(".", 1)[-1] in modules:
            out, inner = info.shape
            tensors[f"base_model.model.{path}.lora_A.weight"] = random.standard_normal(
                (rank, inner), np.float32
            ) / np.float32(inner**0.5)
            tensors[f"base_model.model.{path}.lora_B.weight"] = np.float32(
                0.02
            ) * random.standard_normal((out, rank), np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    with (folder / "adapter_model.safetensors").open("xb") as f:
        f.write(_header({n: t.shape for n, t in tensors.items()}, np.dtype(np.float32)))
        for value in tensors.values():
            f.write(np.ascontiguousarray(value).data)
    return folder


def write_merged(folder: Path, base: Path, adapter: Path) -> Path:
    """Copies a checkpoint with a LoRA adapter added to its weights, in float32, then rounded."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    pairs = open_source(adapter, "adapter_model")
    scale = np.float32(config["lora_alpha"] / config["r"])

    def side(name: str, letter: str) -> str:
        return f"base_model.model.{name.removesuffix('.weight')}.lora_{letter}.weight"

    def merge(info: TensorInfo, value: np.ndarray) -> np.ndarray:
        b, a = (pairs.read(side(info.name, x)) for x in "BA")
        return (value.astype(np.float32) + scale * (b @ a)).astype(BFLOAT16)

    return rewrite(folder, base, lambda name: side(name, "A") in pairs.tensors, merge)


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + int(np.prod(shape)) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _split(
    shapes: Mapping[str, tuple[int, ...]], shards: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors in runs of about as many numbers."""
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    total, done = sum(sizes.values()), 0
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    for name, shape in shapes.items():
        parts[done * shards // total][name] = shape
        done += sizes[name]
    return iter(parts)


def _random_bits(random: np.random.SFC64, count: int) -> Iterator[np.ndarray]:
    """`count` numbers of 16 random bits, in pieces."""
    while count > 0:
        piece = min(count, _PIECE)
        words: Any = random.random_raw(-(-piece // 4))
        yield words.view(np.uint16)[:piece]
        count -= piece


def _weights(bits: np.ndarray, dimensions: int) -> np.ndarray:
    """bfloat16 numbers, as bits: norms of 1 to 1.25, others of either sign and 2**-7 to 2."""
    if dimensions == 1:
        return np.uint16(0x3F80) | (bits & np.uint16(0x1F))
    return np.uint16(0x3C00) | (bits & np.uint16(0x83FF))
