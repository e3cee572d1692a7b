"""The agent's loop: admit, plan, sweep the instances, read tokens one step behind."""

import functools
import math
import secrets
import time
from typing import Any, NamedTuple

import numpy as np
from jax.profiler import TraceAnnotation

from jblock.engine.api import EngineStats, Output, ReportRunning, Request
from jblock.engine.config import EngineConfig
from jblock.engine.graph.build import assemble
from jblock.engine.graph.graph import Route, ServingGraph
from jblock.engine.kv_cache.manager import KVCacheManager
from jblock.engine.programs.logprobs import best_tokens
from jblock.engine.runner.latency_profile import Profile
from jblock.engine.runner.runner import Runner
from jblock.engine.runner.step import Step, Stepper
from jblock.engine.scheduling import step_budget as policy
from jblock.engine.scheduling.planning import plan
from jblock.engine.scheduling.request_checks import request_problem
from jblock.engine.scheduling.scheduler import Admission
from jblock.engine.scheduling.sequence import Sequence
from jblock.engine.weights.loader import Loads, Targets
from jblock.engine.weights.residents import Adapter
from jblock.pallas_kernels import backends


class Picked(NamedTuple):
    """One row a sampler returned: token, its log-probability, whether all its logits were finite."""

    token: int
    logprob: float
    finite: bool


class Pace:
    """How much longer steps take than their profile says: cached tokens to attend to, other work on
    the machine, and calls that are cheaper together.

    Attributes:
      ratio: seconds passed over seconds expected, lately.
    """

    _SLOWEST, _FASTEST = 8.0, 0.25
    _WEIGHT = 0.1

    def __init__(self) -> None:
        self.ratio = 1.0
        self._ready: float | None = None

    def note(self, step: Step) -> None:
        """Learns from a step whose tokens were read a moment ago."""
        now = time.perf_counter()
        if step.sampled and step.seconds and self._ready is not None:
            # Steps follow each other on the device, so one takes from the last one's end to its own.
            seconds = now - max(self._ready, step.enqueued)
            ratio = min(max(seconds / step.seconds, self._FASTEST), self._SLOWEST)
            self.ratio += self._WEIGHT * (ratio - self.ratio)
        # A step without tokens ends unnoticed, and the next one bears its time.
        self._ready = now if step.sampled else None


class Loop:
    """One agent's scheduling. Not thread-safe: `submit`, `cancel` and `step` are called by one
    thread; `stats` may be called by any."""

    def __init__(
        self,
        graph: ServingGraph,
        device: Runner,
        config: EngineConfig,
        loads: Loads | None = None,
    ):
        """Takes over what was loaded already, if anything; requests bring the rest."""
        self.graph, self.device, self.config = graph, device, config
        self.loads = loads or Loads(graph, config)
        self.loads.attach(device, self._widen)
        self.residency = self.loads.residency
        self._instances = graph.instances
        self._sequences = Admission(device, config)
        self.profile = Profile(device)
        self._sweeper = Stepper(device, self.profile, self._sequences.rows, self._sequences.kv)
        self._pace = Pace()
        self._outputs: list[Output] = []
        self._in_flight: Step | None = None
        self._generated_tokens = 0
        self.report_running: ReportRunning = lambda begun, ended: None
        self._reported: set[str] = set()

    @property
    def kv(self) -> KVCacheManager:
        """The KV pages."""
        return self._sequences.kv

    @property
    def idle(self) -> bool:
        """Nothing is waiting, running or in flight."""
        return self.stalled and not self._sequences.waiting

    @property
    def stalled(self) -> bool:
        """All that is there waits for something other than the next step."""
        return not self._sequences.running and self._in_flight is None

    def switch(self, graph: ServingGraph) -> None:
        """Serves another set of chains from the next step on. Every program it needs has been made.

        Requests submitted before stay with the chain version they were bound to; its blocks leave when
        the last of them ends.
        """
        self.graph = graph
        self.residency.switch(graph)
        for sequence in self._sequences.waiting:
            sequence.route = sequence.lease.route
        self._merge_instances()
        self.profile.forget()

    def _widen(self, targets: Targets, adapter: Adapter) -> None:
        """Makes tables for more projections, where no keeper does it."""
        old = self.graph
        chains = {name: route.chain for name, route in old.routes.items()}

        def done(graph: ServingGraph | None, error: Exception | None) -> None:
            if graph is None:
                self.residency.refuse(adapter, f"{adapter.name} cannot be served: {error}")
            else:
                self.switch(graph)

        make = functools.partial(assemble, old.zoo, chains, self.config, old, targets)
        self.loads.background("adapter", make, done)

    def _merge_instances(self) -> None:
        """Instances to sweep: those of the graph, and older ones that requests still pass."""
        live = {id(i): i for i in self.graph.instances}
        for sequence in self._sequences:
            live |= {id(i): i for i in sequence.route.instances}
        self._instances = tuple(sorted(live.values(), key=lambda i: i.depth))

    def submit(self, request: Request) -> None:
        """Queues a request, or refuses it with an error output."""
        route = self.graph.routes.get(request.model)
        if route is None:
            names = sorted(self.graph.routes)
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            self._refuse(
                request, "NOT_FOUND", f"model {request.model!r} is not served; served: {known}"
            )
            return
        if request.version not in (0, route.chain.version):
            self._refuse(
                request,
                "ABORTED",
                f"model {request.model!r} is served in version {route.chain.version} by now, not "
                f"{request.version}; send the request again",
            )
            return
        limit = self.device.max_model_len(route)
        remedy = self.device.limit_remedy(limit)
        problem = request_problem(request, route.chain, limit, remedy)
        if not problem and self._sequences.find(request.request_id):
            problem = f"request_id {request.request_id!r} is already in flight; give another"
        if problem:
            self._refuse(request, "INVALID_ARGUMENT", problem)
            return
        sampling = request.sampling
        max_tokens = min(sampling.max_tokens, limit - len(request.token_ids))
        if len(request.generated) >= max_tokens:
            # An engine before this one ended with the last token, before it could say so.
            self._outputs.append(Output(request_id=request.request_id, finish_reason="length"))
            return
        self._sequences.waiting.append(
            Sequence(
                request=request,
                route=route,
                max_tokens=max_tokens,
                seed=secrets.randbits(32) if sampling.seed is None else sampling.seed,
                lease=self.residency.acquire(route),
                generated=list(request.generated),
            )
        )

    def cancel(self, request_id: str) -> None:
        """Ends a request; what it held is free for the next step."""
        sequence = self._sequences.find(request_id)
        if sequence is not None:
            self._finish(sequence, "cancelled")

    def step(self) -> list[Output]:
        """Enqueues one sweep, then reads the tokens of the sweep before it.

        Returns:
          Outputs since the last call.
        """
        with TraceAnnotation("load"):
            self.loads.pump()
        for sequence in [s for s in self._sequences.waiting if s.lease.error]:
            fields = {"error_code": sequence.lease.error_code}
            self._finish(sequence, "error", error_message=sequence.lease.error, **fields)
        with TraceAnnotation("admit"):
            self._sequences.admit()
        self._report_running()
        enqueued = self._enqueue()
        if self._in_flight is not None:
            with TraceAnnotation("read_tokens"):
                self._collect(self._in_flight)
            self._pace.note(self._in_flight)
        self.kv.host.land()
        self._in_flight = enqueued
        if len(self._instances) > len(self.graph.instances):
            self._merge_instances()
        outputs, self._outputs = self._outputs, []
        return outputs

    def _report_running(self) -> None:
        """Says which requests the step to come computes, before it can end the process."""
        running = self._sequences.running.keys()
        if running != self._reported:
            begun, ended = running - self._reported, self._reported - running
            self.report_running(tuple(begun), tuple(ended))
            self._reported = set(running)

    def measure(self) -> bool:
        """Times one call of a program that the profile lacks. Call it when idle; False: none is lacking."""
        self.profile.prepare(self._instances)
        if self.profile.complete:
            return False
        self.profile.measure_one()
        return True

    def measure_again(self) -> bool:
        """Times one call once more that an earlier start measured. Call it when idle, after `measure`;
        False: none is left."""
        return self.profile.measure_again()

    def _enqueue(self) -> Step | None:
        """Plans a step and sends it to the device; None when there is nothing to do."""
        sequences = self._sequences
        running = sequences.running.values()
        budget = self.config.step_ms / 1e3 / self._pace.ratio
        # Nobody waits for the next token of a prompt: only streams need steps that end soon.
        streams = any(s.computed >= s.prefill for s in running)
        decoding = self._in_flight.decode_seconds if self._in_flight else 0.0
        for_prompts = policy.prompt_seconds(budget, decoding) if streams else math.inf
        chunks = sorted({b.q_len for b in self.device.buckets if b.q_len > 1})
        with TraceAnnotation("plan"):
            items = plan(sequences, chunks, for_prompts, self._chunk_seconds)
        if not items and all(s.item is None for s in running):
            return None
        return self._sweeper.sweep(items, self._instances, sequences.passing, for_prompts, budget)

    def _chunk_seconds(self, route: Route, chunk: int) -> float | None:
        return self.profile.chunk_seconds(route.instances, chunk)

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        executables, sequences, ran = (
            self.device.executables,
            self._sequences,
            self._sweeper.counters,
        )
        counts = self.residency.counts
        return EngineStats(
            steps=ran.steps,
            block_calls=ran.block_calls,
            block_rows=ran.block_rows,
            model_calls=ran.model_calls,
            model_rows=ran.model_rows,
            compiles_on_serving_path=executables.compiles_on_serving_path,
            compiles_in_background=executables.compiles_in_background,
            running=len(sequences.running),
            waiting=len(sequences.waiting),
            pages_free=sum(p.free for p in self.kv.pools.values()),
            pages_total=sum(p.total for p in self.kv.pools.values()),
            rows_free=sequences.rows.free,
            rows_total=sequences.rows.total,
            resident_bytes=self.residency.weight_bytes + self.graph.table_bytes,
            chains=len(self.graph.routes),
            chains_resident=self.residency.resident_chains,
            adapters_resident=self.residency.adapters,
            host_bytes=self.loads.cache.bytes,
            residency_hits=counts.hits,
            residency_misses=counts.misses,
            host_hits=self.loads.cache.hits,
            host_misses=self.loads.cache.misses,
            loads=counts.loads,
            load_failures=counts.failures,
            evictions=counts.evictions,
            prompt_tokens=ran.prompt_tokens,
            cached_tokens=self.kv.hit_tokens,
            preemptions=sequences.preemptions,
            swaps=sequences.swaps,
            host_kv_bytes=self.kv.host.used,
            generated_tokens=self._generated_tokens,
            kernels_replaced=len(backends.replaced()),
        )

    def _refuse(self, request: Request, code: str, message: str) -> None:
        self._outputs.append(
            Output(
                request_id=request.request_id,
                finish_reason="error",
                error_code=code,
                error_message=message,
            )
        )

    def _collect(self, step: Step) -> None:
        """Reads a step's tokens from the device and hands them to their requests."""
        for sampled in step.sampled:
            packed = np.asarray(sampled.packed)
            logprobs = packed[:, 1].view(np.float32)
            top = None if sampled.top is None else np.asarray(sampled.top)
            scores = None if sampled.scores is None else np.asarray(sampled.scores)
            for i, item in enumerate(sampled.batch.items):
                # A sequence that ended a step ago still had this row in flight.
                if item.sequence.finished:
                    continue
                if item.scores and scores is not None:
                    item.sequence.take_scores(item.start, scores[i, : item.q_len].tolist())
                if item.samples:
                    picked = Picked(int(packed[i, 0]), float(logprobs[i]), bool(packed[i, 2]))
                    best = None if top is None else top[i]
                    self._token(item.sequence, picked, best)

    def _token(self, sequence: Sequence, picked: Picked, top: np.ndarray | None) -> None:
        request, chain = sequence.request, sequence.route.chain
        if not picked.finite:
            self._finish(
                sequence,
                "error",
                error_code="INTERNAL",
                error_message=(
                    f"model {chain.name!r} version {chain.version} computed NaN or Inf for this "
                    "request; check its weights with `jblock-convert fsck`, other models go on"
                ),
            )
            return
        fields: dict[str, Any] = {}
        if sequence.scores_prompt:
            fields["prompt_logprobs"] = tuple(sequence.prompt_logprobs)
        if picked.token in sequence.end_ids:
            self._finish(sequence, "stop", **fields)
            return
        sequence.generated.append(picked.token)
        self._generated_tokens += 1
        fields["token_ids"] = (picked.token,)
        if request.sampling.logprobs:
            fields["logprobs"] = (picked.logprob,)
        if request.sampling.top_logprobs and top is not None:
            fields["top_logprobs"] = (best_tokens(top, request.sampling.top_logprobs),)
        if len(sequence.generated) >= sequence.max_tokens:
            self._finish(sequence, "length", **fields)
        else:
            self._outputs.append(Output(request_id=request.request_id, **fields))

    def _finish(self, sequence: Sequence, reason: str, **fields) -> None:
        """Sends the last output and gives back all the sequence held."""
        sequence.finished = True
        request_id = sequence.request.request_id
        self._outputs.append(Output(request_id=request_id, finish_reason=reason, **fields))
        self._sequences.end(sequence, poisoned=reason == "error")
        self.residency.release(sequence.lease)
