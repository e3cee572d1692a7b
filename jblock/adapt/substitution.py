"""What substitutes cost in place: the chain with them beside the chain as it is, on probe data.

What is recommended was chosen on one half of the probe and is scored on the other, so that the best of many
tries is not taken for as good as it looked.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jblock.adapt import forward
from jblock.adapt.candidates import Candidate, users
from jblock.adapt.metrics import Comparison, Evaluator
from jblock.adapt.probe import ProbeData
from jblock.blocks.spec import StitchSpec
from jblock.zoo.acceptance import AcceptancePolicy, violations
from jblock.zoo.edge_records import Edge, Score, versions
from jblock.zoo.records import Chain, Step, ZooError
from jblock.zoo.store import Zoo

Change = Mapping[int, Step]
_KINDS = {
    "stitch": "stitch",
    "surrogate": "surrogate",
    "compress": "quantized",
    "quantise": "quantized",
    "quantize": "quantized",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """A change of some steps of a chain, and what came out.

    Attributes:
      change: index -> the step that takes this place; None: `steps` is another model as a whole.
      steps: of the chain with it.
      comparison: beside the chain as it is.
      cosine: of the replaced parameters as one vector, if they can be compared.
      kind: of an edge.
    """

    change: Change | None
    steps: tuple[Step, ...]
    comparison: Comparison
    cosine: Score | None
    kind: str = "equivalent"


class ChainEvaluator:
    """One chain on its probe: what changes of its steps cost, end to end.

    Attributes:
      chain: as it is.
      data: what it is measured on.
      original: what the chain makes of it.
    """

    def __init__(self, zoo: Zoo, chain: Chain, data: ProbeData):
        """Runs the chain as it is."""
        self._zoo, self.chain, self.data = zoo, chain, data
        self._evaluator = Evaluator(zoo, chain.steps, data)
        self.original = self._evaluator.original

    def measure(
        self, changes: Sequence[Change], on_done: Callable[[], object] = lambda: None
    ) -> list[Measured]:
        """Runs the chain with each of some sets of changes."""
        chains = [
            tuple(change.get(i, step) for i, step in enumerate(self.chain.steps))
            for change in changes
        ]
        found = self._evaluator.measure(chains, on_done)
        rows = zip(changes, chains, found, strict=True)
        return [Measured(c, steps, f, self._cosine(c)) for c, steps, f in rows]

    def measure_models(
        self, models: Sequence[Chain], on_done: Callable[[], object] = lambda: None
    ) -> list[Measured]:
        """Runs other models of the same vocabulary in the chain's place. They may be of other widths and
        depths: what is compared is what they put out."""
        found = self._evaluator.measure([m.steps for m in models], on_done)
        return [
            Measured(None, m.steps, f, None, kind_of(self._zoo, m))
            for m, f in zip(models, found, strict=True)
        ]

    def edge(
        self,
        measured: Measured,
        provenance: Mapping[str, Any],
        second: bool | None = True,
        more: Mapping[str, Score] | None = None,
    ) -> Edge:
        """The edge that says so, from the first changed step to the last.

        Args:
          measured: by this evaluator.
          provenance: of the edge.
          second: the half of the probe whose scores it has (`Comparison.half`); None: all of it, where
            nothing was chosen by them.
          more: further scores.
        """
        first, last = _changed(self.chain.steps, measured.steps)
        behind = len(self.chain.steps) - last
        comparison, data = measured.comparison, self.data
        if second is not None:
            comparison, data = comparison.half(second), data.half(second)
        cosine = {} if measured.cosine is None else {"parameter_cosine": measured.cosine}
        return Edge(
            kind=measured.kind,
            original=self.chain.steps[first:last],
            substitute=measured.steps[first : len(measured.steps) - behind],
            scores={**cosine, **(more or {}), **comparison.scores()},
            chain=f"{self.chain.name}@{self.chain.version}",
            probe=data.record,
            provenance=provenance,
            versions=versions(),
        )

    def _cosine(self, change: Change) -> Score:
        """Of the replaced components as one vector."""
        sums = np.zeros(3)
        for at, step in change.items():
            own, by = (
                forward.load(self._zoo, [s]).tensors[0] for s in (self.chain.steps[at], step)
            )
            for name, value in by.items():
                a, b = (np.asarray(v, np.float32).reshape(-1) for v in (own[name], value))
                sums += (a @ b, a @ a, b @ b)
        return Score(value=float(sums[0] / max(np.sqrt(sums[1] * sums[2]), 1e-30)))


def _changed(original: Sequence[Step], substitute: Sequence[Step]) -> tuple[int, int]:
    """The steps original[first:last] that others take the place of; at least one on either side."""
    shorter = min(len(original), len(substitute)) - 1
    first = next((i for i in range(shorter) if original[i] != substitute[i]), shorter)
    same = 0
    while same < shorter - first and original[-1 - same] == substitute[-1 - same]:
        same += 1
    return first, len(original) - same


def beside(
    zoo: Zoo,
    chain: Chain,
    other: Chain,
    data: ProbeData,
    provenance: Mapping[str, Any],
    more: Mapping[str, Score] | None = None,
) -> tuple[Edge, Comparison]:
    """What `other` puts out beside `chain`, on all of a probe, and the edge that says so.

    Raises:
      ZooError: the two have other tokens or are equal, or a component is missing or damaged.
    """
    if (chain.tokenizer, chain.vocab_size) != (other.tokenizer, other.vocab_size):
        raise ZooError(
            f"{other.name} and {chain.name} have other tokenizers: what they put out cannot be compared"
        )
    if chain.steps == other.steps:
        raise ZooError(
            f"{other.name}@{other.version} and {chain.name}@{chain.version} are the same components: there "
            "is nothing to measure"
        )
    evaluator = ChainEvaluator(zoo, chain, data)
    (measured,) = evaluator.measure_models([other])
    return evaluator.edge(measured, provenance, None, more), measured.comparison


def kind_of(zoo: Zoo, model: Chain) -> str:
    """The kind of edge to a model as a whole: by how it was made, else "equivalent"."""
    kind = _KINDS.get(str(model.derived.get("command")), "equivalent")
    if kind == "equivalent" and any(
        isinstance(zoo.component(s.component).spec, StitchSpec) for s in model.steps
    ):
        return "stitch"
    return kind


def places(chain: Chain, candidates: Sequence[Candidate]) -> dict[int, list[Step]]:
    """Step index -> what may stand there, most alike first. Adapted steps stay: an adapter was trained on its
    own base."""
    found: dict[int, list[Step]] = {}
    for at, step in enumerate(chain.steps):
        if step.deltas:
            continue
        by = [c.substitute for c in candidates if c.original == step.component]
        if by:
            found[at] = [dataclasses.replace(step, component=id_) for id_ in by]
    return found


def runs(changes: Mapping[int, Step]) -> list[dict[int, Step]]:
    """Changes of neighboring steps taken together: blocks that could be shared as a whole."""
    found: list[dict[int, Step]] = []
    for at, step in sorted(changes.items()):
        if found and at - 1 in found[-1]:
            found[-1][at] = step
        else:
            found.append({at: step})
    return [run for run in found if len(run) > 1]


def other_models(zoo: Zoo, chain: Chain, models: Sequence[Chain]) -> list[Chain]:
    """Models that could take a chain's place though their components cannot be compared with its own: of the
    same tokenizer, and of another width or with a stitch."""

    def widths(model: Chain) -> list[int]:
        specs = [zoo.component(s.component).spec for s in model.steps]
        return [getattr(spec, "hidden_size", 0) for spec in specs]

    own = widths(chain)
    return [
        m
        for m in models
        if m.steps != chain.steps
        and (m.tokenizer, m.vocab_size) == (chain.tokenizer, chain.vocab_size)
        and chain.tokenizer is not None
        and (widths(m) != own or kind_of(zoo, m) == "stitch")
    ]


def nearest_models(
    evaluator: ChainEvaluator, zoo: Zoo, models: Sequence[Chain], count: int
) -> list[Chain]:
    """The `count` models that put out what the chain does most often, on the first rows of its probe."""
    if len(models) <= count:
        return list(models)
    small = ProbeData("", evaluator.data.text.first(2))
    found = Evaluator(zoo, evaluator.chain.steps, small).measure([m.steps for m in models])
    order = sorted(range(len(models)), key=lambda i: -float(found[i].same.mean()))
    return [models[i] for i in order[:count]]


@dataclasses.dataclass(frozen=True, eq=False)
class Recommendation:
    """What was chosen on the first half of a probe.

    Attributes:
      measured: the changes together.
      edge: with their scores on the second half.
      reasons: why the second half does not confirm the choice; empty if it does.
    """

    measured: Measured
    edge: Edge
    reasons: list[str]


def recommend(
    evaluator: ChainEvaluator,
    tried: Sequence[Measured],
    accepted: AcceptancePolicy,
    provenance: Mapping[str, Any],
    on_done: Callable[[], object] = lambda: None,
) -> Recommendation | None:
    """The largest set of changes found whose cost together is accepted on the first half of the probe.

    Costs add up, so usable changes are tried one upon the other, the least costly first, one a place, and
    each is kept only if all of them together pass. Where none is usable, another model as a whole may be.

    Args:
      evaluator: of the chain.
      tried: changes of one step each, and other models.
      accepted: by the operator.
      provenance: of the edge.
      on_done: called after each that was looked at.
    """

    def passes(measured: Measured) -> bool:
        return not violations(evaluator.edge(measured, {}, second=False), accepted)

    def cost(measured: Measured) -> float:
        return float(measured.comparison.half(False).kl.mean())

    kept: Measured | None = None
    for one in sorted((m for m in tried if m.change is not None), key=cost):
        on_done()
        before = kept.change if kept is not None and kept.change is not None else {}
        if not passes(one) or one.change is None or min(one.change) in before:
            continue
        trial = one if not before else evaluator.measure([{**before, **one.change}])[0]
        kept = trial if passes(trial) else kept
    if kept is None:
        models = sorted((m for m in tried if m.change is None and passes(m)), key=cost)
        kept = models[0] if models else None
    if kept is None:
        return None
    edge = evaluator.edge(kept, provenance)
    return Recommendation(kept, edge, violations(edge, accepted))


def freed(zoo: Zoo, chains: Mapping[str, Chain], changed: Mapping[str, Sequence[Step]]) -> int:
    """Bytes of components that no chain uses any more once some (by name) have the steps of `changed`."""
    before = set(users(chains))
    after = {
        step.component for name, chain in chains.items() for step in changed.get(name, chain.steps)
    }
    gone = before - after
    # What a tied tensor refers to stays with it.
    for id_ in after:
        gone -= {owner for owner, _ in zoo.component(id_).refs.values()}
    return sum(zoo.component(id_).nbytes for id_ in gone)
