"""Registry: a zoo of ten thousand models: what adding one takes, and listing them all; files a component.

Models are what a service has many of: adapters on one base. The base has `LAYERS` layers; every model has a
delta in each of its last `OWN` ones. Deltas are tiny, and models share them in turn: what is measured is the
registry, one more record and the reading of all of them.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import progress
from checkpoints.printing import print_chains
from jblock.blocks.delta_spec import LoraSpec, LoraTarget
from jblock.blocks.spec import (
    AttentionSpec,
    EmbeddingSpec,
    FfnSpec,
    NormSpec,
    UnembeddingSpec,
)
from jblock.zoo import registry
from jblock.zoo.listing import list_models
from jblock.zoo.records import Chain, Step
from jblock.zoo.store import Zoo

MODELS, QUICK_MODELS = 10_000, 300
LAYERS, OWN, VARIANTS = 32, 8, 64
_HIDDEN, _VOCAB = 16, 64
_PUBLISHED = 20  # timed, in the middle of which is the figure


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fills a zoo and measures."""
    count = QUICK_MODELS if args.quick else MODELS
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo.create(Path(folder) / "zoo")
        base, deltas = _base(zoo)
        few, few_cpu = _publish_seconds(zoo, base, deltas, 0)
        _fill(zoo, base, deltas, count)
        many, many_cpu = _publish_seconds(zoo, base, deltas, count)
        begin, used = time.perf_counter(), time.process_time()
        found = list_models(Zoo.open(zoo.path))
        with contextlib.redirect_stdout(io.StringIO()):
            print_chains(found)
        listed, listed_cpu = time.perf_counter() - begin, time.process_time() - used
        assert found["totals"]["chains"] >= count and not found["problems"]
        inodes = _inodes(zoo)
    end = "" if args.quick else "_10000"
    return {
        "registry": {
            f"publish{end}_s": round(many, 4),
            f"list{end}_s": round(listed, 3),
            "inodes_per_component": inodes,
        },
        "detail": {
            "models": count,
            "steps": len(base.steps),
            "publish_few_s": round(few, 4),
            "publish_few_cpu_s": round(few_cpu, 4),
            f"publish{end}_cpu_s": round(many_cpu, 4),
            f"list{end}_cpu_s": round(listed_cpu, 3),
        },
    }


def _base(zoo: Zoo) -> tuple[Chain, list[list[str]]]:
    """A base of LAYERS layers, and VARIANTS deltas for the ffn of each of the last OWN ones."""
    attention = AttentionSpec(
        hidden_size=_HIDDEN, num_heads=2, num_kv_heads=2, head_dim=8, norm_eps=1e-5, rope=None
    )
    ffn = FfnSpec(hidden_size=_HIDDEN, intermediate_size=32, norm_eps=1e-5)
    lora = LoraSpec(targets={"up": LoraTarget(rank=1, scale=1.0)})
    specs = [
        EmbeddingSpec(vocab_size=_VOCAB, hidden_size=_HIDDEN),
        *([attention, ffn] * LAYERS),
        NormSpec(hidden_size=_HIDDEN, eps=1e-5),
        UnembeddingSpec(vocab_size=_VOCAB, hidden_size=_HIDDEN),
    ]
    rng = np.random.default_rng(0)

    def values(shapes: Any) -> dict[str, np.ndarray]:
        return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}

    with zoo.writer() as writer:
        ids = [writer.put_component(spec, values(spec.tensors())) for spec in specs]
        deltas = [
            [writer.put_delta(lora, i, values(lora.tensors(ffn))) for _ in range(VARIANTS)]
            for i in ids[2 : 2 * LAYERS + 1 : 2][-OWN:]
        ]
        writer.commit()
        base = Chain(
            name="base",
            family="llama",
            steps=tuple(Step(component=i) for i in ids),
            tokenizer=None,
            max_position=64,
            vocab_size=_VOCAB,
        )
        return writer.publish(base), deltas


def _model(base: Chain, deltas: list[list[str]], number: int) -> Chain:
    steps = list(base.steps)
    for layer, of in enumerate(deltas):
        at = 2 * (LAYERS - OWN + layer) + 2
        # Digits of the number in base VARIANTS: no two models have the same deltas.
        digit = number // VARIANTS**layer % VARIANTS
        steps[at] = dataclasses.replace(steps[at], deltas=(of[digit],))
    return dataclasses.replace(
        base, name=f"model-{number}", version=0, steps=tuple(steps), base="base@1"
    )


def _fill(zoo: Zoo, base: Chain, deltas: list[list[str]], count: int) -> None:
    """Adds models as `Zoo.publish` does, but under one lock and without waiting for the disk each time."""
    digest = base.digest
    with zoo.changing("filling the zoo") as changes:
        fsync = os.fsync
        os.fsync = lambda fd: None  # a bench of what comes after
        try:
            for number in range(count):
                if number % 1000 == 0:
                    progress(f"{number} of {count} models")
                chain = dataclasses.replace(_model(base, deltas, number), base_digest=digest)
                registry.publish(zoo.storage, changes, chain, True)
        finally:
            os.fsync = fsync
    os.sync()


def _publish_seconds(
    zoo: Zoo, base: Chain, deltas: list[list[str]], first: int
) -> tuple[float, float]:
    """Median seconds and CPU seconds to publish one model, the zoo opened anew for each as by a command."""
    taken, cpu = [], []
    for number in range(_PUBLISHED):
        chain = _model(base, deltas, 10**6 + first + number)
        begin, used = time.perf_counter(), time.process_time()
        Zoo.open(zoo.path).publish(chain)
        taken.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - used)
    return statistics.median(taken), statistics.median(cpu)


def _inodes(zoo: Zoo) -> float:
    """Files and folders of a component, on average."""
    root = zoo.path / "components"
    ids = os.listdir(root)
    count = sum(len(folders) + len(files) for _, folders, files in os.walk(root))
    return count / len(ids)
