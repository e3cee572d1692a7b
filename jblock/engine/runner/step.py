"""One forward step: takes items through the queues of an agent's blocks, batching per block."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from jblock.engine.graph.graph import BlockInstance, Hop
from jblock.engine.kv_cache.manager import KVCacheManager
from jblock.engine.kv_cache.page_pool import IdAllocator
from jblock.engine.runner.batch import Batch, Cuts, batches
from jblock.engine.runner.latency_profile import Profile
from jblock.engine.runner.runner import Runner
from jblock.engine.runner.sampler import Logits, Sampled
from jblock.engine.runner.tracing import NOTHING, STEP, enabled
from jblock.engine.scheduling import step_budget
from jblock.engine.scheduling.sequence import WorkItem

# Steps between two looks at the batch limits: loads change more slowly than steps pass.
_ADAPT_STEPS = 16
# What the rows an instance has lately seen keep of their weight from one step to the next.
_MEMORY = 0.9


@dataclasses.dataclass(frozen=True)
class PartialBatch:
    """A batch of prompts part of the way through a block.

    Attributes:
      batch: what was cut.
      done: calls of the block it has behind it.
    """

    batch: Batch
    done: int


@dataclasses.dataclass(eq=False)
class BlockQueue:
    """Items at one block.

    Attributes:
      ready: to run in this step.
      held: for the next step: over the batch limit, or without time left. They go before new ones.
      partial: the batch of prompts between two of its layers, if the last step ended there.
      limit: rows it may decode in a step.
      wanted: rows that have lately come to it in a step.
      batches: that it ran.
      rows: of those.
      seconds: that they should have taken by the profile.
    """

    ready: list[WorkItem] = dataclasses.field(default_factory=list)
    held: list[WorkItem] = dataclasses.field(default_factory=list)
    partial: PartialBatch | None = None
    limit: int = step_budget.NO_LIMIT
    wanted: float = 0.0
    batches: int = 0
    rows: int = 0
    seconds: float = 0.0

    @property
    def waiting_rows(self) -> int:
        """Rows that a step left here."""
        partial = () if self.partial is None else self.partial.batch.items
        return sum(item.q_len for item in (*self.held, *partial))

    @property
    def empty(self) -> bool:
        """Nothing is here."""
        return not self.ready and not self.held and self.partial is None

    def withdraw(self, item: WorkItem) -> None:
        """Takes an item out, wherever it is."""
        if item in self.ready:
            self.ready.remove(item)
        elif item in self.held:
            self.held.remove(item)
        elif self.partial is not None:
            others = tuple(i for i in self.partial.batch.items if i is not item)
            batch = dataclasses.replace(self.partial.batch, items=others)
            self.partial = dataclasses.replace(self.partial, batch=batch) if others else None


class BlockQueues:
    """The queues of an agent's blocks, in the order in which a step visits them."""

    def __init__(self, order: Sequence[BlockInstance]):
        self._queues: dict[BlockInstance, BlockQueue] = {}
        self.reorder(order)

    def reorder(self, order: Sequence[BlockInstance]) -> None:
        """Takes another set of blocks; those with items in their queues must be among them."""
        self._queues = {i: self._queues.get(i) or BlockQueue() for i in order}

    def __getitem__(self, instance: BlockInstance) -> BlockQueue:
        return self._queues[instance]

    def __len__(self) -> int:
        return len(self._queues)

    def __iter__(self) -> Iterator[tuple[BlockInstance, BlockQueue]]:
        return iter(self._queues.items())

    def withdraw(self, item: WorkItem) -> None:
        """Takes an item out of the queue it is in."""
        self._queues[item.stage.instance].withdraw(item)

    def add(self, items: Iterable[WorkItem]) -> None:
        """Makes items ready at the blocks they stand at."""
        route, at, ready = None, 0, None
        for item in items:
            if ready is None or item.at != at or item.sequence.route is not route:
                route, at = item.sequence.route, item.at
                ready = self._queues[item.stage.instance].ready
            ready.append(item)


@dataclasses.dataclass
class Counters:
    """What was run so far.

    Attributes:
      steps: forward steps.
      block_calls: batches, one for each block they went through.
      block_rows: real rows of those.
      model_calls: batches that a server of one model each would have run with the same items.
      model_rows: real rows of those.
      prompt_tokens: rows that were tokens of a prompt.
      held_rows: rows that a step left in a queue, or between two layers, counted each step.
    """

    steps: int = 0
    block_calls: int = 0
    block_rows: int = 0
    model_calls: int = 0
    model_rows: int = 0
    prompt_tokens: int = 0
    held_rows: int = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """One forward step that was enqueued.

    Attributes:
      sampled: the tokens it will bring.
      waiting: logits to be sampled before the next step, once the tokens of the step before are read.
      seconds: what it should take by the profile; 0 if not known.
      decode_seconds: the part of that for decoding.
      enqueued: clock when it began to be enqueued.
      host_seconds: what enqueuing it took.
    """

    sampled: tuple[Sampled, ...]
    waiting: tuple[Logits, ...]
    seconds: float
    decode_seconds: float
    enqueued: float
    host_seconds: float


class Stepper:
    """Runs steps on a device.

    Attributes:
      counters: of what it ran.
      queues: of the blocks.
      leave: takes items that leave for another agent, their rows in their registers.
    """

    def __init__(
        self,
        device: Runner,
        profile: Profile,
        queues: BlockQueues,
        rows: IdAllocator,
        kv: KVCacheManager,
    ):
        """`rows` are the register rows; those of a chunk go back when it has passed, and from then on
        `kv` lets its pages be found."""
        self.counters, self.queues = Counters(), queues
        self.leave: Callable[[Hop, Sequence[WorkItem]], None] = lambda hop, items: None
        self._device, self._profile, self._rows, self._kv = device, profile, rows, kv
        self._cuts = Cuts()
        # Of a step and its grids what it added to the counters: the next has the same while all decode.
        self._counted: tuple[Any, Any, tuple[int, int, int]] = ((), (), (0, 0, 0))
        self._sampled: list[Sampled] = []
        self._waiting: list[Logits] = []
        self._seconds = self._decode_seconds = 0.0

    def run(
        self,
        items: Sequence[WorkItem],
        in_flight: Iterable[WorkItem] = (),
        prompt_seconds: float = math.inf,
        budget: float = math.inf,
    ) -> Step:
        """Takes every item through its blocks, as far as the step's time goes.

        Blocks are visited in their order, again and again until nothing is ready: chains may lead from
        one block to another and back.

        Args:
          items: new ones.
          in_flight: chunks of prompts that an earlier step left on their way, oldest first.
          prompt_seconds: time for chunks of prompts, by the profile.
          budget: time of the step, by the profile.
        """
        enqueued = time.perf_counter()
        self._count(items)
        self._device.begin_step()
        self._cuts.begin_step(self._device.buckets)
        for item in items:
            if not item.drafted:
                item.sequence.item = item
        chunks = [*in_flight, *(item for item in items if item.chunk > 1)]
        if chunks:
            step_budget.grant(chunks, prompt_seconds)
        self._sampled, self._waiting = [], []
        self._seconds = self._decode_seconds = 0.0
        number, traced = self.counters.steps, enabled()
        with jax.profiler.StepTraceAnnotation(STEP, step_num=number) if traced else NOTHING:
            for _, queue in self.queues:
                queue.ready.extend(queue.held)
                queue.held.clear()
            self.queues.add(items)
            self._visit_all()
        self.counters.steps += 1
        if self.counters.steps % _ADAPT_STEPS == 0:
            self._adapt(budget)
        return Step(
            tuple(self._sampled),
            tuple(self._waiting),
            self._seconds,
            self._decode_seconds,
            enqueued,
            time.perf_counter() - enqueued,
        )

    def _visit_all(self) -> None:
        """Visits blocks in order until none has anything ready."""
        for instance, queue in self.queues:
            if queue.ready or queue.partial is not None:
                self._visit(instance, queue)
        while any(queue.ready for _, queue in self.queues):
            for instance, queue in self.queues:
                if queue.ready:
                    self._visit(instance, queue)

    def _visit(self, instance: BlockInstance, queue: BlockQueue) -> None:
        """Runs what is ready at a block: decoding rows first, those that waited longest before
        the others; then prompts as far as their time goes."""
        ready, queue.ready = queue.ready, []
        if isinstance(instance, Hop):
            self.leave(instance, ready)
            return
        buckets = self._device.buckets
        cover = functools.partial(self._profile.cover, instance)
        decode = [item for item in ready if item.chunk == 1]
        queue.wanted = max(len(decode), _MEMORY * queue.wanted)
        if len(decode) > queue.limit:
            decode, over = decode[: queue.limit], decode[queue.limit :]
            # Drafts go with the row they are behind.
            with_them = {item.sequence for item in decode}
            decode += [i for i in over if i.is_draft and i.sequence in with_them]
            self._hold(queue, [i for i in over if not (i.is_draft and i.sequence in with_them)])
        for batch in self._cuts.batches(instance, decode, cover) if decode else ():
            self._decode_seconds += self._run(instance, queue, batch)
            self.pass_on(batch)
        if queue.partial is not None:
            self._walk(instance, queue, queue.partial)
        if len(ready) == len(decode):
            return
        chunks = [item for item in ready if item.chunk > 1]
        # One batch at a time stays between two layers.
        free = queue.partial is None
        going = [item for item in chunks if free and item.allowance > 0]
        self._hold(queue, [item for item in chunks if not (free and item.allowance > 0)])
        for batch in batches(going, buckets, cover):
            if queue.partial is None:
                self._walk(instance, queue, PartialBatch(batch, batch.first_layer))
            else:
                self._hold(queue, batch.items)

    def _walk(self, instance: BlockInstance, queue: BlockQueue, partial: PartialBatch) -> None:
        """Takes a batch of prompts through a block call by call while it has time; at least one call
        where any of it has been granted, so that it gets there."""
        batch, begin, end = partial.batch, partial.done, len(instance.layers)
        alone = self._profile.chunk_seconds((instance,), batch.bucket.q_len) or 0.0
        together = self._profile.block_seconds(instance, batch.bucket) or 0.0
        call, share = alone / end, together / end / len(batch.items)
        done = begin
        while done < end and sum(item.allowance for item in batch.items) > 0:
            for item in batch.items:
                item.allowance -= share
                item.seconds_left = max(item.seconds_left - call, 0.0)
            done += 1
        if done > begin:
            self._run(instance, queue, batch, begin, done)
        if done == end:
            queue.partial = None
            self.pass_on(batch)
        else:
            queue.partial = PartialBatch(batch, done)
            self.counters.held_rows += batch.num_rows

    def _run(
        self,
        instance: BlockInstance,
        queue: BlockQueue,
        batch: Batch,
        first: int = 0,
        last: int | None = None,
    ) -> float:
        """Enqueues a batch, or a part of its calls; returns the seconds it should take."""
        result = self._device.run(instance, batch, self._kv.tables, first, last)
        if first == batch.first_layer:
            self.counters.block_calls += 1
            self.counters.block_rows += batch.num_rows
            queue.batches += 1
            queue.rows += batch.num_rows
        if isinstance(result, Logits):
            self._waiting.append(result)
        elif result is not None:
            self._sampled.append(result)
        seconds = self._profile.block_seconds(instance, batch.bucket) or 0.0
        if last is not None:
            seconds *= (last - first) / len(instance.layers)
        self._seconds += seconds
        queue.seconds += seconds
        return seconds

    def _hold(self, queue: BlockQueue, items: Sequence[WorkItem]) -> None:
        """Leaves items in a queue for the next step, in front of those that come later."""
        queue.held.extend(items)
        self.counters.held_rows += sum(item.q_len for item in items)

    def pass_on(self, batch: Batch) -> None:
        """Queues items at their next block."""
        for instance, items in batch.onward:
            for item in items:
                item.at += 1
            if instance is not None:
                self.queues[instance].ready.extend(items)
                continue
            for item in items:
                if item is item.sequence.decode_item:
                    item.sequence.item = None
                elif item.is_draft:
                    self._rows.free(item.rows)
                else:
                    self.complete(item)

    def end(self, item: WorkItem) -> None:
        """No more of an item is enqueued: what it held is free."""
        item.sequence.item = None
        self._rows.free(item.rows[1:])

    def complete(self, item: WorkItem) -> None:
        """All of an item is enqueued: what it wrote is there for the next to read."""
        self.end(item)
        sequence = item.sequence
        # A guest knows the tokens it was opened with; its home may have read one more since.
        end = min(item.start + item.q_len, sequence.num_tokens)
        if item.of_prompt and self._kv.has_uncached(sequence.pages, end):
            self._kv.cache(sequence.pages, sequence.all_token_ids, end)

    def _adapt(self, budget: float) -> None:
        """New batch limits from what has come to each block lately."""
        active = []
        for instance, queue in self.queues:
            times = self._profile.decode_times(instance) if queue.wanted >= 1 else None
            if times is None or math.isinf(budget):
                queue.limit = step_budget.NO_LIMIT
            else:
                active.append((queue, times))
        limits = step_budget.batch_limits(
            [queue.wanted for queue, _ in active], [times for _, times in active], budget
        )
        for (queue, _), limit in zip(active, limits, strict=True):
            queue.limit = limit

    def _count(self, items: Sequence[WorkItem]) -> None:
        counters, buckets = self.counters, self._device.buckets
        if items != self._counted[0] or buckets is not self._counted[1]:
            by_route: dict[int, list[WorkItem]] = {}
            for item in items:
                by_route.setdefault(id(item.sequence.route), []).append(item)
            calls = sum(len(list(batches(own, buckets))) for own in by_route.values())
            tokens = sum(len(i.tokens) for i in items if i.of_prompt)
            self._counted = items, buckets, (calls, sum(i.q_len for i in items), tokens)
        calls, rows, tokens = self._counted[2]
        counters.model_calls += calls
        counters.model_rows += rows
        counters.prompt_tokens += tokens
