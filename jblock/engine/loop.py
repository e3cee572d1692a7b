"""The agent's loop: admit, schedule, run a forward step, read tokens one step behind."""

import contextlib
import functools
import math
import secrets
import time

import jax
import numpy as np
from absl import logging
from jax.profiler import TraceAnnotation

from jblock.engine.api import EngineStats, Output, ReportRunning, Request
from jblock.engine.config import EngineConfig
from jblock.engine.constrained import ConstrainedSampling
from jblock.engine.graph.build import assemble
from jblock.engine.graph.graph import ServingGraph
from jblock.engine.graph.order import visiting_order
from jblock.engine.kv_cache.host_offload import HostPool
from jblock.engine.kv_cache.manager import KVCacheManager
from jblock.engine.programs.needed import Pools
from jblock.engine.runner.latency_profile import Pace, Profile
from jblock.engine.runner.resizing import resize_pools
from jblock.engine.runner.runner import Runner
from jblock.engine.runner.step import BlockQueues, Step, Stepper
from jblock.engine.scheduling import request_checks
from jblock.engine.scheduling.deadlines import deadline_problem, set_deadline
from jblock.engine.scheduling.fairness import VirtualTokenCounter
from jblock.engine.scheduling.scheduler import Scheduler
from jblock.engine.scheduling.sequence import Picked, SequenceState
from jblock.engine.scheduling.step_budget import PROMPT_SHARE
from jblock.engine.spans.port import Port
from jblock.engine.spans.spans import Spans
from jblock.engine.speculation.speculation import speculation_of
from jblock.engine.stats import BlockTable, collect_stats
from jblock.engine.weights.loader import Loads, Targets
from jblock.engine.weights.residents import Adapter


class Loop:
    """One agent's scheduling. Not thread-safe: one thread calls it; others read a snapshot (stats.py)."""

    def __init__(
        self,
        graph: ServingGraph,
        device: Runner,
        config: EngineConfig,
        loads: Loads | None = None,
        counter: VirtualTokenCounter | None = None,
        port: Port | None = None,
    ):
        """Takes over what was loaded already, if anything. The port leads to agents on which chains go on."""
        self.graph, self.device, self.config = graph, device, config
        self.loads = loads or Loads(graph.zoo, graph.placement, graph.resident_set, config)
        self.loads.attach(device, self._widen)
        self.weight_cache = self.loads.weight_cache
        host = HostPool(config.host_kv_memory_mb * 10**6, device.longest_bytes(graph))
        self.kv = KVCacheManager(
            device.pool_shapes,
            config.page_size,
            config.max_num_seqs,
            config.max_pages,
            device.state,
            host,
        )
        queues = BlockQueues(graph.instances)
        self._sequences = Scheduler(config, self.kv, device.num_rows, queues.withdraw, counter)
        self.profile = Profile(device)
        self._stepper = Stepper(device, self.profile, queues, self._sequences.rows, self.kv)
        self._pace, self._blocks = Pace(), BlockTable()
        parts = (device, self._sequences, self._stepper, self.weight_cache, self._finish)
        self.spans = Spans(port, *parts) if port else None
        self.constrained = ConstrainedSampling(device, self._sequences, self._finish)
        # Drafts need all blocks here.
        known = (device, self.profile, self._pace, self._sequences)
        self._speculation = None if port else speculation_of(*known)
        self._outputs: list[Output] = []
        self._in_flight: Step | None = None
        self._generated_tokens = 0
        self.report_running: ReportRunning = lambda begun, ended: None
        self._reported: set[str] = set()
        self._pools_after: Pools | None = None
        self._retiring = False

    @property
    def idle(self) -> bool:
        """Nothing is waiting, running or in flight."""
        return not self._sequences.running and self.stalled and not self._sequences.waiting

    @property
    def stalled(self) -> bool:
        """All that is there waits for something other than the next step."""
        return not self._in_flight and all(s.rests for s in self._sequences.running.values())

    def switch(self, graph: ServingGraph, pools: Pools | None = None) -> None:
        """Serves another set of chains from the next step on. Every program it needs has been made.

        Requests submitted before stay with the chain version they were bound to; its blocks leave when
        the last of them ends.

        Args:
          graph: to serve.
          pools: their sizes once the last of those has ended; None: as they are.
        """
        self.graph = graph
        self.loads.switch(graph.resident_set)
        for sequence in self._sequences.waiting:
            route = graph.routes.get(sequence.route.chain.name)
            if route is not None and route.needs is sequence.lease.needs:
                sequence.bind(route)
        self._pools_after = pools
        self.retire()
        self.profile.forget()

    def resize_pools(self, pools: Pools) -> None:
        """See `resizing.resize_pools`."""
        resize_pools(self.device, self._sequences, pools)

    def _widen(self, targets: Targets, adapter: Adapter) -> None:
        """Makes tables for more projections, where nobody else does it."""
        old = self.graph
        chains = {name: route.chain for name, route in old.routes.items()}

        def done(graph: ServingGraph | None, error: Exception | None) -> None:
            if graph is None:
                self.weight_cache.refuse(adapter, f"{adapter.name} cannot be served: {error}")
            else:
                graph.make_tables()
                self.switch(graph)

        make = functools.partial(assemble, old.zoo, chains, self.config, old, targets)
        self.loads.background("adapter", adapter.name, make, done)

    def retire(self) -> None:
        """Lets go of blocks, registers, tables, pools that neither the graph nor a running request needs."""
        graph, device = self.graph, self.device
        old = [s.route for s in self._sequences if not graph.has(s.route)]
        order, widths, layers = graph.instances, set(graph.widths), dict(graph.kv_layers)
        for route in old:
            widths |= route.widths
            for shape, digests in route.kv_digests.items():
                layers[shape] = max(layers.get(shape, 0), len(digests))
            layers |= {boundary.shape: 1 for boundary in route.boundaries}
        if old:
            order = visiting_order([*graph.routes.values(), *old])
        self._stepper.queues.reorder(order)
        device.state.set_registers(widths)
        if not device.pools_held:
            device.kv_layers = layers
            self.loads.drop_tables(route.needs for route in old)
            if not old and self._pools_after is not None:
                self.resize_pools(self._pools_after)
                self._pools_after = None
        self._retiring = bool(old) or self._pools_after is not None

    def submit(self, request: Request) -> None:
        """Queues a request, or refuses it with an error output."""
        refusal = request_checks.route_problem(request, self.graph.routes)
        if refusal is not None:
            self.refuse(request, *refusal)
            return
        route = self.graph.routes[request.model]
        limit = self.device.max_model_len(route)
        remedy = self.device.limit_remedy(route)
        problem = request_checks.request_problem(request, route.chain, limit, remedy)
        if not problem and self._sequences.find(request.request_id):
            problem = f"request_id {request.request_id!r} is already in flight; give another"
        if problem:
            self.refuse(request, "INVALID_ARGUMENT", problem)
            return
        sampling = request.sampling
        max_tokens = min(sampling.max_tokens, limit - len(request.token_ids))
        if len(request.generated) >= max_tokens:
            # An engine before this one ended with the last token, before it could say so.
            self._outputs.append(Output(request_id=request.request_id, finish_reason="length"))
            return
        sequence = SequenceState(
            request=request,
            route=route,
            max_tokens=max_tokens,
            seed=secrets.randbits(32) if sampling.seed is None else sampling.seed,
            lease=self.weight_cache.acquire(route.needs),
            generated=list(request.generated),
            constraint=self.constrained.begin(request, route, self.graph.zoo)
            if sampling.grammar
            else None,
        )
        if self.spans is not None:
            self.spans.home.begin(sequence)
        if request.deadline is not None:
            set_deadline(sequence, self.profile.machine(), self.kv)
        self._sequences.add(sequence)
        self._refuse_late()

    def cancel(self, request_id: str) -> None:
        """Ends a request; what it held is free for the next step."""
        sequence = self._sequences.find(request_id)
        if sequence is not None:
            self._finish(sequence, "cancelled")

    def step(self) -> list[Output]:
        """Enqueues one step, then reads the tokens of the one before; returns outputs since the last call."""
        if self.loads.deferred or self.loads.warming:
            with TraceAnnotation("load"):
                self.loads.pump()
        waiting = self._sequences.waiting if self.weight_cache.failed else ()
        for sequence in [s for s in waiting if s.lease.error]:
            fields = {"error_code": sequence.lease.error_code}
            self._finish(sequence, "error", error_message=sequence.lease.error, **fields)
        self._refuse_late()
        if self.constrained.open:
            self.constrained.end_over()
        if self._sequences.waiting:
            with TraceAnnotation("admit"):
                self._sequences.admit(self.profile.machine())
        self._report_running()
        try:
            self._forward()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            self._give_way(error)
        if self._retiring:
            self.retire()
        outputs, self._outputs = self._outputs, []
        return outputs

    def _refuse_late(self) -> None:
        """Ends what waits and can no more be done by its deadline: nobody would see the end of it."""
        fields = {"error_code": "DEADLINE_EXCEEDED"}
        for sequence in self._sequences.waiting.too_late(time.monotonic()):
            self._finish(sequence, "error", error_message=deadline_problem(sequence), **fields)

    def _forward(self) -> None:
        """Enqueues a step, and reads the one before; the other way round where drafts are worth it. Where
        it fails, what may still be read is in flight."""
        before, drafts = self._in_flight, self._speculation
        # 0 until it is measured: nothing is drafted.
        decoding = before.decode_seconds if before else 0.0
        if before and drafts and (decoding or drafts.sent) and drafts.reads_first(before):
            self._read()
        enqueued = self._enqueue(decoding)
        self._read()
        self._in_flight = enqueued
        if self.constrained.open:
            idle = enqueued is before is None
            self._in_flight = self.constrained.sample(enqueued, idle=idle)
        if self.kv.host.used:
            self.kv.host.land()
        self._sequences.note_step()

    def _read(self) -> None:
        """Reads the step in flight, if there is one."""
        before, self._in_flight = self._in_flight, None
        if before is not None:
            with TraceAnnotation("read_tokens"):
                self._collect(before)
            self._pace.note(before.enqueued, before.seconds, bool(before.sampled))
            if self._speculation and self._speculation.sent:
                self._speculation.learn()

    def _give_way(self, error: Exception) -> None:
        """After a step for which the device had no memory: all sequences start over from the tokens they
        have, half as many at a time; one that ran alone fails.

        Raises:
          JaxRuntimeError: the device's arrays are lost with the step.
        """
        alone = len(self._sequences.running) == 1
        before, self._in_flight = self._in_flight, None
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if before is not None:
                self._collect(before)
        self.device.wait()
        running = self._sequences.start_over()
        logging.error("%s: %d sequences start over, half as many at a time", error, len(running))
        if alone and running:
            fields = {"error_message": request_checks.no_memory(error)}
            self._finish(running[0], "error", error_code="RESOURCE_EXHAUSTED", **fields)

    def _report_running(self) -> None:
        """Says which requests the step to come computes, before it can end the process."""
        running = self._sequences.running.keys()
        if running != self._reported:
            begun, ended = running - self._reported, self._reported - running
            self.report_running(tuple(begun), tuple(ended))
            self._reported = set(running)

    def measure(self) -> bool:
        """Times one call of a program that the profile lacks. Call it when idle; False: none is lacking."""
        self.profile.prepare(self.graph.instances)
        if self.profile.complete:
            return False
        self.profile.measure_one()
        return True

    def _enqueue(self, decoding: float) -> Step | None:
        """Plans a step, of which decoding takes about so many seconds, and sends it to the device; None when
        there is nothing to do."""
        sequences = self._sequences
        running, budget = sequences.running.values(), self.config.step_ms / 1e3 / self._pace.ratio
        # Nobody waits for the next token of a prompt: only streams need steps that end soon.
        streams = any(s.computed >= s.prefill for s in running)
        # Under a full load of decoding a prompt still moves on.
        for_prompts = max(budget - decoding, PROMPT_SHARE * budget) if streams else math.inf
        with TraceAnnotation("schedule"):
            items = sequences.schedule(self.profile.machine(), for_prompts)
            if self._speculation and decoding and self._in_flight is None:
                items = self._speculation.add_drafts(items, budget)
        if self.spans is not None:
            self.spans.take_rows()
        if not items and all(s.item is None or s.item.is_away for s in running):
            return None
        return self._stepper.run(items, sequences.prompts_in_flight, for_prompts, budget)

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        return collect_stats(
            self.device,
            self._sequences,
            self._stepper.counters,
            self._blocks.of(self._stepper.queues, self._sequences, self.graph),
            self.loads,
            self.graph,
            self._generated_tokens,
            self._speculation,
        )

    def refuse(self, request: Request, code: str, message: str) -> None:
        """Ends a request that was not taken."""
        name, error = request.request_id, "error"
        self._outputs.append(
            Output(request_id=name, finish_reason=error, error_code=code, error_message=message)
        )

    def _collect(self, step: Step) -> None:
        """Reads a step's tokens from the device and hands them to their requests."""
        for sampled in step.sampled:
            read = sampled.read()
            for i, item in enumerate(sampled.batch.items):
                sequence = item.sequence
                # A sequence that ended a step ago still had this row in flight.
                if sequence.finished or (item.drafted and not sequence.confirms(item)):
                    continue
                if sequence.tokens_only and item.samples and read.finite[i]:
                    self._plain_token(sequence, read.tokens[i])
                    continue
                if item.scores and read.scores is not None:
                    sequence.take_scores(item.start, read.scores[i, : item.q_len])
                if item.pools and read.pooled is not None:
                    sequence.take_pooled(item.start, read.pooled[i])
                if item.samples:
                    picked = Picked(read.tokens[i], read.logprobs[i], bool(read.finite[i]))
                    self._token(sequence, picked, None if read.top is None else read.top[i])

    def _plain_token(self, sequence: SequenceState, token: int) -> None:
        """What `_token` does, for one of which nothing else was asked."""
        if token in sequence.end_ids:
            self._finish(sequence, "stop")
            return
        generated = sequence.generated
        generated.append(token)
        self._generated_tokens += 1
        if len(generated) >= sequence.max_tokens:
            self._finish(sequence, "length", token_ids=(token,))
            return
        self._outputs.append(Output(request_id=sequence.request.request_id, token_ids=(token,)))

    def _token(self, sequence: SequenceState, picked: Picked, top: np.ndarray | None) -> None:
        chain = sequence.route.chain
        if not picked.finite:
            words = request_checks.not_finite(chain)
            self._finish(sequence, "error", error_code="INTERNAL", error_message=words)
            return
        if sequence.request.pooling:
            self._finish(sequence, "stop", embedding=sequence.embedding)
            return
        reason, fields = sequence.take(picked, top)
        self._generated_tokens += "token_ids" in fields
        if reason is not None:
            self._finish(sequence, reason, **fields)
            return
        if sequence.constraint is not None:
            self.constrained.take(sequence.constraint, picked.token)
        self._outputs.append(Output(request_id=sequence.request.request_id, **fields))

    def _finish(self, sequence: SequenceState, reason: str, **fields) -> None:
        """Sends the last output and gives back all the sequence held."""
        sequence.finished = True
        if sequence.guest is not None:
            self._sequences.end(sequence, poisoned=False)
            sequence.guest.end(fields.get("error_code", ""), fields.get("error_message", ""))
            return
        last = Output(request_id=sequence.request.request_id, finish_reason=reason, **fields)
        self._outputs.append(last)
        self._sequences.end(sequence, poisoned=reason == "error")
        self.weight_cache.release(sequence.lease)
        if sequence.constraint is not None:
            self.constrained.grammars.end(sequence.constraint)
