"""`jblock convert merge`: several LoRA adapters on one base become one, with weights.

The result is what PEFT's `add_weighted_adapter` gives for its combinations "cat" and "linear", written as
an adapter's files and converted like any other: it can be exported, verified, and adapted again.
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from checkpoints import peft
from checkpoints.adapters.adapterhub import is_adapterhub
from checkpoints.adapters.peft_config import LoraSettings, read_settings
from checkpoints.errors import CheckpointError
from checkpoints.export import export
from checkpoints.progress import Progress
from checkpoints.source import Source, open_source, read_json
from jblock.zoo.records import Chain, split_version
from jblock.zoo.store import Zoo

COMBINATIONS = ("cat", "linear")
_PREFIX = "base_model.model."
# Ends of the two halves' names, of a matrix and of an embedding.
_HALVES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


def merge(
    zoo_path: str | Path,
    name: str,
    adapters: Sequence[tuple[str, float]],
    combination: str,
    progress: Progress,
    activate: bool = True,
) -> tuple[Chain, bool]:
    """Adds the weighted sum of adapters as model `name`.

    "cat" puts the ranks side by side: `sum(w_i * scale_i * b_i @ a_i)`. "linear" adds the halves, each
    times `sqrt(|w_i * scale_i|)`, a with its sign, so that products of different adapters come in;
    ranks must be equal.

    Args:
      zoo_path: the zoo.
      name: of the new model.
      adapters: models of the zoo with their weights.
      combination: one of COMBINATIONS.
      progress: told how far it is.
      activate: make it the active version of its name.

    Returns:
      As `peft.convert`.

    Raises:
      CheckpointError: adapters that cannot be combined; the message says why.
    """
    zoo = Zoo.open(zoo_path)
    chains = [zoo.checked_chain(adapter) for adapter, _ in adapters]
    bases = {chain.base for chain in chains}
    if len(adapters) < 2 or len({a for a, _ in adapters}) < len(adapters):
        raise CheckpointError("give --adapter NAME=WEIGHT at least twice, for different adapters")
    if len(bases) > 1 or None in bases:
        told = ", ".join(f"{c.name} on {c.base or 'nothing'}" for c in chains)
        raise CheckpointError(
            f"only adapters on the same version of one base can be merged: {told}"
        )
    base = zoo.checked_chain(*split_version(chains[0].base or ""))
    with tempfile.TemporaryDirectory() as scratch:
        parts = []
        for chain, (_, weight) in zip(chains, adapters, strict=True):
            folder = Path(scratch) / chain.name
            export(zoo_path, chain.name, folder, Progress(False, quiet=True), chain.version)
            parts.append(_Part(chain.name, folder, weight))
        merged = Path(scratch) / ".merged"
        merged.mkdir()
        _write(merged, base.name, parts, combination)
        at = f"{base.name}@{base.version}"
        return peft.convert(merged, zoo_path, at, name, progress, _origin(chains), activate)


def _origin(chains: Sequence[Chain]) -> dict[str, str]:
    return {"source": "merge of " + ", ".join(f"{c.name}@{c.version}" for c in chains)}


class _Part:
    """One adapter to be merged: its files, and its pairs by module."""

    def __init__(self, name: str, folder: Path, weight: float):
        config = read_json(folder / "adapter_config.json")
        if is_adapterhub(config):
            raise CheckpointError(f"{name} is a bottleneck adapter: only LoRA can be merged")
        settings = read_settings(config)
        lora = settings.lora
        if lora is None:
            raise CheckpointError(f"{name} is {settings.method}: only LoRA can be merged")
        more = {"use_dora": lora.dora, "lora_bias": lora.b_bias, "bias": lora.bias != "none"}
        more["modules_to_save"] = bool(settings.saved)
        more["alora_invocation_tokens"] = bool(lora.invocation)
        if any(more.values()):
            field = next(f for f, there in more.items() if there)
            raise CheckpointError(f"{name} has {field}: only plain LoRA can be merged")
        self.name, self.weight = name, weight
        self.lora: LoraSettings = lora
        self.source: Source = open_source(folder, "adapter_model")
        self.rest = set(self.source.tensors)
        self.pairs: dict[tuple[str, int], tuple[str, str]] = {}
        for kind, (a, b) in enumerate(_HALVES):
            for tensor in self.source.tensors:
                if tensor.endswith(a):
                    module = tensor.removeprefix(_PREFIX).removesuffix(a)
                    self.pairs[module, kind] = (tensor, tensor.removesuffix(a) + b)
                    self.rest -= set(self.pairs[module, kind])

    def read(self, module: tuple[str, int]) -> tuple[np.ndarray, np.ndarray, float]:
        """Both halves of a module in float32, and its weight times its scale."""
        a, b = (self.source.read(t).astype(np.float32) for t in self.pairs[module])
        return a, b, self.weight * self.lora.rank_and_scale(module[0])[1]


def _write(folder: Path, base: str, parts: Sequence[_Part], combination: str) -> None:
    """Writes the merged adapter as PEFT would save it."""
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module in sorted({m for part in parts for m in part.pairs}):
        having = [part for part in parts if module in part.pairs]
        read = [part.read(module) for part in having]
        if combination == "cat":
            a: Any = np.concatenate([np.float32(w) * a for a, _, w in read])
            b: Any = np.concatenate([b for _, b, _ in read], axis=1)
        else:
            if len({a.shape for a, _, _ in read}) > 1:
                told = ", ".join(
                    f"{p.name} {len(a)}" for p, (a, _, _) in zip(having, read, strict=True)
                )
                raise CheckpointError(
                    f"the ranks on {module[0]!r} differ ({told}): give --combine cat"
                )
            roots = [np.float32(math.sqrt(abs(w))) for _, _, w in read]
            a = sum(np.copysign(root, w) * a for root, (a, _, w) in zip(roots, read, strict=True))
            b = sum(root * b for root, (_, b, _) in zip(roots, read, strict=True))
        names = having[0].pairs[module]
        tensors |= {names[0]: np.ascontiguousarray(a), names[1]: np.ascontiguousarray(b)}
        ranks[module[0]] = len(a)
    for part in parts:  # the base's own embeddings, which adapters on them bring along
        tensors |= {tensor: part.source.read(tensor) for tensor in part.rest}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(_config(base, ranks), indent=2) + "\n")


def _config(base: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Every module's alpha is its rank, so that its scale is 1."""
    most = max(ranks.values())
    others: dict[str, int] = {module: rank for module, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
    }
