"""Adapters in the forms they come in: PEFT's, and AdapterHub's, whose library is called `adapters`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.adapters.adapter_plan import AdapterPlan, check_stack
from checkpoints.adapters.adapterhub import is_adapterhub, plan_bottlenecks
from checkpoints.adapters.peft_config import read_settings
from checkpoints.adapters.peft_plan import plan_peft
from checkpoints.errors import CheckpointError
from checkpoints.folders import ADAPTER_CONFIG, expect_adapter
from checkpoints.source import Source, open_source, read_json
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

SMALL_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors.index.json",
    "head_config.json",
)
"""What an adapter's folder may hold beside tensors and tokenizer."""
_HEAD = "model_head"
_SAVE = "adapters: save_adapter(..., use_safetensors=True)"


def open_adapter(path: Path) -> tuple[dict[str, Any], Source]:
    """The adapter_config.json of a folder, and its tensors: those of a head saved with it too.

    Raises:
      CheckpointError: a file is missing, pickled or malformed.
    """
    expect_adapter(path)
    config = read_json(path / ADAPTER_CONFIG)
    if not is_adapterhub(config):
        return config, open_source(path, "adapter_model")
    source = open_source(path, "adapter", _SAVE)
    if (path / f"{_HEAD}.safetensors").exists():
        head = open_source(path, _HEAD, _SAVE)
        twice = sorted(head.tensors.keys() & source.tensors.keys())
        if twice:
            raise CheckpointError(f"{path}: tensor {twice[0]!r} is in more than one file")
        source = dataclasses.replace(
            source, tensors=source.tensors | head.tensors, headers=source.headers | head.headers
        )
    elif (path / "head_config.json").exists():
        raise CheckpointError(
            f"{path} has a head_config.json but no {_HEAD}.safetensors: save it again ({_SAVE}), or "
            "with_head=False where the head was not trained"
        )
    return config, source


def base_named_by(config: Mapping[str, Any]) -> str:
    """The model that an adapter_config.json says it is for; "" where it does not."""
    field = "model_name" if is_adapterhub(config) else "base_model_name_or_path"
    named = config.get(field)
    if named is not None and not isinstance(named, str):
        raise CheckpointError(f"adapter_config.json: {field} is {named!r}: give a str")
    return named or ""


def plan_adapter(zoo: Zoo, base: Chain, config: Mapping[str, Any], source: Source) -> AdapterPlan:
    """Finds the place of every tensor of an adapter.

    Raises:
      CheckpointError: a config that cannot be served, or a tensor that has no place in the base, has
        another shape or rank than expected, or is missing.
    """
    if is_adapterhub(config):
        planned = plan_bottlenecks(zoo, base, config, source)
    else:
        planned = plan_peft(zoo, base, read_settings(config), source)
    check_stack(zoo, base, planned)
    return planned
