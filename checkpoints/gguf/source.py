"""A GGUF file as the Hugging Face checkpoint it stands for, dequantized tensor by tensor when read."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.checkpoint import Checkpoint, understood
from checkpoints.errors import CheckpointError
from checkpoints.gguf import tensors
from checkpoints.gguf.config import Fields, config
from checkpoints.gguf.file import GgufFile, GgufTensor, read_gguf
from checkpoints.gguf.tokenizer import tokenizer
from checkpoints.made import MadeSource, MadeTensor
from checkpoints.tokenizer import from_files
from checkpoints.tokenizer_fields import Beside
from jblock.families import family_for

_ROPE_FACTORS = "rope_freqs.weight"
_EMBEDDING = "token_embd.weight"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file, or the first of several parts: reads its header only.

    F32, F16 and BF16 tensors are taken as they are; quantized ones become the float32 values they stand for.

    Raises:
      CheckpointError: malformed, not a model, or something in it that is not served.
      ConfigError, SpecError: its metadata describe no model that is served.
    """
    file = _whole(path)
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(
            f"{path}: general.type is {kind!r}, expected 'model': "
            + (
                "take the adapter in PEFT's form and use 'jblock convert peft'"
                if kind == "adapter"
                else "give the file of the language model itself"
            )
        )
    fields = Fields(file.metadata, path)
    embedding = file.tensors.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path} has no {_EMBEDDING}: it holds no whole model")
    factors = file.tensors.get(_ROPE_FACTORS)
    made = config(
        fields,
        embedding.shape[0],
        frozenset(file.tensors),
        None if factors is None else tensors.read(factors),
    )
    found = tokenizer(file.metadata, fields.architecture, path)
    generation: dict[str, Any] = {
        name: file.metadata[f"general.sampling.{key}"]
        for key, name in _SAMPLING.items()
        if f"general.sampling.{key}" in file.metadata
    }
    if generation:
        generation["do_sample"] = True
    if found is not None:
        ends = [i for i in found.eos if i < embedding.shape[0]]
        made["eos_token_id"] = generation["eos_token_id"] = ends if len(ends) != 1 else ends[0]
        made["bos_token_id"] = generation["bos_token_id"] = found.bos
    small = {
        "config.json": json.dumps(made, indent=2).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }
    return understood(
        path,
        made,
        generation,
        _source(path, file, fields.architecture, made, small),
        None if found is None else from_files(found.files, path, Beside()),
        license=_text(file.metadata.get("general.license")),
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _whole(path: Path) -> GgufFile:
    """The file, or all parts of the one that is split as llama.cpp's gguf-split splits.

    Raises:
      CheckpointError: a part is missing, or not the first was given.
    """
    first = read_gguf(path)
    count = first.metadata.get("split.count", 1)
    if count in (0, 1):
        return first
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count or int(match[2]) != 1:
        raise CheckpointError(
            f"{path} is one of {count} parts: give the first, named as it was published "
            f"(...-00001-of-{count:05}.gguf), with the others beside it"
        )
    tensors = dict(first.tensors)
    for i in range(2, count + 1):
        part = read_gguf(path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf"))
        twice = sorted(part.tensors.keys() & tensors.keys())
        if twice or part.metadata.get("split.no") != i - 1:
            raise CheckpointError(f"{part.path} is not part {i} of {path}: download it again")
        tensors |= part.tensors
    return dataclasses.replace(first, tensors=tensors)


def _source(
    path: Path, file: GgufFile, architecture: str, made: dict[str, Any], small: dict[str, bytes]
) -> MadeSource:
    """The tensors under the names transformers gives them; those without one under their own."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(a for a, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, made["num_hidden_layers"])
    plan = family_for(made).plan(made)
    out: dict[str, MadeTensor] = {}
    left = dict(file.tensors)
    left.pop(_ROPE_FACTORS, None)
    for step in plan.steps:
        for name in step.tensors.values():
            module, _, suffix = name.rpartition(".")
            tensor = left.pop(f"{names.get_name(module)}.{suffix}", None)
            if tensor is not None:
                out[name] = _made(name, tensor, architecture, made)
    out |= {name: _made(name, tensor, "", made) for name, tensor in left.items()}
    stamps = []
    for part in sorted({t.path for t in file.tensors.values()}):
        stat = part.stat()
        stamps.append([str(part.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    return MadeSource.of(path, out, json.dumps(stamps), small)


def _made(name: str, tensor: GgufTensor, architecture: str, made: dict[str, Any]) -> MadeTensor:
    change: Callable[[np.ndarray], np.ndarray] | None = None
    if architecture == "llama" and ".self_attn.q_proj." in name:
        change = lambda w: tensors.unpermuted(w, made["num_attention_heads"])
    elif architecture == "llama" and ".self_attn.k_proj." in name:
        change = lambda w: tensors.unpermuted(w, made["num_key_value_heads"])
    elif architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        # llama.cpp's converter adds the 1 that these norms add to their weight.
        change = lambda w: w - np.asarray(1, w.dtype)

    def make() -> np.ndarray:
        value = tensors.read(tensor)
        return value if change is None else change(value)

    return MadeTensor.of(name, tensor.path, tensors.dtype(tensor), tensor.shape, make)
