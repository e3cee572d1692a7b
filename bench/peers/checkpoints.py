"""Models made on the spot, written as other engines read them: Hugging Face and PEFT folders."""

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from bench.checkpoints import llama_config
from bench.models import MemoryZoo
from jblock.families import family_for

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def write_model(zoo: MemoryZoo, name: str, folder: Path, dtype: str, max_position: int) -> Path:
    """Writes a chain of a zoo in memory as a Llama checkpoint of `dtype`; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(zoo.shape, dtype, max_position)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False} | ids))
    tensors: dict[str, np.ndarray] = {}
    planned_steps = family_for(config).plan(config).steps
    for step, planned in zip(zoo.served[name].steps, planned_steps, strict=True):
        if not zoo.component(step.component).refs:
            for tensor, value in zoo.load_component(step.component).items():
                tensors[planned.tensors[tensor]] = _stored(value, dtype)
    _save(tensors, folder / "model.safetensors")
    return folder


def write_adapter(zoo: MemoryZoo, name: str, base: Path, folder: Path, dtype: str) -> Path:
    """Writes the LoRA deltas of a chain of a zoo in memory as a PEFT adapter; returns its folder.

    `base` is what `write_model` wrote of the chain it adapts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads((base / "config.json").read_text())
    planned_steps = family_for(model).plan(model).steps
    tensors: dict[str, np.ndarray] = {}
    ranks, scales, targets = set(), set(), set()
    for step, planned in zip(zoo.served[name].steps, planned_steps, strict=True):
        for delta in step.deltas:
            values = zoo.load_delta(delta)
            for target, width in zoo.delta(delta).spec.targets.items():
                path = planned.tensors[f"{target}.weight"].removesuffix(".weight")
                ranks.add(width.rank)
                scales.add(width.scale)
                targets.add(path.rsplit(".", 1)[1])
                for side in "ab":
                    key = f"base_model.model.{path}.lora_{side.upper()}.weight"
                    tensors[key] = _stored(values[f"{target}.{side}"], dtype)
    if len(ranks) != 1 or len(scales) != 1:
        raise ValueError(f"{name!r} has ranks {ranks} and scales {scales}; one of each is written")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": ranks.pop(),
        "lora_alpha": 0.0,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    config["lora_alpha"] = scales.pop() * config["r"]
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    _save(tensors, folder / "adapter_model.safetensors")
    return folder


def _stored(value: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(value.astype(_DTYPES[dtype]))


def _save(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
