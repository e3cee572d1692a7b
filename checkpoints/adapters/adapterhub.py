"""Bottleneck adapters as AdapterHub's library `adapters` saves them.

Its models add a bottleneck behind the attention, the feed-forward, or both, of every layer. With x what such
a part reads and h what it gives, Llama, Mistral and GPT-2 have no norm behind x + h, and the library computes
`f(z) + r (+ x, with original_ln_after)` where z is x + h with original_ln_before, else h, and r is h with
residual_before_ln, else z; a parallel adapter reads x and is added to x + h.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from checkpoints.adapters.adapter_plan import AdapterPlan, PlannedDelta, TensorSource
from checkpoints.errors import CheckpointError
from checkpoints.source import Source
from jblock.blocks.delta_spec import BottleneckSpec
from jblock.blocks.spec import AttentionSpec, ComponentSpec, FfnSpec
from jblock.families import families
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

FAMILIES = ("llama", "mistral", "gpt2")
"""Families whose models the library changes itself; others it only hooks into, each in another way."""
_ACTIVATIONS = {
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "leakyrelu": "leaky_relu",
    "linear": "identity",
}
# What adapter-transformers, before it was `adapters`, called them.
_OLD_ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_orig": "gelu"}
# Fields of the adapter's config that only say how it was made, or how a layer computes that it has not.
_HARMLESS = {
    "adapter_residual_before_ln",  # without ln_after it is the same sum
    "architecture",
    "dropout",
    "factorized_phm_W",
    "factorized_phm_rule",
    "hypercomplex_nonlinearity",
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "learn_phm",
    "phm_bias",
    "phm_c_init",
    "phm_dim",
    "phm_init_range",
    "phm_rank",
    "shared_W_phm",
    "shared_phm_rule",
    "stochastic_depth",
}
_READ = {
    "is_parallel",
    "leave_out",
    "mh_adapter",
    "non_linearity",
    "original_ln_after",
    "original_ln_before",
    "output_adapter",
    "reduction_factor",
    "residual_before_ln",
    "scaling",
}
_PLACES = {"mh_adapter": "attention_adapters", "output_adapter": "output_adapters"}
_NAME = re.compile(r"(?:model\.|transformer\.)?(?:layers|h)\.(\d+)\.(\w+)\.adapters\.(.+)")
_TENSORS = {
    "a": "adapter_down.0.weight",
    "a_bias": "adapter_down.0.bias",
    "b": "adapter_up.weight",
    "b_bias": "adapter_up.bias",
    "scales": "scaling",
}


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is of that library, not of PEFT."""
    return "peft_type" not in config and "config" in config


def plan_bottlenecks(
    zoo: Zoo, base: Chain, config: Mapping[str, Any], source: Source
) -> AdapterPlan:
    """Finds the place of every tensor of an adapter.

    Raises:
      CheckpointError: a config that cannot be served, or a tensor that is missing, has no place in the
        base, or another shape than expected.
    """
    if base.family not in FAMILIES:
        raise CheckpointError(
            f"{base.name} is of family {base.family!r}; bottleneck adapters are served on "
            f"{', '.join(FAMILIES)}"
        )
    options = _options(config)
    left = dict(_by_place(config, source))
    head = {n for n in source.tensors if not _NAME.fullmatch(n)}
    deltas = []
    layers = [step.layer for step in families()[base.family].plan(base.source).steps]
    for index, layer in enumerate(layers):
        spec = zoo.component(base.steps[index].component).spec
        field = {AttentionSpec: "mh_adapter", FfnSpec: "output_adapter"}.get(type(spec))
        if layer is None or field is None:
            continue
        there = options.get(field, False) and layer not in (options.get("leave_out") or ())
        tensors = left.pop((layer, _PLACES[field]), {}) if there else {}
        if there:
            deltas.append(_delta(index, layer, spec, options, config, tensors, source))
    if left:
        (layer, place), tensors = min(left.items())
        raise CheckpointError(
            f"{source.path}: tensor {min(tensors.values())!r} is surplus: by adapter_config.json, on "
            f"{base.name}, layer {layer} has no {place}: one of the two files is of another adapter"
        )
    if not deltas:
        raise CheckpointError(f"{source.path} has no tensors of an adapter: give a trained one")
    return AdapterPlan(deltas=tuple(deltas), replaced=_head(zoo, base, head, source))


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's own part of the config, checked.

    Raises:
      CheckpointError: an option that cannot be served; the message names it.
    """
    options = config["config"]
    if not isinstance(options, dict):
        raise _refuse("config", options, "give the config that the library saved")
    if options.get("architecture") is not None:
        raise _refuse(
            "architecture",
            options["architecture"],
            "of this library only bottlenecks can be served: train it with PEFT",
        )
    for field, value in options.items():
        if value and field not in _HARMLESS | _READ:
            raise _refuse(field, value, "this option cannot be served: train without it")
    if not isinstance(options.get("non_linearity"), str):
        raise _refuse("non_linearity", options.get("non_linearity"), "give a name")
    for field in ("original_ln_before", "original_ln_after", "is_parallel", *_PLACES):
        if not isinstance(options.get(field, False), bool):
            raise _refuse(field, options[field], "give true or false")
    leave_out = options.get("leave_out") or []
    if not isinstance(leave_out, list) or not all(type(i) is int for i in leave_out):
        raise _refuse("leave_out", leave_out, "give a list of numbers of layers")
    return options


def _delta(
    index: int,
    layer: int,
    spec: ComponentSpec,
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, str],
    source: Source,
) -> PlannedDelta:
    """The bottleneck behind one component; `tensors`: last part of a name -> the whole name."""
    hidden = spec.hidden_size
    scaling = options.get("scaling", 1.0)
    scales = {"learned": 1, "channel": hidden}.get(scaling, 0) if isinstance(scaling, str) else 0
    if not scales and (isinstance(scaling, (str, bool)) or not isinstance(scaling, (int, float))):
        raise _refuse("scaling", scaling, "give a number, 'learned' or 'channel'")
    bottleneck = BottleneckSpec(
        rank=_rank(options, layer, hidden),
        activation=_activation(options, config),
        reads=_reads(options),
        scale=1.0 if scales else _number("scaling", scaling),
        scales=scales,
    )
    taken = {}
    for part, shape in bottleneck.tensors(spec).items():
        name = tensors.get(_TENSORS[part])
        if name is None:
            raise CheckpointError(
                f"{source.path}: {_TENSORS[part]!r} of layer {layer} is missing: give the whole adapter"
            )
        if source.tensors[name].shape != shape:
            raise CheckpointError(
                f"{source.path}: tensor {name!r} has shape {list(source.tensors[name].shape)}, expected "
                f"{list(shape)} (rank {bottleneck.rank} by reduction_factor): the adapter is for another "
                "base, or its config does not belong to it"
            )
        taken[part] = TensorSource(name)
    surplus = sorted(set(tensors) - {_TENSORS[part] for part in taken})
    if surplus:
        raise CheckpointError(
            f"{source.path}: tensor {tensors[surplus[0]]!r} is surplus: its config does not belong to it"
        )
    return PlannedDelta(index=index, spec=bottleneck, tensors=taken)


def _reads(options: Mapping[str, Any]) -> str:
    """What the bottleneck reads, where all in all x + h comes out beside what it adds."""
    before, after = (
        options.get(f"original_ln_{p}", d) for p, d in (("before", False), ("after", True))
    )
    if options.get("is_parallel"):
        if not after:
            raise _refuse("original_ln_after", after, "x itself would be lost: train with it")
        return "input"
    keeps_output = options.get("residual_before_ln", True)
    if not isinstance(keeps_output, bool):
        raise _refuse("residual_before_ln", keeps_output, "give true or false")
    # Whether r has x already; then it must not be added again, else it must.
    if after == (before and not keeps_output):
        raise _refuse(
            "original_ln_after",
            after,
            f"with original_ln_before {before} and residual_before_ln {keeps_output} what the layer read "
            "is added not once: train it otherwise",
        )
    return "sum" if before else "output"


def _rank(options: Mapping[str, Any], layer: int, hidden: int) -> int:
    factor = options.get("reduction_factor")
    if isinstance(factor, dict):
        factor = factor.get(str(layer), factor.get("default"))
    number = _number("reduction_factor", factor)
    if number <= 0 or hidden / number > 65536:
        raise _refuse("reduction_factor", factor, "give a number over 0")
    return max(1, int(hidden // number))


def _activation(options: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    given = options["non_linearity"].lower()
    known = _ACTIVATIONS if "version" in config else _ACTIVATIONS | _OLD_ACTIVATIONS
    if given not in known:
        raise _refuse("non_linearity", given, f"known: {', '.join(sorted(known))}")
    return known[given]


def _by_place(config: Mapping[str, Any], source: Source) -> dict[tuple[int, str], dict[str, str]]:
    """(layer, place) -> last part of a tensor's name -> its name."""
    name = config.get("name")
    if not isinstance(name, str) or not name:
        raise _refuse("name", name, "give the name that its tensors have it under")
    places: dict[tuple[int, str], dict[str, str]] = {}
    for tensor in source.tensors:
        match = _NAME.fullmatch(tensor)
        if match is None:
            continue
        layer, place, rest = match.groups()
        if not rest.startswith(f"{name}."):
            raise CheckpointError(
                f"{source.path}: tensor {tensor!r} is not of adapter {name!r}, which "
                "adapter_config.json names"
            )
        places.setdefault((int(layer), place), {})[rest.removeprefix(f"{name}.")] = tensor
    return places


def _head(zoo: Zoo, base: Chain, names: set[str], source: Source) -> dict[int, dict[str, str]]:
    """A head that was saved with the adapter: the last step's weight."""
    if not names:
        return {}
    last = len(base.steps) - 1
    spec = zoo.component(base.steps[last].component).spec
    wanted = {"lm_head.weight": spec.tensors()["weight"]}
    for name in sorted(names):
        if source.tensors[name].shape != wanted.get(name):
            raise CheckpointError(
                f"{source.path}: tensor {name!r} fits nothing in {base.name}: save the adapter with "
                "with_head=False, or give the base it was made for"
            )
    return {last: {"weight": "lm_head.weight"}}


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(field, value, "give a number")
    if not math.isfinite(value) or abs(value) > 3.4e38:
        raise _refuse(field, value, "give a number that float32 holds")
    return float(value)


def _refuse(field: str, value: Any, remedy: str) -> CheckpointError:
    return CheckpointError(f"adapter_config.json: {field} is {value!r}: {remedy}")
