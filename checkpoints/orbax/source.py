"""An orbax checkpoint of a JAX trainer as the Hugging Face checkpoint it stands for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.checkpoint import Checkpoint, understood
from checkpoints.errors import CheckpointError
from checkpoints.made import MadeSource, MadeTensor
from checkpoints.orbax.layouts import LAYOUTS, Layout, Place
from checkpoints.orbax.tree import Leaf, read_tree, stamp
from checkpoints.source import read_json
from checkpoints.tokenizer import read_tokenizer
from jblock.families import Plan, family_for
from jblock.zoo.ids import FLOATS

_ABOVE = 4  # folders above the checkpoint in which config.json is looked for
_WRAPPERS = ("params", "model", "state", "base", "items")
_SMALL = ("config.json", "generation_config.json")


def open_orbax(path: Path) -> Checkpoint:
    """Opens an orbax checkpoint: reads its description, and the config.json beside it.

    Raises:
      CheckpointError: damaged, no config.json, or arrays in none of the layouts of `layouts.py`.
      ConfigError, SpecError: see `errors.BAD_INPUT`.
    """
    folder = _config_folder(path)
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json", required=False)
    plan = family_for(config).plan(config)
    leaves = _named(read_tree(path))
    tensors = _tensors(path, plan, config, leaves)
    small = {n: (folder / n).read_bytes() for n in _SMALL if (folder / n).is_file()}
    source = MadeSource.of(path, tensors, stamp(path) + json.dumps(config, sort_keys=True), small)
    return understood(path, config, generation, source, read_tokenizer(folder))


def _config_folder(path: Path) -> Path:
    start = path.resolve()
    for folder in (start, *list(start.parents)[:_ABOVE]):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{path} has no config.json, in it or up to {_ABOVE} folders above: put that of the model it was "
        "tuned from there, with its tokenizer files"
    )


def _named(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The arrays by their names without what trainers and Flax put around: params, value."""
    out = {}
    for name, leaf in leaves.items():
        keys = name.split(".")
        if keys[-1] in ("value", "raw_value"):
            keys.pop()
        out[".".join(keys)] = leaf
    return out


def _tensors(
    path: Path, plan: Plan, config: Mapping[str, Any], leaves: Mapping[str, Leaf]
) -> dict[str, MadeTensor]:
    """Every tensor of the plan, from the layout and below the prefix that has the embedding."""
    wanted = {
        source: step.spec.tensors()[name]
        for step in plan.steps
        for name, source in step.tensors.items()
    }
    embedding = plan.steps[0].tensors["weight"]
    for layout in LAYOUTS.values():
        prefix = _prefix(layout, embedding, config, leaves)
        if prefix is not None:
            break
    else:
        some = ", ".join(repr(n) for n in sorted(leaves)[:4])
        raise CheckpointError(
            f"{path}: its arrays ({some}, ...) are in none of the layouts {', '.join(LAYOUTS)}, which "
            "docs/converting.md describes: save them as one of these"
        )
    under = {n.removeprefix(prefix): leaf for n, leaf in leaves.items() if n.startswith(prefix)}
    out: dict[str, MadeTensor] = {}
    used = set()
    for name, shape in wanted.items():
        found = _find(layout, name, config, under)
        if found is not None:
            place, leaf = found
            used.add(leaf.name)
            out[name] = _made(path, name, shape, place, leaf)
    left = sorted(leaf.name for leaf in under.values() if leaf.name not in used)
    # A lm_head that the config ties is compared with the embedding, as in any checkpoint.
    for copy, original in plan.copies.items():
        found = _find(layout, copy, config, under)
        if found is not None:
            out[copy] = _made(path, copy, wanted[original], *found)
            left = [n for n in left if n != found[1].name]
    if left:
        raise CheckpointError(
            f"{path}: {len(left)} arrays have no counterpart in the model of config.json: "
            f"{', '.join(map(repr, left[:4]))}: it is of another model, or holds what is not known"
        )
    return out


def _prefix(
    layout: Layout, name: str, config: Mapping[str, Any], leaves: Mapping[str, Leaf]
) -> str | None:
    """What stands in front of this layout's names, "" or wrappers such as "params.params."."""
    for place in layout(name, config):
        for wanted in place.names:
            for held in leaves:
                prefix = held.removesuffix(wanted)
                if held.endswith(wanted) and all(p in _WRAPPERS for p in prefix.split(".") if p):
                    return prefix
    return None


def _find(
    layout: Layout, name: str, config: Mapping[str, Any], leaves: Mapping[str, Leaf]
) -> tuple[Place, Leaf] | None:
    for place in layout(name, config):
        for wanted in place.names:
            if wanted in leaves:
                return place, leaves[wanted]
    return None


def _made(path: Path, name: str, shape: tuple[int, ...], place: Place, leaf: Leaf) -> MadeTensor:
    if leaf.dtype.name not in FLOATS:
        raise CheckpointError(
            f"{path}: {leaf.name!r} is {leaf.dtype.name}; weights are served in {', '.join(FLOATS)}: cast "
            "them when saving"
        )

    def make() -> np.ndarray:
        value = leaf.read() if place.layer is None else leaf.read(1, place.layer)
        try:
            made = place.change(value, shape)
        except ValueError:
            made = value
        if made.shape != shape:
            raise CheckpointError(
                f"{path}: {leaf.name!r} has shape {list(leaf.shape)}, config.json makes {name} "
                f"{list(shape)}: one of the two is of another model"
            )
        return made

    return MadeTensor.of(name, path, leaf.dtype, shape, make)
