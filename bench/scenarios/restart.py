"""Engine processes that are killed and stopped under streams, and a request that ends every process."""

import argparse
import dataclasses
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.exactness import LOGIT_ERROR, draw_gap, logit_gap
from bench.models import MODEL_250M, TINY, MemoryZoo, save
from bench.report import progress
from jblock.engine.api import Engine, Output, Request, SamplingParams
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.supervisor import SupervisedEngine

_STREAMS = 24
_TEMPERATURE = 0.8
_HEARTBEAT_S = 10.0
_LIMIT_S = 3000.0
# Tokens every stream gets between two deaths, so that each death is the first of its own kind.
_TOKENS_APART = 6
_FACTORY = "bench.scenarios.restart:build_engine"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`lost`: streams that did not end as they should. `differ`: streams with other tokens than in a quiet
    run, beyond the token rule. `pause_s`: the longest time that no stream got a token after a kill, and
    `pause_stopped_s` after a stop, which is noticed after the heartbeat's limit. `warm_start_s`: from the
    start of a process to its being warm, for comparison. `refused`: of 24 with one that ends every process
    it runs in, those refused."""
    kills, stops = (2, 1) if args.quick else (10, 2)
    shape = TINY if args.quick else MODEL_250M
    zoo = MemoryZoo(shape)
    chain = zoo.add_base("base")
    heartbeat = 3.0 if args.quick else _HEARTBEAT_S
    # A tiny model's steps are so short that it would be through before a signal comes.
    apart = _TOKENS_APART + (60 if args.quick else 4)
    requests = _requests(shape.vocab_size, (kills + stops + 2) * apart)
    with tempfile.TemporaryDirectory() as folder:
        path = save(zoo, Path(folder, "zoo"))
        kwargs = {"zoo": str(path), "executable_cache": str(args.cache), "kv_memory_mb": 600}
        if args.quick:
            kwargs |= {"decode_sizes": [24], "prefill_grids": [[4, 64]]}

        def engine(**more: Any) -> SupervisedEngine:
            return SupervisedEngine(
                lambda served: ProcessEngine(
                    _FACTORY, {**kwargs, **more}, heartbeat_seconds=heartbeat
                )
            )

        quiet = _Run(engine(), requests)
        warm = quiet.warm_start_s
        quiet.wait()
        progress(f"quiet run: warm after {warm:.1f} s")
        disturbed = _Run(engine(), requests)
        warm = max(warm, disturbed.warm_start_s)  # Its programs were compiled, as a restart's are.
        pauses: dict[str, list[float]] = {"SIGKILL": [], "SIGSTOP": []}
        for name in ["SIGKILL"] * kills + ["SIGSTOP"] * stops:
            disturbed.wait_for_tokens(_TOKENS_APART)
            pauses[name].append(disturbed.disturb(getattr(signal, name)))
            progress(f"{name}: {pauses[name][-1]:.2f} s without a token")
        disturbed.wait()
        restarts = disturbed.restarts
        killer = _requests(shape.vocab_size, 24)
        victim = dataclasses.replace(killer[7], cache_salt="killer")
        killer[7] = victim
        hunt = _Run(engine(killer_salt="killer"), killer)
        hunt.wait()
    refused = [i for i, o in hunt.ends.items() if o.finish_reason == "error"]
    lost = _lost(disturbed, requests) + _lost(hunt, [r for r in killer if r is not victim])
    gaps = _gaps(zoo, chain, requests, quiet.tokens, disturbed.tokens)
    return {
        "restart": {
            "lost": lost,
            "differ": sum(gap >= 10 * LOGIT_ERROR for gap in gaps),
            "pause_s": round(max(pauses["SIGKILL"]), 2),
            "pause_stopped_s": round(max(pauses["SIGSTOP"]), 2),
            "warm_start_s": round(warm, 2),
            "refused": len(refused),
            "refused_alone": refused == [victim.request_id],
        },
        "detail": {
            "kills": kills,
            "stops": stops,
            "restarts": restarts,
            "heartbeat_s": heartbeat,
            "pauses_s": {name: [round(s, 2) for s in each] for name, each in pauses.items()},
            "deaths_to_find_the_killer": hunt.restarts,
            "parted_at_near_ties": [gap for gap in gaps if gap < 10 * LOGIT_ERROR],
        },
    }


class _Run:
    """Requests on an engine of their own, read in a thread.

    Attributes:
      tokens: by request id.
      ends: the last output of each.
      warm_start_s: seconds from the engine's start until it was warm.
      restarts: processes that were replaced, once it is over.
    """

    def __init__(self, engine: Engine, requests: list[Request]):
        self._engine: Any = engine
        self.tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
        self.ends: dict[str, Output] = {}
        self.restarts = 0
        self._last = time.monotonic()
        self._changed = threading.Condition()
        begin = time.monotonic()
        engine.models()
        self.warm_start_s = time.monotonic() - begin
        for request in requests:
            engine.submit(request)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while len(self.ends) < len(self.tokens):
            outputs = self._engine.poll(0.2)
            with self._changed:
                for output in outputs:
                    self.tokens[output.request_id].extend(output.token_ids)
                    if output.token_ids:
                        self._last = time.monotonic()
                    if output.finish_reason:
                        self.ends[output.request_id] = output
                self._changed.notify_all()

    def wait_for_tokens(self, count: int) -> None:
        """Until every stream has so many more."""
        with self._changed:
            wanted = {i: len(tokens) + count for i, tokens in self.tokens.items()}
            self._until(
                lambda: all(len(self.tokens[i]) >= n or i in self.ends for i, n in wanted.items())
            )

    def disturb(self, number: int) -> float:
        """Sends the process a signal; seconds from the last token before it took effect to the next."""
        pid = self._engine.pid
        os.kill(pid, number)
        with self._changed:
            self._until(lambda: self._engine.pid != pid)
            last = self._last
            self._until(lambda: self._last != last)
            return self._last - last

    def wait(self) -> None:
        """Until all have ended; closes the engine."""
        with self._changed:
            self._until(lambda: len(self.ends) == len(self.tokens))
        self._thread.join()
        self.restarts = self._engine.stats().restarts
        self._engine.close()

    def _until(self, check: Any) -> None:
        end = time.monotonic() + _LIMIT_S
        while not check():
            self._changed.wait(0.02)
            # Looked at before the check: the thread ends with the last output.
            reads = self._thread.is_alive() and time.monotonic() < end
            if not reads and not check():
                raise RuntimeError("the engine was given up, or did not go on")


def _requests(vocab: int, length: int) -> list[Request]:
    """Half greedy, half seeded draws."""
    rng = np.random.default_rng(0)
    requests = []
    for i in range(_STREAMS):
        drawn = {"temperature": _TEMPERATURE, "seed": i} if i % 2 else {}
        sampling = SamplingParams(max_tokens=length, ignore_eos=True, **drawn)
        prompt = tuple(int(t) for t in rng.integers(0, vocab, 32))
        requests.append(
            Request(request_id=f"r{i}", model="base", token_ids=prompt, sampling=sampling)
        )
    return requests


def _lost(run: _Run, requests: list[Request]) -> int:
    return sum(
        run.ends[r.request_id].finish_reason != "length"
        or len(run.tokens[r.request_id]) != r.sampling.max_tokens
        for r in requests
    )


def _gaps(zoo, chain, requests: list[Request], reference, other) -> list[float]:
    """For each request with other tokens, how near the two were where they part."""
    gaps = []
    for request in requests:
        a, b = reference[request.request_id], other[request.request_id]
        if a != b:
            same = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            context, sampling = (*request.token_ids, *a[:same]), request.sampling
            if sampling.seed is None:
                gaps.append(logit_gap(zoo, chain, context))
            else:
                gaps.append(draw_gap(zoo, chain, context, _TEMPERATURE, sampling.seed))
    return gaps


def build_engine(*, killer_salt: str = "", **kwargs: Any) -> Engine:
    """The engine of a server, whose process a request with this cache salt kills in its third step."""
    from jblock.engine import factory
    from jblock.engine.runner.runner import Runner

    if killer_salt:
        run = Runner.run

        def fatal(self, instance, batch, *rest):
            for item in batch.items:
                request = item.sequence.request
                if request.cache_salt == killer_salt and item.sequence.sampled > 2:
                    os.kill(os.getpid(), signal.SIGKILL)
            return run(self, instance, batch, *rest)

        Runner.run = fatal
    return factory.build_engine(**kwargs)
