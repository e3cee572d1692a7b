"""Under which names an adapter of PEFT has the modules of its base."""

import dataclasses
from collections.abc import Mapping

from checkpoints.source import Source
from jblock.families import families
from jblock.families.multimodal import OTHER_PREFIXES, TEXT_PREFIXES
from jblock.zoo.records import Chain

PREFIX = "base_model.model."
"""What PEFT puts in front of the names of modules."""


@dataclasses.dataclass
class Module:
    """A module of the checkpoint: number of its step, and tensor in it ("weight", "bias") -> tensor of the
    component."""

    index: int
    tensors: dict[str, str] = dataclasses.field(default_factory=dict)


def modules_of(base: Chain, source: Source) -> dict[str, Module]:
    """Every module of the base by its path in the model that the adapter was trained on."""
    plan = families()[base.family].plan(base.source)
    modules: dict[str, Module] = {}
    for index, step in enumerate(plan.steps):
        for name, taken in step.tensors.items():
            path, _, tensor = taken.rpartition(".")
            if modules.setdefault(path, Module(index)).index == index:
                modules[path].tensors[tensor] = name
    # A tied head is a module of its own that has no tensor in the file.
    for copy in plan.copies:
        modules[copy.rpartition(".")[0]] = Module(len(plan.steps) - 1, {"weight": "weight"})
    # Transformers 5 has GPT-NeoX's head under another name than its checkpoints.
    if _any(source, "lm_head.") and "embed_out" in modules:
        modules["lm_head"] = modules.pop("embed_out")
    return _within_a_wrapper(modules, source)


def of_other_parts(source: Source) -> tuple[str, ...]:
    """Names of the tensors that adapt other parts of a multimodal model, which text does not go through."""
    starts = tuple(PREFIX + start for start in OTHER_PREFIXES)
    return tuple(sorted(name for name in source.tensors if name.startswith(starts)))


def _within_a_wrapper(modules: Mapping[str, Module], source: Source) -> dict[str, Module]:
    """The paths as a multimodal model has them, where the adapter was trained on one and names them so."""
    paths = {path: path for path in modules}
    for wrapped, plain in TEXT_PREFIXES.items():
        if _any(source, wrapped):
            named = {p: f"{p}." for p in modules if f"{p}.".startswith(plain)}
            paths |= {
                p: (wrapped + name.removeprefix(plain)).removesuffix(".")
                for p, name in named.items()
            }
    if all(path == name for path, name in paths.items()):
        return dict(modules)
    return {paths[path]: module for path, module in modules.items()}


def _any(source: Source, start: str) -> bool:
    return any(name.startswith(PREFIX + start) for name in source.tensors)
