"""Takes items through the instances of an agent in chain order, batching per instance."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterable, Sequence

import jax

from jblock.engine.graph.graph import BlockInstance
from jblock.engine.kv_cache.manager import KVCacheManager
from jblock.engine.kv_cache.page_pool import IdAllocator
from jblock.engine.runner.batch import Batch, Underway, batches
from jblock.engine.runner.latency_profile import Profile
from jblock.engine.runner.runner import Runner, Sampled
from jblock.engine.runner.tracing import STEP
from jblock.engine.scheduling import step_budget as policy
from jblock.engine.scheduling.sequence import Sequence as Seq
from jblock.engine.scheduling.sequence import WorkItem

# Steps between two looks at the batch limits: loads change more slowly than steps pass.
_ADAPT_STEPS = 16
# What the rows an instance has lately seen keep of their weight from one step to the next.
_MEMORY = 0.9


@dataclasses.dataclass
class Counters:
    """What was run so far.

    Attributes:
      steps: sweeps.
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
    """One sweep that was enqueued.

    Attributes:
      sampled: the tokens it will bring.
      seconds: what it should take by the profile; 0 if not known.
      decode_seconds: the part of that for decoding.
      enqueued: clock when it began to be enqueued.
    """

    sampled: tuple[Sampled, ...]
    seconds: float
    decode_seconds: float
    enqueued: float


class Stepper:
    """Runs steps on a device.

    Attributes:
      counters: of what it ran.
    """

    def __init__(self, device: Runner, profile: Profile, rows: IdAllocator, kv: KVCacheManager):
        """`rows` are the register rows; those of a chunk go back when it has passed, and from then on
        `kv` lets its pages be found."""
        self.counters = Counters()
        self._device, self._profile, self._rows, self._kv = device, profile, rows, kv
        self._sampled: list[Sampled] = []
        self._seconds = self._decode_seconds = 0.0

    def sweep(
        self,
        items: Sequence[WorkItem],
        instances: Sequence[BlockInstance],
        passing: Iterable[WorkItem] = (),
        prompt_seconds: float = math.inf,
        budget: float = math.inf,
    ) -> Step:
        """Takes every item through its instances, as far as the step's time goes.

        Args:
          items: new ones.
          instances: in chain order.
          passing: chunks of prompts that an earlier step left on their way, oldest first.
          prompt_seconds: time for chunks of prompts, by the profile.
          budget: time of the step, by the profile.
        """
        enqueued = time.perf_counter()
        self._count(items)
        self._device.begin_step()
        for item in items:
            item.sequence.item = item
            item.sequence.route.instances[0].queue.append(item)
        chunks = [*passing, *(item for item in items if item.chunk > 1)]
        if math.isinf(prompt_seconds):
            for item in chunks:
                item.allowance = math.inf
        else:
            granted = policy.allowances([i.seconds_left for i in chunks], prompt_seconds)
            for item, allowance in zip(chunks, granted, strict=True):
                # A chunk nobody has measured passes as a whole.
                item.allowance = allowance if item.seconds_left else math.inf
        self._sampled, self._seconds, self._decode_seconds = [], 0.0, 0.0
        with jax.profiler.StepTraceAnnotation(STEP, step_num=self.counters.steps):
            for instance in instances:
                if instance.queue or instance.underway:
                    self._visit(instance)
        self.counters.steps += 1
        if self.counters.steps % _ADAPT_STEPS == 0:
            self._adapt(instances, budget)
        return Step(tuple(self._sampled), self._seconds, self._decode_seconds, enqueued)

    def _visit(self, instance: BlockInstance) -> None:
        """Runs what is ready at an instance: decoding rows first, those that waited longest before
        the others; then prompts as far as their time goes."""
        ready = list(instance.queue)
        instance.queue.clear()
        buckets = self._device.buckets
        cover = functools.partial(self._profile.cover, instance)
        decode = [item for item in ready if item.chunk == 1]
        instance.wanted = max(len(decode), _MEMORY * instance.wanted)
        if len(decode) > instance.limit:
            self._hold(instance, decode[instance.limit :])
            decode = decode[: instance.limit]
        for batch in batches(decode, buckets, cover):
            self._decode_seconds += self._run(instance, batch)
            self._pass_on(batch)
        if instance.underway is not None:
            self._walk(instance, instance.underway)
        if len(ready) == len(decode):
            return
        chunks = [item for item in ready if item.chunk > 1]
        # One batch at a time stays between two layers.
        free = instance.underway is None
        going = [item for item in chunks if free and item.allowance > 0]
        self._hold(instance, [item for item in chunks if not (free and item.allowance > 0)])
        for batch in batches(going, buckets, cover):
            if instance.underway is None:
                self._walk(instance, Underway(batch, 0))
            else:
                self._hold(instance, batch.items)

    def _walk(self, instance: BlockInstance, underway: Underway) -> None:
        """Takes a batch of prompts through a block call by call while it has time; at least one call
        where any of it has been granted, so that it gets there."""
        batch, begin = underway.batch, underway.done
        end = len(instance.units)
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
            self._run(instance, batch, begin, done)
        if done == end:
            instance.underway = None
            self._pass_on(batch)
        else:
            instance.underway = Underway(batch, done)
            self.counters.held_rows += batch.num_rows

    def _run(
        self, instance: BlockInstance, batch: Batch, first: int = 0, last: int | None = None
    ) -> float:
        """Enqueues a batch, or a part of its calls; returns the seconds it should take."""
        result = self._device.run(instance, batch, first, last)
        self.counters.block_calls += first == 0
        self.counters.block_rows += batch.num_rows if first == 0 else 0
        if result is not None:
            self._sampled.append(result)
        seconds = self._profile.block_seconds(instance, batch.bucket) or 0.0
        if last is not None:
            seconds *= (last - first) / len(instance.units)
        self._seconds += seconds
        return seconds

    def _hold(self, instance: BlockInstance, items: Sequence[WorkItem]) -> None:
        """Leaves items in a queue for the next sweep, in front of those that come later."""
        instance.queue.extendleft(reversed(items))
        self.counters.held_rows += sum(item.q_len for item in items)

    def _pass_on(self, batch: Batch) -> None:
        """Queues items at their next instance; one whose logits nobody wants skips the head."""
        for item in batch.items:
            item.hop += 1
            route = item.sequence.route
            if item.hop < len(route.instances):
                instance = route.instances[item.hop]
                if item.samples or item.scores or not instance.is_head:
                    instance.queue.append(item)
                    continue
            self._complete(item)

    def _complete(self, item: WorkItem) -> None:
        """All of an item is enqueued. The device runs calls in that order, so what it held is free for
        the next, and what it wrote is there for the next to read."""
        item.sequence.item = None
        self._rows.give(item.rows[1:])
        if item.of_prompt:
            self._kv.remember(item.sequence, item.start + item.q_len)

    def _adapt(self, instances: Sequence[BlockInstance], budget: float) -> None:
        """New batch limits from what has come to each instance lately."""
        active = []
        for instance in instances:
            times = self._profile.decode_times(instance) if instance.wanted >= 1 else None
            if times is None or math.isinf(budget):
                instance.limit = policy.NO_LIMIT
            else:
                active.append((instance, times))
        limits = policy.batch_limits(
            [instance.wanted for instance, _ in active], [times for _, times in active], budget
        )
        for (instance, _), limit in zip(active, limits, strict=True):
            instance.limit = limit

    def _count(self, items: Sequence[WorkItem]) -> None:
        by_route: dict[int, list[WorkItem]] = {}
        for item in items:
            by_route.setdefault(id(item.sequence.route), []).append(item)
        counters, buckets = self.counters, self._device.buckets
        counters.model_calls += sum(len(list(batches(own, buckets))) for own in by_route.values())
        counters.model_rows += sum(i.q_len for i in items)
        counters.prompt_tokens += sum(len(i.tokens) for i in items)


def withdraw(sequence: Seq, rows: IdAllocator) -> None:
    """Takes back what a sequence has on its way, wherever it waits: as if it had not been planned."""
    item = sequence.item
    if item is None:
        return
    instance = sequence.route.instances[item.hop]
    if item in instance.queue:
        instance.queue.remove(item)
    elif instance.underway is not None:
        batch = instance.underway.batch
        others = tuple(i for i in batch.items if i is not item)
        instance.underway = (
            dataclasses.replace(instance.underway, batch=dataclasses.replace(batch, items=others))
            if others
            else None
        )
    rows.give(item.rows[1:])
    sequence.item = None
    sequence.sampled -= item.samples
    if item.of_prompt:
        sequence.computed = item.start
