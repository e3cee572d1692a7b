"""What people make of a model: kinds of fine-tunes, written as they are published, for `bench zoo`."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

from bench import checkpoints
from jblock.blocks.quant_spec import QuantSpec

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RANKS = (8, 16, 32)
EXPERTS = 8
NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What was written of one fine-tune.

    Attributes:
      model: folder of a full checkpoint; None where the base itself is meant.
      adapter: folder of an adapter on it, or None.
    """

    model: Path | None
    adapter: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to make a model of one's own.

    Attributes:
      name: for the table.
      slug: for names of models and folders.
      make: folder to make, folder of the base, seed -> what was written.
      mixture: the base is a mixture of experts.
      quantize: what is served is a copy in few bits.
    """

    name: str
    slug: str
    make: Callable[[Path, Path, int], Made]
    mixture: bool = False
    quantize: QuantSpec | None = None


def _layers_of(base: Path) -> int:
    return int(json.loads((base / "config.json").read_text())["num_hidden_layers"])


def _layer(name: str) -> int | None:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _above(frozen: int, name: str, head: bool) -> bool:
    layer = _layer(name)
    if layer is None:
        return head and not name.startswith("model.embed_tokens")
    return layer >= frozen


def _tuned(changed: Callable[[str, int], bool]) -> Callable[[Path, Path, int], Made]:
    """A full checkpoint; `changed` says of a tensor's name and the number of layers."""

    def make(folder: Path, base: Path, seed: int) -> Made:
        layers = _layers_of(base)
        path = folder / "model"
        return Made(model=checkpoints.write_tuned(path, base, lambda n: changed(n, layers), seed))

    return make


def _experts(trained: int) -> Callable[[Path, Path, int], Made]:
    """The experts alone; `trained` of them in each layer, others in every layer."""

    def make(folder: Path, base: Path, seed: int) -> Made:
        def changed(name: str) -> bool:
            expert = re.search(r"\.experts\.(\d+)\.", name)
            layer = _layer(name) or 0
            return expert is not None and (int(expert[1]) - 3 * layer - seed) % EXPERTS < trained

        return Made(model=checkpoints.write_tuned(folder / "model", base, changed, seed))

    return make


def _adapter(folder: Path, base: Path, seed: int) -> Path:
    rank = RANKS[seed % len(RANKS)]
    return checkpoints.write_lora(folder / "adapter", base, rank, ATTENTION, seed)


def _lora(folder: Path, base: Path, seed: int) -> Made:
    return Made(model=None, adapter=_adapter(folder, base, seed))


def _merged(folder: Path, base: Path, seed: int) -> Made:
    adapter = _adapter(folder, base, seed)
    return Made(model=checkpoints.write_merged(folder / "model", base, adapter))


def _on_a_tune(folder: Path, base: Path, seed: int) -> Made:
    model = _tuned(_in_last_two)(folder, base, seed).model
    return Made(model=model, adapter=_adapter(folder, model or base, seed))


def _longer(folder: Path, base: Path, seed: int) -> Made:
    return Made(model=checkpoints.write_longer_vocabulary(folder / "model", base, NEW_TOKENS, seed))


def _base(folder: Path, base: Path, seed: int) -> Made:
    return Made(model=None)


def _in_last_two(name: str, layers: int) -> bool:
    return _above(layers - 2, name, head=False)


LORA = Kind(name="LoRA on q, k, v, o", slug="lora", make=_lora)
BITFIT = Kind(
    name="BitFit: biases and norms (a Llama has norms only)",
    slug="bitfit",
    make=_tuned(lambda name, layers: "norm" in name),
)
LAST_LAYERS = Kind(
    name="last 2 layers only",
    slug="last2",
    make=_tuned(_in_last_two),
)
FROZEN_LOWER = Kind(
    name="lower 2/3 frozen: the upper layers, norm and head trained",
    slug="upper",
    make=_tuned(lambda name, layers: _above(layers * 2 // 3, name, head=True)),
)
ATTENTION_ONLY = Kind(
    name="attention only (q, k, v, o)",
    slug="attention",
    make=_tuned(lambda name, layers: name.split(".")[-2] in ATTENTION),
)
FULL = Kind(
    name="continued pretraining: everything", slug="full", make=_tuned(lambda name, layers: True)
)
EXPERTS_ONLY = Kind(
    name=f"mixture of {EXPERTS} experts: all experts, nothing else",
    slug="experts",
    make=_experts(EXPERTS),
    mixture=True,
)

TENANTS: tuple[tuple[Kind, int], ...] = (
    (LORA, 24),
    (BITFIT, 8),
    (LAST_LAYERS, 16),
    (FROZEN_LOWER, 8),
    (ATTENTION_ONLY, 4),
    (FULL, 2),
    (EXPERTS_ONLY, 2),
)
"""The 64 tenants of `bench zoo`."""

SITUATIONS: tuple[Kind, ...] = (
    FROZEN_LOWER,
    LAST_LAYERS,
    ATTENTION_ONLY,
    BITFIT,
    LORA,
    EXPERTS_ONLY,
    Kind(
        name=f"mixture of {EXPERTS} experts: 2 experts of each layer",
        slug="experts2",
        make=_experts(2),
        mixture=True,
    ),
    FULL,
    Kind(
        name=f"{NEW_TOKENS} tokens added to embedding and head, the rest frozen",
        slug="tokens",
        make=_longer,
    ),
    Kind(
        name="head only",
        slug="head",
        make=_tuned(lambda name, layers: name.startswith("lm_head")),
    ),
    Kind(name="that LoRA, merged into the weights", slug="merged", make=_merged),
    Kind(name="LoRA on a fine-tune of the last 2 layers", slug="stacked", make=_on_a_tune),
    Kind(
        name="quantized to 4 bits, groups of 64",
        slug="int4",
        make=_base,
        quantize=QuantSpec(bits=4, group=64),
    ),
)
"""The rows of the table in docs/zoo-savings.md."""
