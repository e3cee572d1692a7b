"""Requests that accept recorded equivalents over those that do not, where memory holds equivalents alone."""

import argparse
import dataclasses
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import percentile, progress
from bench.run import Measured, measure
from bench.workload import Arrival
from jblock.adapt.metrics import Evaluator
from jblock.adapt.probe import ProbeData, item_rows, text_rows
from jblock.engine.api import Engine, Request
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.scheduler.adaptive import AdaptiveEngine, with_variants
from jblock.scheduler.itinerary import Budget
from jblock.zoo import assembled
from jblock.zoo.edge_records import Edge, Score
from jblock.zoo.edges import put_edges
from jblock.zoo.records import Chain, Step
from jblock.zoo.store import Zoo

_BASE, _MODEL, _TASK = "demo-3m", "demo-3m-sort", "sort"
_VERSIONS = 4
_NOISE = 0.01
"""Relative size of what tells a later version's layers from the first one's."""
_DAMAGE, _QUICK_DAMAGE = 0.01, 0.1  # few items decide little
_TURNS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this scenario."""
    parser.add_argument(
        "--rate", type=float, default=4.0, help="requests that arrive a second (default: 4)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`p95_ratio`: latency of requests that accept `near` over that of those that do not, at p95.
    `accuracy_change`: of what they were bound to, over task items, with the ends of its interval."""
    items, seconds, turns = (200, 4.0, 1) if args.quick else (4000, 60.0, _TURNS)
    damage = _QUICK_DAMAGE if args.quick else _DAMAGE
    budget = Budget(policy="near", measure="accuracy_change", damage=damage)
    with tempfile.TemporaryDirectory(prefix="jblock-") as name:
        zoo = _zoo(Path(name, "zoo"))
        models = _versions(zoo)
        data = _items(zoo, zoo.chain(_MODEL), items)
        edges = _measured(zoo, models, data)
        progress(f"edges: {[round(e.scores['accuracy_change'].low or 0, 4) for e in edges]}")
        names = [chain.name for chain in models]
        served = with_variants(zoo, names, budget)
        chains = {c.name: c for c in (assembled.serve(zoo, m) for m in served)}
        shared = {s.component for s in models[0].steps}
        fits = _megabytes(zoo, shared)
        every = _megabytes(zoo, {s.component for chain in models for s in chain.steps})
        config = EngineConfig(
            max_num_seqs=16,
            max_model_len=64,
            page_size=16,
            decode_sizes=(1, 4, 16),
            prefill_grids=((1, 16), (4, 16)),
            kv_memory_mb=16,
            weights_memory_mb=fits,
            host_cache_mb=64,
            max_draft_tokens=0,
        )
        arrivals = _arrivals(zoo, models, data, args.rate, seconds)
        engines = {
            policy: _Accepts(
                AdaptiveEngine(
                    ThreadEngine(zoo, chains, config, ExecutableCache(args.cache)), zoo, budget
                ),
                policy,
            )
            for policy in ("exact", "near")
        }
        runs: dict[str, list[Measured]] = {policy: [] for policy in engines}
        try:
            for engine in engines.values():
                engine.models()
                engine.inner.wait_until_warm()
            for turn in range(turns):
                for policy in ("exact", "near") if turn % 2 else ("near", "exact"):
                    runs[policy].append(measure(engines[policy], arrivals))
                    progress(f"{policy}: {_p95(runs[policy][-1:]):.3f} s at p95")
            stats = {policy: engine.stats() for policy, engine in engines.items()}
            bound = engines["near"].bound
        finally:
            for engine in engines.values():
                engine.close()
        change = _change(zoo, models, bound, data)
    p95 = {policy: _p95(measured) for policy, measured in runs.items()}
    return {
        "adaptive": {
            "p95_ratio": round(p95["near"] / p95["exact"], 3),
            "accuracy_change": round(change.value, 5),
            "accuracy_change_low": round(change.low or 0.0, 5),
            "accuracy_change_high": round(change.high or 0.0, 5),
            "items": change.count,
            "budget": damage,
            "failed": sum(m.failed for measured in runs.values() for m in measured),
        },
        "compiles_on_serving_path": sum(s.compiles_on_serving_path for s in stats.values()),
        "detail": {
            "requests_a_second": args.rate,
            "requests": len(arrivals),
            "bound": len(bound),
            "p95_s": {policy: round(seconds, 4) for policy, seconds in p95.items()},
            "memory_mb": {"given": fits, "exact_set": every},
            "evictions": {policy: s.evictions for policy, s in stats.items()},
        },
    }


class _Accepts(Engine):
    """An engine whose requests all accept a policy.

    Attributes:
      bound: what requests were bound to, by id.
    """

    def __init__(self, engine: AdaptiveEngine, policy: str):
        self._engine, self._policy = engine, policy
        self.bound: dict[str, str] = {}

    @property
    def inner(self) -> Any:
        """The engine that computes."""
        return self._engine._engine

    def models(self):
        """See `Engine`."""
        return self._engine.models()

    def submit(self, request: Request) -> None:
        """See `Engine`."""
        self._engine.submit(dataclasses.replace(request, policy=self._policy))

    def poll(self, timeout: float):
        """See `Engine`."""
        outputs = self._engine.poll(timeout)
        self.bound |= {o.request_id: o.bound.served_as for o in outputs if o.bound}
        return outputs

    def stats(self):
        """See `Engine`."""
        return self._engine.stats()

    def close(self) -> None:
        """See `Engine`."""
        self._engine.close()


def _p95(measured: Sequence[Measured]) -> float:
    return percentile([s for one in measured for s in one.latencies_s], 95)


def _zoo(path: Path) -> Zoo:
    from examples import demo_zoo

    demo_zoo.convert(demo_zoo.with_bases(demo_zoo.load_family((_BASE, _MODEL))), path)
    return Zoo.open(path)


def _own(zoo: Zoo) -> list[int]:
    """The steps of the fine-tune that its base does not have, which follow each other."""
    base = {s.component for s in zoo.chain(_BASE).steps}
    own = [i for i, s in enumerate(zoo.chain(_MODEL).steps) if s.component not in base]
    assert own == list(range(own[0], own[-1] + 1))
    return own


def _versions(zoo: Zoo) -> list[Chain]:
    """The fine-tune, and later versions of it as models of their own: its own layers, moved a little."""
    chain, rng = zoo.chain(_MODEL), np.random.default_rng(0)
    made = [chain]
    for number in range(2, _VERSIONS + 1):
        steps = list(chain.steps)
        for at in _own(zoo):
            spec = zoo.component(steps[at].component).spec
            tensors = {
                name: (
                    np.asarray(value, np.float32)
                    * (1 + _NOISE * rng.standard_normal(value.shape, np.float32))
                ).astype(value.dtype)
                for name, value in zoo.load_component(steps[at].component).items()
            }
            steps[at] = Step(component=zoo.put_component(spec, tensors))
        one = dataclasses.replace(
            chain,
            name=f"{_MODEL}-v{number}",
            version=0,
            steps=tuple(steps),
            source_files=None,
            whole={},
        )
        made.append(zoo.publish(one))
    return made


def _items(zoo: Zoo, chain: Chain, count: int) -> ProbeData:
    """Held-out items of the task, as many as it has at most."""
    from checkpoints.probes import tokenizer
    from examples.train import tasks

    rng, items = random.Random(f"adaptive/{_TASK}"), {}
    for _ in range(20 * count):
        item = tasks.draw_from(tasks.TASKS[_TASK], rng, "test")
        items[item.prompt] = {"prompt": item.prompt, "answer": item.answer}
        if len(items) == count:
            break
    loaded = tokenizer(zoo, chain)
    text = " ".join(str(item["prompt"]) for item in items.values())
    rows = text_rows(loaded, text, 32, chain.bos_token_id, 8)
    ends = chain.eos_token_ids[0] if chain.eos_token_ids else None
    return ProbeData(
        f"{_TASK}, {len(items)} items", rows, item_rows(loaded, list(items.values()), ends)
    )


def _measured(zoo: Zoo, models: Sequence[Chain], data: ProbeData) -> list[Edge]:
    """Edges that put the first version's layers in the place of each later one's, measured in it."""
    own, first = _own(zoo), models[0]
    run = slice(own[0], own[-1] + 1)
    found = []
    for chain in models[1:]:
        (beside,) = Evaluator(zoo, chain.steps, data).measure([first.steps])
        found.append(
            Edge(
                kind="equivalent",
                original=chain.steps[run],
                substitute=first.steps[run],
                scores=beside.scores(),
                chain=f"{chain.name}@{chain.version}",
                probe=data.record,
            )
        )
    put_edges(zoo, *found)
    return found


def _change(zoo: Zoo, models: Sequence[Chain], bound: Mapping[str, str], data: ProbeData) -> Score:
    """The worst of what requests were bound to, over the items."""
    found = [Score(value=0.0, low=0.0, high=0.0, count=0)]
    for chain in models:
        for name in sorted({n for n in bound.values() if n.partition("+")[0] == chain.name}):
            steps = assembled.serve(zoo, f"{name}@{chain.version}").steps
            (beside,) = Evaluator(zoo, chain.steps, data).measure([steps])
            found.append(beside.scores()["accuracy_change"])
    return min(found, key=lambda score: (score.low or 0.0, -score.count))


def _megabytes(zoo: Zoo, components: set[str]) -> int:
    """Of parameters in float32, rounded up; what is tied is another's."""
    from jblock.engine.weights.params import param_bytes
    from jblock.parallel.placement import SINGLE

    own = [record for c in components if not (record := zoo.component(c)).refs]
    total = sum(param_bytes(record.spec, "float32", SINGLE) for record in own)
    return -(-total // 10**6)


def _arrivals(
    zoo: Zoo, models: Sequence[Chain], data: ProbeData, rate: float, seconds: float
) -> list[Arrival]:
    """Items for all versions alike, at random times."""
    assert data.items is not None
    rng, at, found = random.Random(0), 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        row = rng.randrange(len(data.items))
        begin = int(np.argmax(data.items.target[row]))
        prompt = tuple(int(t) for t in data.items.tokens[row, :begin])
        model = rng.choice(models).name
        found.append(Arrival(time=at, model=model, prompt=prompt, max_tokens=12))
    return found
