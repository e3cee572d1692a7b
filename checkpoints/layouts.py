"""The ways one model's tensors are named and laid out in files, brought to the one its family describes.

A plan says under which names a family is published. Files differ from that in ways that change no number:
without the name of the inner model in front, with only one of two tied tensors, with the experts of a layer
in one tensor. What is stored is the same, so the copies of a model in two layouts share their components.
"""

import dataclasses
import re

from checkpoints.errors import CheckpointError
from checkpoints.safetensors_file import TensorInfo
from checkpoints.source import Source
from jblock.families import Plan, PlannedStep

_EXPERT = re.compile(r"(.*layers\.\d+\.)\w+\.experts\.(\d+)\.")


def fit(plan: Plan, source: Source) -> tuple[Plan, Source]:
    """The plan with the names that a checkpoint has, and the checkpoint with the tensors that it names.

    Raises:
      CheckpointError: experts in one tensor of another shape.
    """
    plan = _with_tied_head(plan.fitting(source.tensors), source)
    return _with_fused_experts(plan, source)


def _with_tied_head(plan: Plan, source: Source) -> Plan:
    """Takes the head's tensor for the embedding's too where the file has only that."""
    other = {kept: copy for copy, kept in plan.copies.items()}
    lone = {k: c for k, c in other.items() if k not in source.tensors and c in source.tensors}
    if not lone:
        return plan
    steps = tuple(
        dataclasses.replace(s, tensors={n: lone.get(of, of) for n, of in s.tensors.items()})
        for s in plan.steps
    )
    return dataclasses.replace(plan, steps=steps, copies={})


def _with_fused_experts(plan: Plan, source: Source) -> tuple[Plan, Source]:
    """Cuts the tensors that hold all experts of a layer, as transformers computes with them:
    gate_up_proj [experts, 2 x intermediate, hidden] and down_proj [experts, hidden, intermediate]."""
    layers: dict[str, dict[int, PlannedStep]] = {}
    for step in plan.steps:
        for name in step.tensors.values():
            found = _EXPERT.match(name)
            if found and name not in source.tensors:
                layers.setdefault(found[1], {})[int(found[2])] = step
    tensors = dict(source.tensors)
    names: dict[str, str] = {}
    for layer, experts in layers.items():
        both = tensors.get(f"{layer}mlp.experts.gate_up_proj")
        down = tensors.get(f"{layer}mlp.experts.down_proj")
        if both is None or down is None or sorted(experts) != list(range(len(experts))):
            continue
        hidden, width = (getattr(experts[0].spec, f) for f in ("hidden_size", "intermediate_size"))
        shapes = (len(experts), 2 * width, hidden), (len(experts), hidden, width)
        for whole, shape in zip((both, down), shapes, strict=True):
            if whole.shape != shape:
                raise CheckpointError(
                    f"{source.path}: {whole.name!r} has shape {list(whole.shape)}, config.json makes it "
                    f"{list(shape)}: save the model with transformers' save_original_format=True"
                )
        del tensors[both.name], tensors[down.name]
        for e, step in experts.items():
            parts = {
                "gate.weight": (both, 2 * e * width, width, hidden),
                "up.weight": (both, (2 * e + 1) * width, width, hidden),
                "down.weight": (down, e * hidden, hidden, width),
            }
            for part, cut in parts.items():
                tensors[step.tensors[part]] = _rows(step.tensors[part], *cut)
        names |= _router_names(plan, layer, source)
    if len(tensors) == len(source.tensors) and not names:
        return plan, source
    steps = tuple(
        dataclasses.replace(s, tensors={n: names.get(of, of) for n, of in s.tensors.items()})
        for s in plan.steps
    )
    return dataclasses.replace(plan, steps=steps), dataclasses.replace(source, tensors=tensors)


def _router_names(plan: Plan, layer: str, source: Source) -> dict[str, str]:
    """The router's name in the plan -> its name beside fused experts, where the two differ."""
    fused = f"{layer}mlp.gate.weight"
    wanted = (
        s.tensors["router.weight"]
        for s in plan.steps
        if s.spec.kind == "router" and s.tensors["router.weight"].startswith(layer)
    )
    return {w: fused for w in wanted if w not in source.tensors and fused in source.tensors}


def _rows(name: str, whole: TensorInfo, first: int, rows: int, columns: int) -> TensorInfo:
    """Rows of a tensor seen as a matrix of `columns` columns, as a tensor of its own."""
    size = columns * whole.dtype.itemsize
    start = whole.start + first * size
    return TensorInfo(
        name=name,
        path=whole.path,
        dtype=whole.dtype,
        shape=(rows, columns),
        start=start,
        end=start + rows * size,
    )
