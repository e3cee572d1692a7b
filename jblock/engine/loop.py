"""The agent's loop: admit, plan, sweep the instances, read tokens one step behind."""

import collections
import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jblock.engine.api import EngineStats, Output, Request
from jblock.engine.assembly import Assembly, KvGroup, Route
from jblock.engine.batching import batches
from jblock.engine.config import Bucket, EngineConfig
from jblock.engine.device import Device, Sampled
from jblock.engine.kv import Allocator
from jblock.engine.kv_cache import KvCache
from jblock.engine.limits import sampling_problem
from jblock.engine.logprobs import best_tokens
from jblock.engine.sequence import Item, chunk_for
from jblock.engine.sequence import Sequence as Seq


class Picked(NamedTuple):
    """One row a sampler returned: token, its log-probability, whether all its logits were finite."""

    token: int
    logprob: float
    finite: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """One sweep that was enqueued: the tokens it will bring, and the rows to give back then."""

    sampled: tuple[Sampled, ...]


class Loop:
    """One agent's scheduling state. Not thread-safe: `submit`, `cancel` and `step` are called by one
    thread; `stats` may be called by any."""

    def __init__(self, assembly: Assembly, device: Device, config: EngineConfig):
        self.assembly, self.device, self.config = assembly, device, config
        self._instances = assembly.instances
        self._waiting: collections.deque[Seq] = collections.deque()
        self._running: dict[str, Seq] = {}
        self._rows = Allocator(device.num_rows)
        self._seq_slots = Allocator(config.max_num_seqs)
        self.kv = KvCache(device.pool_shapes, config.page_size, device.scrub)
        self._outputs: list[Output] = []
        self._in_flight: Step | None = None
        self._steps = 0
        self._model_calls = self._model_rows = 0
        self._prompt_tokens = self._generated_tokens = 0
        self._preemptions = 0
        self._block_calls = self._block_rows = 0

    @property
    def idle(self) -> bool:
        """Nothing is waiting, running or in flight."""
        return not (self._waiting or self._running or self._in_flight)

    @property
    def stalled(self) -> bool:
        """All that is there waits for something other than the next step."""
        return not (self._running or self._in_flight)

    def switch(self, assembly: Assembly) -> None:
        """Serves another set of chains from the next step on. Every program it needs has been made.

        Requests submitted before stay with the chain version they were bound to; its blocks leave when
        the last of them ends.
        """
        self.assembly = assembly
        self._merge_instances()

    def _merge_instances(self) -> None:
        """Instances to sweep: those of the assembly, and older ones that requests still pass."""
        live = {id(i): i for i in self.assembly.instances}
        for sequence in (*self._running.values(), *self._waiting):
            live |= {id(i): i for i in sequence.route.instances}
        self._instances = tuple(sorted(live.values(), key=lambda i: i.depth))

    def submit(self, request: Request) -> None:
        """Queues a request, or refuses it with an error output."""
        route = self.assembly.routes.get(request.model)
        if route is None:
            known = ", ".join(sorted(self.assembly.routes))
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
        problem = self._problem(request, route)
        if problem:
            self._refuse(request, "INVALID_ARGUMENT", problem)
            return
        sampling = request.sampling
        room = self._max_model_len(route) - len(request.token_ids)
        self._waiting.append(
            Seq(
                request=request,
                route=route,
                max_tokens=min(sampling.max_tokens, room),
                seed=secrets.randbits(32) if sampling.seed is None else sampling.seed,
            )
        )

    def cancel(self, request_id: str) -> None:
        """Ends a request; what it held is free for the next step."""
        sequence = self._running.get(request_id) or next(
            (s for s in self._waiting if s.request.request_id == request_id), None
        )
        if sequence is not None:
            self._finish(sequence, "cancelled")

    def step(self) -> list[Output]:
        """Enqueues one sweep, then reads the tokens of the sweep before it.

        Returns:
          Outputs since the last call.
        """
        self._admit()
        buckets = self.device.buckets
        items = self._plan(tuple(sorted({b.q_len for b in buckets if b.q_len > 1})))
        enqueued = self._sweep(items, buckets) if items else None
        if self._in_flight is not None:
            self._collect(self._in_flight)
        self._in_flight = enqueued
        if len(self._instances) > len(self.assembly.instances):
            self._merge_instances()
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        executables = self.device.executables
        return EngineStats(
            steps=self._steps,
            block_calls=self._block_calls,
            block_rows=self._block_rows,
            model_calls=self._model_calls,
            model_rows=self._model_rows,
            compiles_on_serving_path=executables.compiles_on_serving_path,
            compiles_in_background=executables.compiles_in_background,
            running=len(self._running),
            waiting=len(self._waiting),
            pages_free=sum(p.free for p in self.kv.pools.values()),
            pages_total=sum(p.total for p in self.kv.pools.values()),
            rows_free=self._rows.free,
            rows_total=self._rows.total,
            resident_bytes=self.assembly.resident_bytes,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self.kv.hit_tokens,
            preemptions=self._preemptions,
            generated_tokens=self._generated_tokens,
        )

    def _max_model_len(self, route: Route) -> int:
        return min(self.config.max_model_len, route.chain.max_position)

    def _problem(self, request: Request, route: Route) -> str:
        """What makes a request impossible to serve, or ""."""
        limit = self._max_model_len(route)
        count = len(request.token_ids)
        vocab = route.chain.vocab_size
        if count == 0:
            return "token_ids is empty; give at least one token"
        if count >= limit:
            return (
                f"token_ids has {count} tokens; model {request.model!r} takes at most {limit - 1} "
                "and one to generate: shorten the prompt"
            )
        wrong = next((t for t in request.token_ids if not 0 <= t < vocab), None)
        if wrong is not None:
            return f"token_ids has {wrong}; ids of {request.model!r} go from 0 to {vocab - 1}"
        problem = sampling_problem(request.sampling, route.chain)
        if problem:
            return problem
        open_ids = (s.request.request_id for s in (*self._running.values(), *self._waiting))
        if request.request_id in open_ids:
            return f"request_id {request.request_id!r} is already in flight; give another"
        return ""

    def _refuse(self, request: Request, code: str, message: str) -> None:
        self._outputs.append(
            Output(
                request_id=request.request_id,
                finish_reason="error",
                error_code=code,
                error_message=message,
            )
        )

    def _admit(self) -> None:
        """Starts waiting requests in order. One that lacks pages holds back only those that want
        pages of the same group; one whose prompt begins as a prompt being computed waits for it, and
        one that needs programs still being made waits for them."""
        held: set[KvGroup] = set()
        still_waiting: collections.deque[Seq] = collections.deque()
        while self._waiting and self._seq_slots.free and self._rows.free:
            sequence = self._waiting.popleft()
            groups = sequence.route.groups
            not_yet = self.device.plain_only and not sequence.plain
            if not_yet or self.kv.awaits(sequence):
                still_waiting.append(sequence)
                continue
            if held.intersection(groups) or not self.kv.admit(sequence):
                held.update(groups)
                still_waiting.append(sequence)
                continue
            sequence.seq_slot = self._seq_slots.take(1)[0]
            sequence.row = self._rows.take(1)[0]
            sequence.prefill = len(sequence.known)
            sequence.sampled = len(sequence.generated)
            self._running[sequence.request.request_id] = sequence
        still_waiting.extend(self._waiting)
        self._waiting = still_waiting

    def _plan(self, chunks: tuple[int, ...]) -> list[Item]:
        """One item a sequence: the token it decodes, or the next chunk of its prompt if rows allow.

        Decoding goes first; prompts take the rows that are left, oldest first.
        """
        items: list[Item] = []
        prefilling = []
        for sequence in list(self._running.values()):
            if sequence.seq_slot < 0:
                continue  # gave way to an older one a moment ago
            if sequence.computed < sequence.prefill:
                prefilling.append(sequence)
            elif sequence.sampled < sequence.max_tokens:
                start = sequence.prompt_len + sequence.sampled - 1
                if self._make_room(sequence, start + 1):
                    items.append(Item(sequence, start, 1, 1, [sequence.row], (), True))
                    sequence.sampled += 1
        for sequence in prefilling:
            if sequence.seq_slot < 0:
                continue
            start = sequence.computed
            length, chunk = chunk_for(sequence.prefill - start, chunks)
            if length - 1 > self._rows.free:
                break
            rows = [sequence.row, *self._rows.take(length - 1)]
            tokens = sequence.known[start : start + length]
            sequence.computed += length
            self.kv.remember(sequence, sequence.computed)
            samples = sequence.computed == sequence.prefill
            sequence.sampled += samples
            scores = sequence.scores_prompt
            items.append(Item(sequence, start, length, chunk, rows, tokens, samples, scores))
        return items

    def _make_room(self, sequence: Seq, num_tokens: int) -> bool:
        """Pages for one more token of a sequence; under pressure the youngest sequences of its groups
        give way and are computed anew later. False: it was the youngest itself."""
        groups = set(sequence.route.groups)
        while not self.kv.grow(sequence, num_tokens):
            rivals = [s for s in self._running.values() if groups.intersection(s.route.groups)]
            self._preempt(rivals[-1])
            if rivals[-1] is sequence:
                return False
        return True

    def _preempt(self, sequence: Seq) -> None:
        """Takes all a sequence holds and puts it first in the queue; its prefix stays cached for as
        long as nobody wants the pages."""
        self._preemptions += 1
        self._release(sequence)
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Seq, poisoned: bool = False) -> None:
        """Gives back the pages, row and slot of a running sequence."""
        del self._running[sequence.request.request_id]
        if not poisoned:
            written = sequence.computed
            if written == sequence.prefill:
                written = min(sequence.prompt_len + sequence.sampled - 1, len(sequence.known))
            self.kv.remember(sequence, written)
        self.kv.release(sequence, poisoned)
        self._rows.give([sequence.row])
        self._seq_slots.give([sequence.seq_slot])
        sequence.seq_slot = sequence.row = -1
        sequence.computed = 0

    def _sweep(self, items: list[Item], buckets: Sequence[Bucket]) -> Step:
        """Takes every item through all its instances, in chain order, batching per instance."""
        self._count(items, buckets)
        self.device.begin_step()
        for item in items:
            item.sequence.route.instances[0].queue.append(item)
        sampled = []
        with jax.profiler.StepTraceAnnotation("sweep", step_num=self._steps):
            for instance in self._instances:
                if not instance.queue:
                    continue
                ready = list(instance.queue)
                instance.queue.clear()
                for batch in batches(ready, buckets):
                    result = self.device.run(instance, batch)
                    self._block_calls += 1
                    self._block_rows += batch.num_rows
                    if result is not None:
                        sampled.append(result)
                for item in ready:
                    self._forward(item)
        self._steps += 1
        # The device runs calls in the order they were enqueued, so rows are free for the next sweep.
        for item in items:
            self._rows.give(item.rows[1:])
        return Step(tuple(sampled))

    def _forward(self, item: Item) -> None:
        """Queues an item at its next instance; one whose logits nobody wants skips the head."""
        item.hop += 1
        route = item.sequence.route
        if item.hop < len(route.instances):
            instance = route.instances[item.hop]
            if item.samples or item.scores or not instance.is_head:
                instance.queue.append(item)

    def _count(self, items: list[Item], buckets: Sequence[Bucket]) -> None:
        """Counts the batches a server of one model each would have run with the same items."""
        by_route: dict[int, list[Item]] = {}
        for item in items:
            by_route.setdefault(id(item.sequence.route), []).append(item)
        self._model_calls += sum(len(list(batches(own, buckets))) for own in by_route.values())
        self._model_rows += sum(i.q_len for i in items)
        self._prompt_tokens += sum(len(i.tokens) for i in items)

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

    def _token(self, sequence: Seq, picked: Picked, top: np.ndarray | None) -> None:
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

    def _finish(self, sequence: Seq, reason: str, **fields) -> None:
        """Sends the last output and gives back all the sequence held."""
        sequence.finished = True
        request_id = sequence.request.request_id
        self._outputs.append(Output(request_id=request_id, finish_reason=reason, **fields))
        if request_id in self._running:
            self._release(sequence, poisoned=reason == "error")
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
