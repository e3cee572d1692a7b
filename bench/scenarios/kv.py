"""Smaller KV against float32: bytes, decoding speed over long contexts, and what answers it changes."""

import argparse
import collections
import dataclasses
import operator
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.models import MODEL_250M, TINY, MemoryZoo, ModelShape
from bench.report import median, progress, spread
from bench.stepper import Stepper
from jblock.engine.api import Request, SamplingParams
from jblock.engine.config import KV_DTYPES, EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.zoo.store import Zoo

_SMALLER = tuple(d for d in KV_DTYPES if d != "float32")
_PAGE = 64
_ITEM_SEED = 20
_DEADLINE_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--context", type=int, default=960, help="cached tokens a sequence")
    parser.add_argument("--seqs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12, help="interleaved repetitions")
    parser.add_argument("--items", type=int, default=300, help="held-out items a demo model")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Decoding on the 250M model, then the demo family's tasks, with every kind of pages."""
    shape = TINY if args.quick else MODEL_250M
    speed = _speed(shape, args)
    answers = _accuracy(args)
    return {
        "kv": {
            dtype: {
                "bytes_ratio": speed["bytes_ratio"][dtype],
                "tokens_per_second_ratio": speed["ratio"][dtype]["median"],
                "top1_agreement": answers[dtype]["top1_agreement"],
                "accuracy_delta": answers[dtype]["accuracy_delta"],
            }
            for dtype in _SMALLER
        },
        "compiles_on_serving_path": speed.pop("compiles") + answers.pop("compiles"),
        "detail": {"speed": speed, "answers": answers},
    }


def _speed(shape: ModelShape, args: argparse.Namespace) -> dict[str, Any]:
    seqs, context = (4, 80) if args.quick else (args.seqs, args.context)
    rounds, steps = (2, 2) if args.quick else (args.rounds, 4)
    decoded = steps * (rounds + 1) + seqs * (context // 16 + 2)
    length = -(-(context + decoded) // _PAGE) * _PAGE
    config = EngineConfig(
        max_num_seqs=seqs,
        max_model_len=length,
        page_size=_PAGE,
        kv_memory_mb=1 + 4 * seqs * shape.kv_floats_per_token * length // 10**6,
        decode_sizes=(seqs,),
        prefill_grids=((1, 16),) if args.quick else ((1, 64), (4, 256)),
    )
    zoo = MemoryZoo(shape)
    zoo.add_base("base")
    sides, ids = {}, {}
    for dtype in KV_DTYPES:
        progress(f"{seqs} sequences of {context} tokens, {dtype} pages")
        settings = dataclasses.replace(config, kv_dtype=dtype)
        sides[dtype] = Stepper(zoo, zoo.served, settings, args.cache)
        ids[dtype] = sides[dtype].fill(["base"] * seqs, context, decoded)
        sides[dtype].steps(steps, seqs)
    times: dict[str, list[float]] = {dtype: [] for dtype in KV_DTYPES}
    for i in range(rounds):
        for dtype in KV_DTYPES if i % 2 else reversed(KV_DTYPES):
            times[dtype].append(sides[dtype].steps(steps, seqs) / steps)
    ratios = {
        dtype: [a / b for a, b in zip(times["float32"], times[dtype], strict=True)]
        for dtype in _SMALLER
    }
    for dtype, stepper in sides.items():
        stepper.drain(ids[dtype])
    page_bytes = {
        dtype: sum(s.page_bytes for s in stepper.device.pool_shapes.values())
        for dtype, stepper in sides.items()
    }
    for dtype in _SMALLER:
        progress(f"{dtype} decodes {median(ratios[dtype])} times as fast")
    return {
        "bytes_ratio": {d: round(page_bytes[d] / page_bytes["float32"], 4) for d in _SMALLER},
        "ratio": {d: spread(ratios[d]) for d in _SMALLER},
        "step_ms": {d: spread([t * 1e3 for t in ts], 3) for d, ts in times.items()},
        "tokens_per_second": {d: round(seqs / statistics.median(ts), 1) for d, ts in times.items()},
        "compiles": sum(s.stats().compiles_on_serving_path for s in sides.values()),
    }


@dataclasses.dataclass(frozen=True)
class _Answer:
    """Greedy tokens, their log-probabilities, and whether the model ended by itself."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool


def _accuracy(args: argparse.Namespace) -> dict[str, Any]:
    """The tasks of the demo family, as examples/evaluate.py measures them."""
    names = ["demo-1m-upper"] if args.quick else []
    count = 20 if args.quick else args.items
    # The demo family stands beside the code, and is not installed with it.
    from examples import demo_zoo
    from examples.train import export, tasks

    members = [e for e in demo_zoo.load_family(names).values() if e.get("task")]
    with tempfile.TemporaryDirectory() as folder:
        zoo_folder = Path(folder) / "zoo"
        demo_zoo.convert(demo_zoo.with_bases({e["name"]: e for e in members}), zoo_folder)
        items = {
            e["name"]: tasks.distinct_items(tasks.TASKS[e["task"]], _ITEM_SEED, "test", count)
            for e in members
        }
        tokenizers = {
            e["name"]: export.read_tokenizer(demo_zoo.ROOT / "models" / e["base"]) for e in members
        }
        runs, compiles = {}, 0
        for dtype in KV_DTYPES:
            progress(f"{len(members)} demo models, {count} items each, {dtype} pages")
            runs[dtype], compiled = _answers(zoo_folder, items, tokenizers, dtype, args.cache)
            compiles += compiled
    correct: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for dtype, answers in runs.items():
        for name, own in items.items():
            texts = [tokenizers[name].decode(a.tokens) for a in answers[name]]
            right = map(operator.eq, texts, (i.answer for i in own))
            ended = (a.stopped for a in answers[name])
            correct[name][dtype] = sum(map(operator.and_, right, ended)) / len(own)
    accuracy = {d: statistics.mean(c[d] for c in correct.values()) for d in KV_DTYPES}
    found: dict[str, Any] = {
        "accuracy": {d: round(a, 5) for d, a in accuracy.items()},
        "by_model": correct,
        "compiles": compiles,
    }
    for dtype in _SMALLER:
        same, errors = _compare(runs["float32"], runs[dtype])
        found[dtype] = {
            "top1_agreement": round(statistics.mean(same), 5),
            "accuracy_delta": round(accuracy["float32"] - accuracy[dtype], 5),
            "tokens_compared": len(same),
            "logprob_error": {"mean": statistics.mean(errors), "max": max(errors)},
        }
    return found


def _compare(
    references: dict[str, list[_Answer]], answers: dict[str, list[_Answer]]
) -> tuple[list[bool], list[float]]:
    """At every position both reached with the same tokens before: whether the best token is the same,
    and where it is, how far its log-probabilities are apart."""
    same, errors = [], []
    for name, own in references.items():
        for a, b in zip(own, answers[name], strict=True):
            for x, y, p, q in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=False):
                same.append(x == y)
                if x != y:
                    break
                errors.append(abs(p - q))
            else:
                if len(a.tokens) != len(b.tokens):
                    same.append(False)
    return same, errors


def _answers(
    zoo: Path, items: dict[str, list], tokenizers: dict[str, Any], dtype: str, cache: Path
) -> tuple[dict[str, list[_Answer]], int]:
    store = Zoo.open(str(zoo))
    config = EngineConfig(
        max_num_seqs=32,
        max_model_len=256,
        page_size=16,
        kv_dtype=dtype,
        kv_memory_mb=64,
        decode_sizes=(32,),
        prefill_grids=((4, 16),),
    )
    chains = {name: store.chain(name) for name in items}
    engine = ThreadEngine(store, chains, config, ExecutableCache(cache))
    try:
        engine.wait_until_warm()
        got = {
            name: _generate(engine, name, [tokenizers[name].encode(i.prompt).ids for i in own])
            for name, own in items.items()
        }
        return got, engine.stats().compiles_on_serving_path
    finally:
        engine.close()


def _generate(engine: ThreadEngine, model: str, prompts: Sequence[list[int]]) -> list[_Answer]:
    answers = {f"{model}-{i}": _Answer([], [], False) for i in range(len(prompts))}
    for (request_id, _), prompt in zip(answers.items(), prompts, strict=True):
        engine.submit(
            Request(
                request_id=request_id,
                model=model,
                token_ids=tuple(prompt),
                sampling=SamplingParams(max_tokens=64, logprobs=True),
            )
        )
    missing = set(answers)
    while missing:
        outputs = engine.poll(_DEADLINE_S)
        if not outputs:
            raise RuntimeError(f"no output for {_DEADLINE_S:.0f} s with {len(missing)} open")
        for output in outputs:
            answer = answers[output.request_id]
            answer.tokens.extend(output.token_ids)
            answer.logprobs.extend(output.logprobs)
            if output.finish_reason:
                missing.discard(output.request_id)
                stopped = output.finish_reason == "stop"
                answers[output.request_id] = dataclasses.replace(answer, stopped=stopped)
    return list(answers.values())
