"""An engine driven step by step on the caller's own thread, so that one step can be timed."""

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jblock.engine.api import EngineStats, Output, Request, SamplingParams
from jblock.engine.config import EngineConfig
from jblock.engine.graph.build import assemble
from jblock.engine.loop import Loop
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.engine.programs.keys import ProgramKey
from jblock.engine.runner.runner import Runner
from jblock.engine.scheduling.step_budget import NO_LIMIT
from jblock.engine.spans.port import Port
from jblock.zoo.records import Chain

_GREEDY = {
    "embedding",
    "layer",
    "head",
    "greedy",
    "greedy_head",
    "zero_pages",
    "gather_pages",
    "scatter_pages",
    "read_rows",
    "write_rows",
    "write_pieces",
    "write_vectors",
    "write_bits",
}


class WatchedDevice(Runner):
    """A device that notes when a step's calls were enqueued, and what they will bring.

    Attributes:
      pending: device arrays of the calls enqueued last that bring tokens.
      enqueue_begin: clock when the first call of the step began.
      enqueue_end: clock when the last call so far returned.
      calls: blocks run since `mark`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mark()

    def mark(self) -> None:
        """Begins a new step's notes."""
        self.pending: list[jax.Array] = []
        self.enqueue_begin = self.enqueue_end = 0.0
        self.calls = 0

    def run(self, *args, **kwargs):
        """See Runner.run."""
        self.enqueue_begin = self.enqueue_begin or time.perf_counter()
        result = super().run(*args, **kwargs)
        self.enqueue_end = time.perf_counter()
        self.calls += 1
        if result is not None:
            self.pending.append(result.packed)
        return result

    def wait(self) -> None:
        """Blocks until the tokens of every call so far are there."""
        jax.block_until_ready(self.pending)


class Stepper:
    """One agent with every program compiled and measured, and its loop.

    Attributes:
      graph: blocks and routes.
      device: arrays and programs.
      loop: scheduling.
      config: settings.
    """

    def __init__(
        self,
        zoo: Any,
        chains: Mapping[str, Chain],
        config: EngineConfig,
        cache: Path,
        max_draft_tokens: int = 0,
        port: Port | None = None,
    ):
        """Loads `chains` of `zoo` (or of anything with a zoo's readers) and compiles, or takes programs
        from the folder `cache`. Steps have no time limit: a batch begins at once and stays whole. Models of
        random weights soon say the same again and again, so nothing is drafted unless that is asked for.
        With a port it is an agent of several."""
        settings = {"step_ms": NO_LIMIT, "max_draft_tokens": max_draft_tokens}
        self.config = config = dataclasses.replace(config, **settings)
        self.graph = assemble(zoo, chains, config)
        self.device = WatchedDevice(self.graph, config, ExecutableCache(cache))
        buckets = (*config.decode_buckets, *config.prefill_buckets)
        self.device.buckets = buckets
        self._compile(self.device.program_keys(self.graph, buckets))
        self._compile(self.device.segment_keys(self.graph))
        self.loop = Loop(self.graph, self.device, config, port=port)
        self.loop.loads.preload([r.needs for r in self.graph.routes.values()])
        while self.loop.measure():
            pass
        self._rng = np.random.default_rng(0)
        self._count = 0
        self._lengths: dict[str, int] = {}

    def _compile(self, keys: Iterable[ProgramKey]) -> None:
        """Makes those of these programs that greedy requests need: there are no others here."""
        wanted = [key for key in keys if key.kind in _GREEDY]
        self.device.executables.warm(wanted, self.config.compile_workers)

    def prompt(self, model: str, length: int) -> tuple[int, ...]:
        """Random ids of a model's vocabulary."""
        vocab = self.graph.routes[model].chain.vocab_size
        return tuple(self._rng.integers(0, vocab, length).tolist())

    def submit(self, model: str, token_ids: Sequence[int], max_tokens: int) -> str:
        """Queues a prompt that runs to its length; returns its request id."""
        self._count += 1
        request_id = f"r{self._count}"
        self._lengths[request_id] = len(token_ids)
        self.loop.submit(
            Request(
                request_id=request_id,
                model=model,
                token_ids=tuple(token_ids),
                sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            )
        )
        return request_id

    def fill(self, models: Sequence[str], prompt_len: int, max_tokens: int) -> list[str]:
        """Brings one sequence for each entry of `models` to steady decoding.

        Returns:
          Their request ids.

        Raises:
          RuntimeError: a request was refused, or one ended before the last had begun.
        """
        ids = [self.submit(m, self.prompt(m, prompt_len), max_tokens) for m in models]
        missing = set(ids)
        while missing:
            for output in self._step():
                if output.finish_reason:
                    raise RuntimeError(
                        f"a request ended before all were decoding: {output}; "
                        "give max_tokens or KV memory for all of them"
                    )
                missing.discard(output.request_id)
        self.settle()
        return ids

    def steps(self, count: int, rows: int) -> float:
        """Seconds of `count` whole decode steps of `rows` sequences, from idle to idle device.

        Raises:
          RuntimeError: a step brought other than `rows` tokens, so it was no steady decoding.
        """
        self.device.mark()
        tokens = 0
        begin = time.perf_counter()
        for _ in range(count):
            tokens += len(self._step())
        self.device.wait()
        seconds = time.perf_counter() - begin
        if tokens != count * rows:
            raise RuntimeError(f"{tokens} tokens came from {count} steps of {rows} sequences")
        return seconds

    def lone_step(self) -> tuple[float, float, int]:
        """One step with nothing overlapped: seconds until all its calls were enqueued, seconds until
        its tokens were ready, both since its first call began, and how many blocks it ran."""
        self.device.mark()
        self._step()
        self.device.wait()
        ready = time.perf_counter()
        begin = self.device.enqueue_begin
        return self.device.enqueue_end - begin, ready - begin, self.device.calls

    def settle(self) -> None:
        """Waits until the device has nothing left to do."""
        self.device.wait()

    def drain(self, request_ids: Sequence[str]) -> None:
        """Cancels requests and steps until the loop is idle."""
        for request_id in request_ids:
            self.loop.cancel(request_id)
        while not self.loop.idle:
            self._step()

    def first_token(self, model: str, token_ids: Sequence[int]) -> float:
        """Seconds from handing over a prompt until its first token is read, on an idle engine."""
        begin = time.perf_counter()
        self.submit(model, token_ids, 1)
        seconds = 0.0
        while not self.loop.idle:
            if any(o.token_ids for o in self._step()) and not seconds:
                seconds = time.perf_counter() - begin
        return seconds

    def tokens(self, request_ids: Sequence[str]) -> int:
        """Tokens of these sequences so far, prompts and what was generated."""
        return sum(self._lengths[request_id] for request_id in request_ids)

    def stats(self) -> EngineStats:
        """The loop's counters."""
        return self.loop.stats()

    def _step(self) -> list[Output]:
        outputs = self.loop.step()
        for output in outputs:
            self._lengths[output.request_id] += len(output.token_ids)
        return outputs
