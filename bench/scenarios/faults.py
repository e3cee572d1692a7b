"""Faults at our own interfaces, against agents of the demo family under load: what they do to answers."""

import argparse
import collections
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.exactness import LOGIT_ERROR
from bench.faults.draw import KINDS, Injector, draw
from bench.faults.load import Load, answers
from bench.faults.port import KINDS as MESSAGE_KINDS
from bench.report import progress
from jblock.engine.api import Request, SamplingParams
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.seats import share_out
from jblock.scheduler.cluster import Cluster
from jblock.scheduler.pipeline import Pipeline

_MODELS = ("demo-1m", "demo-1m-upper", "demo-1m-largest-lora12", "demo-1m-copy-lora4")
_FACTORY = "bench.faults.agent:build_engine"
_IN_FLIGHT = 12
_REQUESTS = 48
_TEMPERATURE = 0.8
_HEARTBEAT_S = 5.0
_TOGETHER = 0.2
"""Of the faults, those that begin before all is well after the one before; no three come so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this scenario."""
    parser.add_argument("--faults", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--agents", type=int, default=4, help="processes (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="that faults and requests are drawn by")
    parser.add_argument(
        "--whole", action="store_true", help="agents serve whole chains, not spans of each"
    )
    parser.add_argument(
        "--stuck_seconds",
        type=float,
        default=120.0,
        help="a request that gets nothing for so long, while nothing is wrong, is stuck (default: 120)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`lost`: requests that did not end as they should. `twice`: answers after the last one. `differ`: other
    tokens than in a quiet run, beyond the token rule. `stuck`: nothing for `--stuck_seconds`."""
    from examples import demo_zoo

    agents, faults = (2, 6) if args.quick else (args.agents, args.faults)
    rng = random.Random(args.seed)
    kinds = tuple(k for k in KINDS if not (args.whole and k in MESSAGE_KINDS))
    with tempfile.TemporaryDirectory(prefix="jblock-") as name:
        folder = Path(name)
        zoo = folder / "zoo"
        demo_zoo.convert(demo_zoo.with_bases(demo_zoo.load_family(_MODELS)), zoo)
        kwargs = {
            "zoo": str(zoo),
            "models": list(_MODELS),
            "executable_cache": str(args.cache),
            "max_num_seqs": 8,
            "max_model_len": 128,
            "page_size": 16,
            "decode_sizes": [8],
            "prefill_grids": [[8, 16]],
            "kv_memory_mb": 8,
            # Two adapters take turns, so the zoo is read all the time.
            "adapter_slots": 1,
            "host_cache_mb": 0,
            "read_seconds": 10.0,
            "max_draft_tokens": 0,
        }
        seats = share_out(agents, 1)

        def start(agent: int, served: Sequence[str], notify: Any) -> ProcessEngine:
            own = {**kwargs, "fault_folder": name, "fault_agent": agent}
            if not args.whole:
                own |= {"span_agent": agent, "span_agents": agents, "span_folder": name}
            own["models"] = list(served) or kwargs["models"]
            return ProcessEngine(
                _FACTORY, own, heartbeat_seconds=_HEARTBEAT_S, seat=seats[agent], notify=notify
            )

        if args.whole:
            engine: Cluster | Pipeline = Cluster(start, agents, models=_MODELS)
        else:
            engine = Pipeline(start, agents)
        try:
            vocab = min(info.vocab_size for info in engine.models())
            requests = _requests(vocab)
            expected = answers(engine, requests)
            progress("quiet run")
            load = Load(
                engine,
                requests,
                expected,
                in_flight=_IN_FLIGHT,
                stuck_seconds=args.stuck_seconds,
                rng=random.Random(f"requests of {args.seed}"),
            )
            drawn = _disturb(engine, load, Injector(engine, folder, zoo), rng, faults, kinds)
            stats = engine.stats()
        finally:
            engine.close()
        counts = load.counts
        gaps = [_gap(zoo, asked, expected[asked.request_id], got) for asked, got in counts.parted]
    return {
        "faults": {
            "faults": sum(drawn.values()),
            "lost": counts.lost,
            "twice": counts.twice,
            "differ": sum(gap >= 10 * LOGIT_ERROR for gap in gaps),
            "stuck": counts.stuck,
        },
        "compiles_on_serving_path": stats.compiles_on_serving_path,
        "detail": {
            "agents": agents,
            "spans": not args.whole,
            "seed": args.seed,
            "kinds": dict(sorted(drawn.items())),
            "answered": counts.answered,
            "sent_again": counts.again,
            "parted_at_near_ties": [gap for gap in gaps if gap < 10 * LOGIT_ERROR],
            "longest_wait_s": round(counts.longest_s, 1),
            "stuck_seconds": args.stuck_seconds,
            "restarts": stats.restarts,
        },
    }


def _disturb(
    engine: Any,
    load: Load,
    injector: Injector,
    rng: random.Random,
    faults: int,
    kinds: tuple[str, ...],
) -> collections.Counter[str]:
    """Has faults happen one after another, some together; how often each kind did."""
    drawn: collections.Counter[str] = collections.Counter()

    def calm() -> bool:
        return injector.calm and engine.is_up and all(engine.pids)

    def run(until: Any) -> None:
        load.run(until, lambda: (injector.tend(), load.fill()), calm)

    waited = False
    for number in range(faults):
        waited = number == 0 or not waited or rng.random() >= _TOGETHER
        if waited:
            run(lambda: calm() and load.went_on)
        load.fill()
        load.note_fault()
        fault = draw(rng, len(engine.pids), kinds)
        drawn[fault.kind] += 1
        progress(f"{number}: {fault}")
        injector.inject(fault)
    run(lambda: calm() and load.went_on)
    load.run(lambda: load.idle, injector.tend, calm)
    return drawn


def _requests(vocab: int) -> list[Request]:
    """Of each model, greedy and drawn with a seed; some begin alike."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(5, vocab, 32)
    made = []
    for i in range(_REQUESTS):
        own = rng.integers(5, vocab, int(rng.integers(4, 24)))
        prompt = (*prefix, *own) if i % 3 == 0 else own
        drawn = {"temperature": _TEMPERATURE, "seed": i} if i % 4 == 3 else {}
        tokens = int(rng.integers(8, 40))
        made.append(
            Request(
                request_id=f"q{i}",
                model=_MODELS[i % len(_MODELS)],
                token_ids=tuple(int(t) for t in prompt),
                sampling=SamplingParams(max_tokens=tokens, ignore_eos=True, **drawn),
            )
        )
    return made


def _gap(zoo: Path, asked: Request, one: list[int], other: list[int]) -> float:
    """How near the two best tokens were where two answers part."""
    import jax.numpy as jnp

    from jblock.adapt import forward
    from jblock.engine.programs.sampling import noise
    from jblock.zoo.store import Zoo

    same = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    context = (*asked.token_ids, *one[:same])
    store = Zoo.open(zoo)
    weights = forward.load(store, store.chain(asked.model).steps)
    logits = forward.outputs(weights, np.array([context]))[1][0, -1]
    if asked.sampling.temperature:
        seeds, ids = jnp.array([asked.sampling.seed], jnp.uint32), jnp.arange(len(logits))[None]
        position = jnp.array([len(context)], jnp.int32)
        logits = logits + _TEMPERATURE * noise(seeds, position, ids.astype(jnp.int32))[0]
    best = jnp.sort(logits)[-2:]
    return float(best[1] - best[0])
