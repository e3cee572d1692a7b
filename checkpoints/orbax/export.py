"""`jblock convert export --format orbax`: a model of the zoo as an orbax checkpoint for Flax.

The tree is the layout "flax" of `layouts.py`: transformers' names, kernels [in, out]. A restore into a module
with these names, or `nnx.replace_by_pure_dict`, takes it; config.json and the tokenizer lie beside.
"""

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.bitfit import with_vectors
from checkpoints.errors import CheckpointError, fitting
from checkpoints.export import tokenizer_files
from checkpoints.progress import Progress
from jblock.blocks.spec import EmbeddingSpec, UnembeddingSpec
from jblock.families import families
from jblock.zoo import disk
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo


def export(
    zoo_path: str | Path,
    name: str,
    out: Path,
    progress: Progress,
    version: int | str | None = None,
) -> list[str]:
    """Writes a whole model to the new folder `out`. All of it is in memory at once.

    Returns:
      Names of what is in `out`, sorted.

    Raises:
      CheckpointError: `out` holds something; an adapter, or a model that is not plain float weights; or a
        family whose tensors do not have Llama's names.
      ZooError: no such model, or the zoo is damaged.
    """
    zoo = Zoo.open(zoo_path)
    chain = zoo.checked_chain(name, version)
    label = f"{chain.name}@{chain.version}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there and not empty: give a new folder")
    if chain.base is not None:
        raise CheckpointError(
            f"{label} is an adapter on {chain.base}: export it as it came (--format hf)"
        )
    if chain.derived:
        raise CheckpointError(
            f"{label} is no float checkpoint ({chain.derived}): export its original"
        )
    with fitting(label):
        return _export(zoo, chain, label, out, progress)


def _export(zoo: Zoo, chain: Chain, label: str, out: Path, progress: Progress) -> list[str]:
    import orbax.checkpoint as ocp

    plan = families()[chain.family].plan(chain.source)
    embedding = plan.steps[0].tensors["weight"]
    if embedding != "model.embed_tokens.weight" or len(plan.steps) != len(chain.steps):
        raise CheckpointError(
            f"{label} is a {chain.family}, whose tensors have no names in the layout 'flax': use --format hf"
        )
    tree: dict[str, Any] = {}
    total = sum(zoo.component(s.component).nbytes for s in chain.steps)
    with progress.bar(f"{chain.name}: reading", total) as advance:
        for planned, step in zip(plan.steps, chain.steps, strict=True):
            stored = with_vectors(zoo, step.component, step.deltas)
            tied = (
                isinstance(planned.spec, UnembeddingSpec) and embedding in planned.tensors.values()
            )
            for tensor, source in planned.tensors.items() if not tied else ():
                _put(tree, source, stored[tensor], isinstance(planned.spec, EmbeddingSpec))
            advance(zoo.component(step.component).nbytes)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    with disk.disk_errors(out):
        try:
            checkpointer = ocp.PyTreeCheckpointer()
            checkpointer.save(aside.resolve(), tree)
            checkpointer.close()
            small = {} if chain.source_files is None else zoo.files("sources", chain.source_files)
            config = {"config.json": json.dumps(chain.source, indent=2).encode()}
            tokenizer = tokenizer_files(zoo, chain)
            kept = {
                n: b for n, b in small.items() if n in ("config.json", "generation_config.json")
            }
            for file, data in (config | kept | tokenizer).items():
                (aside / file).write_bytes(data)
            disk.fsync_trees([aside])
            os.rename(aside, out)
            disk.fsync_path(out.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return sorted(os.listdir(out))


def _put(tree: dict[str, Any], source: str, value: np.ndarray, embedding: bool) -> None:
    """Puts a tensor where Flax has it."""
    *keys, leaf = source.split(".")
    if leaf == "weight" and embedding:
        leaf = "embedding"
    elif leaf == "weight" and value.ndim == 1:
        leaf = "scale"
    elif leaf == "weight":
        leaf, value = "kernel", np.ascontiguousarray(value.T)
    at = tree
    for key in keys:
        at = at.setdefault(key, {})
    at[leaf] = value
