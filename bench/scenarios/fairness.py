"""Tenants on one engine: the bound of the Virtual Token Counter in the paper's suites, what fairness costs.

The suites run the engine's own scheduler and KV manager on a simulated device at frozen costs. They are
those of the paper (arXiv 2401.00588, its artifact's `fair_bench`), with lengths, rates and time divided by
eight. Time to first token beside a flood, and throughput, are those of a real engine with the demo family.
"""

import argparse
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bench.models import DEMO_3M, TINY, fine_tunes
from bench.report import percentile, progress
from bench.run import make_engine
from bench.simulated import Costs, SimulatedEngine, request
from jblock.engine.api import Request, SamplingParams
from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.scheduling.step_budget import Times

_SCALE = 8
# A 7B model on a small GPU, as the paper had, per token an eighth of as many tokens.
_COSTS = Costs(
    decode=Times((1, 4, 8, 16), (0.012, 0.0125, 0.013, 0.015)),
    chunks={16: 0.011, 32: 0.018, 64: 0.034},
)
# As of 4,000 of the paper's: with more, the first one served may as well be the next for a while.
_KV_TOKENS = 4_000 // _SCALE
_BACKLOGGED_SHARE = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """One of the paper's workloads.

    Attributes:
      rates: requests a second of each client.
      seconds: how long they come.
      prompt, output: least and greatest length, in tokens.
      mode: "uniform", "poisson", "increase", "short_long" (client 0 has an eighth of the lengths),
        "short_long_2" (client 0 long prompts and short answers, client 1 the other way), "shift" or "trace".
      on_off: seconds that client 0 sends, and then does not; 0: always.
      weights: of the clients; (): all 1.
      overload: more is asked for than there is, all the time and by all.
    """

    rates: tuple[float, ...]
    seconds: float = 600.0
    prompt: tuple[int, int] = (256, 256)
    output: tuple[int, int] = (256, 256)
    mode: str = "uniform"
    on_off: float = 0.0
    weights: tuple[float, ...] = ()
    overload: bool = False


_MULTI = (0.4, 0.4, 0.4, 0.6, 0.6, 0.6, 0.6, 0.6)
SUITES: Mapping[str, Suite] = {
    "overload": Suite(rates=(1.5, 3.0), seconds=360.0, overload=True),
    "overload_multi": Suite(rates=_MULTI, seconds=360.0, overload=True),
    "overload_weighted": Suite(
        rates=(0.8, 0.8, 1.2, 1.6), seconds=360.0, weights=(1, 2, 3, 4), overload=True
    ),
    "proportional": Suite(rates=(0.25, 0.5, 1.5)),
    "increase": Suite(rates=(0.5, 2.0), mode="increase"),
    "on_off_less": Suite(rates=(0.5, 2.0), on_off=60.0),
    "on_off_overload": Suite(rates=(2.0, 3.0), on_off=60.0, overload=True),
    "poisson_on_off_overload": Suite(
        rates=(0.5, 2.0), prompt=(16, 512), output=(16, 512), mode="poisson", on_off=60.0
    ),
    "poisson_short_long": Suite(rates=(8.0, 1.5), mode="short_long", overload=True),
    "poisson_short_long_2": Suite(
        rates=(8.0, 1.5), prompt=(32, 32), output=(512, 512), mode="short_long_2", overload=True
    ),
    "dist_shift": Suite(rates=(0.5, 3.0), seconds=900.0, mode="shift"),
    # Many clients of very different rates, lengths by a long tail.
    "trace": Suite(
        rates=tuple(2.5 / (i + 1) for i in range(12)),
        prompt=(8, 1024),
        output=(8, 1024),
        mode="trace",
    ),
}


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request to come: when, of which client, how long."""

    time: float
    client: int
    prompt: int
    output: int


def arrivals(suite: Suite, quick: bool) -> list[Arrival]:
    """All of a suite, by time, at the scale of this bench."""
    rng = np.random.default_rng(0)
    seconds = suite.seconds / _SCALE / (4 if quick else 1)
    found = []
    for client, rate in enumerate(suite.rates):
        for at in _times(suite, client, rate * _SCALE, seconds, rng):
            prompt, output = (_length(suite, client, kind, rng) for kind in ("prompt", "output"))
            found.append(Arrival(at, client, prompt, output))
    return sorted(found, key=lambda a: a.time)


def _times(
    suite: Suite, client: int, rate: float, seconds: float, rng: np.random.Generator
) -> Iterator[float]:
    at = 0.0
    period = suite.on_off / _SCALE
    while True:
        now = rate
        if suite.mode == "increase" and client == 1:
            now = rate * (0.25 + 0.75 * at / seconds)
        if suite.mode == "shift":  # Client 0 sends little, then as much, then more than its share.
            now = rate * (1, 4, 8)[min(int(3 * at / seconds), 2)] if client == 0 else rate
        steady = suite.mode in ("uniform", "increase")
        at += 1 / now if steady else float(rng.exponential(1 / now))
        if at >= seconds:
            return
        if not (period and client == 0 and int(at / period) % 2):
            yield at


def _length(suite: Suite, client: int, kind: str, rng: np.random.Generator) -> int:
    low, high = suite.prompt if kind == "prompt" else suite.output
    if suite.mode == "trace":
        value = float(np.clip(np.exp(rng.normal(4.8, 1.0)), low, high))
    else:
        value = float(rng.integers(low, high, endpoint=True))
    if suite.mode == "short_long" and client == 0:
        value /= 8
    if (
        suite.mode == "short_long_2" and client == 0
    ):  # Long prompts and short answers, and so crosswise.
        value = float(suite.output[1] if kind == "prompt" else suite.prompt[1])
        value /= 4
    return max(1, round(value / _SCALE))


@dataclasses.dataclass
class Run:
    """What one run of a suite showed.

    Attributes:
      times: of each step's end.
      service: seconds of each client by then, [steps, clients].
      tokens: the same in tokens, of a prompt as many as its time is worth.
      backlogged: whether it had something waiting, [steps, clients].
      generated: tokens generated by all in time.
    """

    times: list[float]
    service: np.ndarray
    tokens: np.ndarray
    backlogged: np.ndarray
    generated: int


def simulate(suite: Suite, coming: Sequence[Arrival], fair: bool) -> Run:
    """A suite to the end of its arrivals. Without fairness all clients are one tenant."""
    count = len(suite.rates)
    weights = suite.weights or (1.0,) * count
    service, tokens = np.zeros(count), np.zeros(count)
    prompt_weight = _COSTS.chunks[32] / 32 / _COSTS.token_seconds
    generated = 0

    def served(one: Request, seconds: float, new: int) -> None:
        client = int(one.request_id.split("-")[0])
        service[client] += seconds
        of_prompt = seconds > new * _COSTS.token_seconds * (1 + 1e-9)
        tokens[client] += new * (prompt_weight if of_prompt else 1.0)

    engine = SimulatedEngine(_COSTS, kv_tokens=_KV_TOKENS, served=served)
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    times = []
    at = 0
    end = coming[-1].time
    while engine.now < end:
        while at < len(coming) and coming[at].time <= engine.now:
            a = coming[at]
            tenant = f"t{a.client}" if fair else ""
            weight = weights[a.client] if fair else 1.0
            engine.submit(request(f"{a.client}-{at}", tenant, a.prompt, a.output, weight))
            at += 1
        if not any(True for _ in engine.scheduler):
            engine.now = coming[at].time
            continue
        generated += len(engine.step())
        waits = np.zeros(count, bool)
        for one in engine.scheduler.waiting:
            waits[int(one.request.request_id.split("-")[0])] = True
        times.append(engine.now)
        rows.append((service.copy(), tokens.copy(), waits))
    arrays = [np.array([row[i] for row in rows]) for i in range(3)]
    return Run(times, *arrays, generated)


def largest_difference(run: Run, weights: Sequence[float], column: np.ndarray) -> float:
    """The most by which two clients' weighted service differed over an interval in which both had something
    waiting all the time."""
    worst = 0.0
    levels = column / np.asarray(weights)
    for f, g in itertools.combinations(range(levels.shape[1]), 2):
        both = run.backlogged[:, f] & run.backlogged[:, g]
        difference = levels[:, f] - levels[:, g]
        for inside, steps in itertools.groupby(range(len(both)), key=lambda i: bool(both[i])):
            if inside:
                part = difference[list(steps)]
                worst = max(worst, float(part.max() - part.min()))
    return worst


def jain(run: Run, weights: Sequence[float]) -> float | None:
    """Jain's index of the weighted service of the clients that nearly always had something waiting, while
    all of them had; None where there are not two."""
    chosen = np.flatnonzero(run.backlogged.mean(axis=0) >= _BACKLOGGED_SHARE)
    if len(chosen) < 2:
        return None
    all_of_them = run.backlogged[:, chosen].all(axis=1)
    steps = np.diff(run.service[:, chosen], axis=0, prepend=0.0)
    shares = steps[all_of_them].sum(axis=0) / np.asarray(weights)[chosen]
    return float(shares.sum() ** 2 / (len(chosen) * (shares**2).sum()))


def _suites(quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """All suites, fair and first come first served: what they come to, and each."""
    table, held, breaks, indices = {}, True, True, []
    slowest = 1.0
    for name, suite in SUITES.items():
        progress(f"suite {name}")
        coming = arrivals(suite, quick)
        weights = suite.weights or (1.0,) * len(suite.rates)
        longest = max(a.prompt for a in coming)
        machine = _COSTS.machine()
        route: Any = None
        unit = max(machine.prompt_seconds(route, longest), _COSTS.token_seconds * _KV_TOKENS) / min(
            weights
        )
        of_tokens = unit / _COSTS.token_seconds
        fair, fcfs = simulate(suite, coming, True), simulate(suite, coming, False)
        seconds = largest_difference(fair, weights, fair.service)
        tokens = largest_difference(fair, weights, fair.tokens)
        unfair = largest_difference(fcfs, weights, fcfs.service)
        held &= seconds <= 2 * unit
        if suite.overload:
            breaks &= unfair > 2 * unit
        index = jain(fair, weights)
        if index is not None:
            indices.append(index)
        throughput = fair.generated / fair.times[-1] / (fcfs.generated / fcfs.times[-1])
        slowest = min(slowest, throughput)
        table[name] = {
            "bound": round(2 * unit, 3),
            "difference": round(seconds, 3),
            "fcfs_difference": round(unfair, 3),
            "bound_tokens": round(2 * of_tokens),
            "difference_tokens": round(tokens),
            "jain": None if index is None else round(index, 4),
            "tokens_over_fcfs": round(throughput, 4),
        }
        progress(f"{name}: {table[name]}")
    return {
        "bound_held": held,
        "fcfs_breaks_bound": breaks,
        "jain": round(min(indices), 4),
        "simulated_tokens_over_fcfs": round(slowest, 4),
    }, table


class _Client:
    """Sends requests to a real engine, and notes when their tokens came."""

    def __init__(self, engine: ThreadEngine, models: Sequence[str], vocab: int):
        self.engine = engine
        self._models, self._vocab = models, vocab
        self._rng = np.random.default_rng(1)
        self._numbers = itertools.count()
        self._waiting: dict[str, queue.SimpleQueue[float]] = {}
        self.tokens = 0
        self.open = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def send(self, tenant: str, prompt: int, output: int) -> tuple[str, queue.SimpleQueue[float]]:
        """A request; its id, and a queue that gets the clock at its first token and at its end."""
        number = next(self._numbers)
        name = f"f{number}"
        came = self._waiting[name] = queue.SimpleQueue()
        self.open += 1
        self.engine.submit(
            Request(
                request_id=name,
                model=self._models[number % len(self._models)],
                token_ids=tuple(self._rng.integers(0, self._vocab, prompt).tolist()),
                sampling=SamplingParams(max_tokens=output, ignore_eos=True),
                tenant=tenant,
                cache_salt=tenant,
            )
        )
        return name, came

    def _read(self) -> None:
        began = set()
        while not self._stop.is_set():
            for output in self.engine.poll(0.05):
                self.tokens += len(output.token_ids)
                came = self._waiting[output.request_id]
                if output.request_id not in began and output.token_ids:
                    began.add(output.request_id)
                    came.put(time.perf_counter())
                if output.finish_reason:
                    came.put(time.perf_counter())
                    self.open -= 1

    def settle(self) -> None:
        """Waits until all is over."""
        while self.open:
            time.sleep(0.01)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def _first_tokens(client: _Client, count: int) -> list[float]:
    """Seconds to the first token of requests of a well-behaved tenant, one after another."""
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        _, came = client.send("calm", 32, 4)
        found.append(came.get(timeout=120) - begin)
        came.get(timeout=120)
        time.sleep(0.02)
    return found


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    """The two figures of a real engine, fair and not in turns."""
    shape = TINY if args.quick else DEMO_3M
    zoo = fine_tunes(shape, 4, shape.layers // 4)
    config = EngineConfig(
        max_num_seqs=16,
        max_model_len=192,
        page_size=16,
        decode_sizes=(4, 16),
        prefill_grids=((1, 16), (4, 16), (1, 64), (4, 64)),
    )
    count = 8 if args.quick else 40
    engine = make_engine(zoo, config, args.cache)
    client = _Client(engine, sorted(zoo.served), shape.vocab_size)
    try:
        progress("time to first token, alone and beside a flood")
        _first_tokens(client, count)  # To warm up.
        alone = _first_tokens(client, count)
        flood = [client.send("flood", 64, 100)[0] for _ in range(16 * count)]
        beside = _first_tokens(client, count)
        flooded = client.open > 0
        for name in flood:
            engine.cancel(name)
        client.settle()
        ratios = []
        for number in range(2 if args.quick else 8):
            # Lengths differ: of one length all would end in the same steps, as long as nobody is preferred.
            rng = np.random.default_rng(number)
            lengths = rng.integers((8, 16), (57, 81), (8 * count, 2)).tolist()
            rates = {}
            for fair in ((False, True), (True, False))[number % 2]:
                begin, before = time.perf_counter(), client.tokens
                for i, (prompt, output) in enumerate(lengths):
                    client.send(f"t{i % 5}" if fair else "", prompt, output)
                client.settle()
                rates[fair] = (client.tokens - before) / (time.perf_counter() - begin)
            ratios.append(rates[True] / rates[False])
            progress(f"throughput, first come first served and fair: {rates}")
        compiles = engine.stats().compiles_on_serving_path
    finally:
        client.close()
        engine.close()
    p95_alone, p95_beside = percentile(alone, 95), percentile(beside, 95)
    return {
        "flooded_ttft_ratio": round(max(p95_beside - config.step_ms / 1e3, 0.0) / p95_alone, 3),
        "alone_ttft_p95_ms": round(1e3 * p95_alone, 2),
        "flooded_ttft_p95_ms": round(1e3 * p95_beside, 2),
        "step_ms": config.step_ms,
        "flood_lasted": flooded,
        "throughput_over_fcfs": round(float(np.median(ratios)), 3),
        "compiles_on_serving_path": compiles,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The suites, then the engine."""
    suites, table = _suites(args.quick)
    engine = _engine(args)
    compiles = engine.pop("compiles_on_serving_path")
    return {
        "fairness": {**suites, **engine},
        "detail": table,
        "compiles_on_serving_path": compiles,
    }
