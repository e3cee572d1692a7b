"""The queue of a block: what is ready to run there, and what waits for a later step."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from jblock.engine.graph.graph import BlockInstance
from jblock.engine.runner.batch import Batch
from jblock.engine.scheduling.sequence import WorkItem
from jblock.engine.scheduling.step_budget import NO_LIMIT


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
    """

    ready: collections.deque[WorkItem] = dataclasses.field(default_factory=collections.deque)
    held: list[WorkItem] = dataclasses.field(default_factory=list)
    partial: PartialBatch | None = None
    limit: int = NO_LIMIT
    wanted: float = 0.0

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
        for item in items:
            self._queues[item.stage.instance].ready.append(item)
