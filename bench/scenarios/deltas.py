"""What few bytes cost on the demo family: bytes against accuracy of compressed and quantized models."""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import progress
from jblock.adapt import metrics, scores
from jblock.adapt.compression import compress_chain
from jblock.adapt.probe import ProbeData, Rows, item_rows
from jblock.adapt.quantization import quantize_chain
from jblock.blocks.quant_spec import QuantSpec
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

FINE_TUNES = ("demo-1m-upper", "demo-1m-spell", "demo-3m-date", "demo-3m-sort")
# Setting -> (budget as a share of the changed components' bytes, codecs).
SETTINGS: Mapping[str, tuple[float, tuple[str, ...]]] = {
    "low rank, 1/4": (1 / 4, ("low_rank",)),
    "low rank, 1/8": (1 / 8, ("low_rank",)),
    "low rank, 1/16": (1 / 16, ("low_rank",)),
    "bits, 1/4": (1 / 4, ("bits",)),
    "bits, 1/7": (1 / 7, ("bits",)),
    "bits, 1/13": (1 / 13, ("bits",)),
    "all, 1/8": (1 / 8, ("low_rank", "bits")),
    "all, 1/12": (1 / 12, ("low_rank", "bits")),
}
QUANTIZED = {
    "int8, groups of 64": QuantSpec(bits=8, group=64),
    "int4, groups of 64": QuantSpec(bits=4, group=64),
    "int4, groups of 32": QuantSpec(bits=4, group=32),
}
_ITEM_SEED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--items", type=int, default=4000, help="held-out items a fine-tune")
    parser.add_argument("--models", nargs="*", default=FINE_TUNES, help="full or frozen fine-tunes")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`accuracy_change_at_8x`: accuracy of the fine-tunes, their changed components kept in at most an eighth
    of their bytes (setting "all, 1/8"), less their own, mean over the fine-tunes.

    Accuracy is the share of held-out items whose answer greedy decoding gives exactly: each token of
    the expected answer is the best one after those before it. Same items for both sides; changes carry
    their 95% interval (`adapt.scores.paired`).
    """
    from examples import demo_zoo

    names = args.models[:1] if args.quick else args.models
    items = 200 if args.quick else args.items
    settings = {"all, 1/8": SETTINGS["all, 1/8"]} if args.quick else SETTINGS
    specs = dict(list(QUANTIZED.items())[:1]) if args.quick else QUANTIZED
    family = demo_zoo.load_family(())
    needed = {family[n]["base"] for n in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zoo"
        demo_zoo.convert([e for n, e in family.items() if n in needed or n in names], path)
        zoo = Zoo.open(path)
        rows = {name: _items(zoo.chain(name), family[name], items) for name in names}
        right = {n: _right(zoo, zoo.chain(n), rows[n]) for n in names}
        compressed: list[dict[str, Any]] = []
        quantized: list[dict[str, Any]] = []
        for name in names:
            chain, base = zoo.chain(name), zoo.chain(family[name]["base"])

            def measure(label: str, make: Callable[[], Chain], name=name) -> dict[str, Any]:
                made = make()
                found = _right(zoo, made, rows[name])
                row = _row(name, label, made, right[name], found)
                progress(f"{name}, {label}: {json.dumps(row['accuracy_change'])}")
                return row

            for label, (budget, codecs) in settings.items():
                compressed.append(
                    measure(
                        label,
                        lambda b=budget, c=codecs, chain=chain, base=base: compress_chain(
                            zoo, chain, base, f"{chain.name}-small", b, c
                        ),
                    )
                )
            for label, spec in specs.items():
                quantized.append(
                    measure(
                        label,
                        lambda s=spec, chain=chain: quantize_chain(
                            zoo, chain, f"{chain.name}-q", s
                        ),
                    )
                )
    at_8x = [r["accuracy_change"]["value"] for r in compressed if r["setting"] == "all, 1/8"]
    return {
        "deltas": {"accuracy_change_at_8x": round(float(np.mean(at_8x)), 4)},
        "items": items,
        "compressed": compressed,
        "quantized": quantized,
    }


def _right(zoo: Zoo, chain: Chain, rows: Rows) -> np.ndarray:
    """bool [items]: whether each token of the answer is the best one after those before it."""
    found = metrics.outputs(zoo, chain.steps, ProbeData("items", rows.first(1), rows)).right
    assert found is not None
    return found


def _items(chain: Chain, entry: Mapping[str, Any], count: int) -> Rows:
    import tokenizers

    from examples import demo_zoo
    from examples.train import tasks

    tokenizer = tokenizers.Tokenizer.from_file(
        str(demo_zoo.ROOT / entry["path"] / "tokenizer.json")
    )
    items = tasks.distinct_items(tasks.TASKS[entry["task"]], _ITEM_SEED, "test", count)
    plain = [{"prompt": i.prompt, "answer": i.answer} for i in items]
    return item_rows(tokenizer, plain, chain.eos_token_ids[0])


def _row(name: str, label: str, made: Chain, own: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    change, derived = scores.paired(own, found), made.derived
    return {
        "model": name,
        "setting": label,
        "bytes_before": derived["bytes_before"],
        "bytes_after": derived["bytes_after"],
        "times_smaller": round(derived["bytes_before"] / derived["bytes_after"], 2),
        # Of what the fine-tune changed where that is what was compressed, else of the weights.
        "error": round(derived.get("change_error", derived.get("parameter_error")), 4),
        "codecs": derived.get("codecs"),
        "accuracy": round(float(own.mean()), 4),
        "accuracy_change": {
            "value": round(change.value, 4),
            "low": round(change.low or 0.0, 4),
            "high": round(change.high or 0.0, 4),
        },
    }
