"""Takes items through the instances of an agent in chain order, batching per instance."""

import dataclasses
from collections.abc import Iterable, Sequence

import jax

from jblock.engine.assembly import Instance
from jblock.engine.batching import batches
from jblock.engine.config import Bucket
from jblock.engine.device import Device, Sampled
from jblock.engine.kv import Allocator
from jblock.engine.sequence import Item


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
    """

    steps: int = 0
    block_calls: int = 0
    block_rows: int = 0
    model_calls: int = 0
    model_rows: int = 0
    prompt_tokens: int = 0


class Sweeper:
    """Runs steps on a device.

    Attributes:
      counters: of what it ran.
    """

    def __init__(self, device: Device, rows: Allocator):
        """`rows` are the register rows; those of a chunk go back when it has passed."""
        self.counters = Counters()
        self._device, self._rows = device, rows

    def sweep(self, items: list[Item], instances: Iterable[Instance]) -> list[Sampled]:
        """Takes every item through all its instances; returns the tokens on their way."""
        buckets = self._device.buckets
        self._count(items, buckets)
        self._device.begin_step()
        for item in items:
            item.sequence.route.instances[0].queue.append(item)
        sampled = []
        with jax.profiler.StepTraceAnnotation("sweep", step_num=self.counters.steps):
            for instance in instances:
                if not instance.queue:
                    continue
                ready = list(instance.queue)
                instance.queue.clear()
                for batch in batches(ready, buckets):
                    result = self._device.run(instance, batch)
                    self.counters.block_calls += 1
                    self.counters.block_rows += batch.num_rows
                    if result is not None:
                        sampled.append(result)
                for item in ready:
                    _forward(item)
        self.counters.steps += 1
        # The device runs calls in the order they were enqueued, so rows are free for the next sweep.
        for item in items:
            self._rows.give(item.rows[1:])
        return sampled

    def _count(self, items: list[Item], buckets: Sequence[Bucket]) -> None:
        by_route: dict[int, list[Item]] = {}
        for item in items:
            by_route.setdefault(id(item.sequence.route), []).append(item)
        counters = self.counters
        counters.model_calls += sum(len(list(batches(own, buckets))) for own in by_route.values())
        counters.model_rows += sum(i.q_len for i in items)
        counters.prompt_tokens += sum(len(i.tokens) for i in items)


def _forward(item: Item) -> None:
    """Queues an item at its next instance; one whose logits nobody wants skips the head."""
    item.hop += 1
    route = item.sequence.route
    if item.hop < len(route.instances):
        instance = route.instances[item.hop]
        if item.samples or item.scores or not instance.is_head:
            instance.queue.append(item)
