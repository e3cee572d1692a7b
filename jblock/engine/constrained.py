"""Sampling of sequences that keep to a grammar.

What may follow a token is known only once the token was read, when the step after it is already on its
way. So of such sequences logits alone are enqueued with the others; while the device computes them the step
before is read and the masks are made, in a process beside (`structured_output`), and then sampling is
enqueued. A row whose mask is not there in time samples nothing: it is computed again in a step after its mask
came, and the others go on.
"""

import dataclasses
from collections.abc import Callable

from jax.profiler import TraceAnnotation

from jblock.engine.api import Request
from jblock.engine.graph.graph import Route
from jblock.engine.runner.runner import Runner
from jblock.engine.runner.step import Step
from jblock.engine.scheduling.scheduler import Scheduler
from jblock.engine.structured_output.grammars import Constraint, Grammars
from jblock.zoo.store import Zoo

# How long a step waits for masks: half of what it takes by itself, in these bounds.
_LEAST_SECONDS, _MOST_SECONDS = 0.005, 0.05


class ConstrainedSampling:
    """That of one loop.

    Attributes:
      grammars: of its sequences.
      open: those that are followed now; where there are none, nothing here has anything to do.
      late: rows that sat out a step.
    """

    def __init__(self, device: Runner, sequences: Scheduler, finish: Callable[..., None]):
        """`finish` ends a sequence, with a reason and fields of its last output."""
        self.grammars = Grammars()
        self.open = self.grammars.open
        self.late = 0
        self._device, self._sequences, self._finish = device, sequences, finish
        self._taken: list[tuple[Constraint, int]] = []

    def begin(self, request: Request, route: Route, zoo: Zoo) -> Constraint | None:
        """Follows the grammar of a request."""
        chain = route.chain
        if chain.tokenizer is None:
            return None
        return self.grammars.begin(
            request.request_id,
            request.sampling.grammar,
            str(zoo.tokenizer_path(chain.tokenizer) / "tokenizer.json"),
            chain.vocab_size,
            chain.eos_token_ids,
            request.generated,
        )

    def take(self, constraint: Constraint, token: int) -> None:
        """A token was read."""
        self._taken.append((constraint, token))

    def sample(self, step: Step | None, *, idle: bool) -> Step | None:
        """Takes up the tokens that were read, and samples what of a step waited for that.

        Args:
          step: as it was enqueued.
          idle: the device has nothing else to do, so that masks may be waited for.
        """
        self.grammars.take(self._taken)
        self._taken.clear()
        if step is not None and step.waiting:
            return self._sample(step)
        if idle:
            running = self._sequences.running.values()
            self.grammars.wait([s.constraint for s in running if s.constraint], _MOST_SECONDS)
        return step

    def _sample(self, step: Step) -> Step:
        items = [i for w in step.waiting for i in w.batch.items if i.samples]
        constrained = [(i, c) for i in items if (c := i.sequence.constraint) is not None]
        open_ = [c for i, c in constrained if not i.sequence.finished]
        with TraceAnnotation("masks"):
            self.grammars.wait(open_, min(max(step.seconds / 2, _LEAST_SECONDS), _MOST_SECONDS))
        self.end_over()
        for item, constraint in constrained:
            if not item.sequence.finished and not constraint.ready:
                item.sequence.take_back(item)
                self.late += 1
        sampled = [self._device.sample(waiting) for waiting in step.waiting]
        return dataclasses.replace(step, sampled=(*step.sampled, *sampled), waiting=())

    def end_over(self) -> None:
        """Ends the requests whose grammars are complete, or cannot be followed."""
        for constraint in self.grammars.over():
            sequence = self._sequences.find(constraint.request_id)
            if sequence is None or sequence.constraint is not constraint:
                continue
            if constraint.complete:
                self._finish(sequence, "stop")
                continue
            words = f"grammar: {constraint.problem}; simplify the schema or grammar"
            self._finish(sequence, "error", error_code="INVALID_ARGUMENT", error_message=words)
