"""Compressing a full fine-tune: its changed components become base + delta, so that they share the base's
weights in memory and in every matmul, and take a fraction of the bytes.

What is known of it: BitDelta (arXiv 2402.10193), DeltaZip (arXiv 2312.05215), and low-rank residuals.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jblock.adapt import codecs as coding
from jblock.blocks import compress
from jblock.blocks.compressed_spec import TABLE_GROUP, BitDeltaSpec, BitsTarget, LowRankSpec
from jblock.blocks.delta_spec import BiasNormSpec
from jblock.blocks.layout import is_projection
from jblock.blocks.spec import AttentionSpec, ComponentSpec, ExpertSpec, FfnSpec
from jblock.zoo import edges
from jblock.zoo.edge_records import Edge, Score, versions
from jblock.zoo.records import Chain, ComponentRecord, Step, ZooError, check_name
from jblock.zoo.store import Zoo

Tensors = Mapping[str, np.ndarray]
Factors = dict[str, dict[str, np.ndarray]]  # projection -> `codecs.low_rank` of the largest rank
RANKS = (4, 8, 16, 24, 32, 48, 64, 96, 128)
BITS = tuple(BitsTarget(bits=b, group=g) for b in (1, 2, 4) for g in (0, TABLE_GROUP))
CODECS = ("low_rank", "bits")


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to keep a changed component.

    Attributes:
      label: "low_rank 16", "bits 2", "bits 2/64", or "as it is".
      nbytes: it takes.
      error: squared error of the weights over the squared fine-tuned weights, summed over projections.
    """

    label: str
    nbytes: int
    error: float


def compress_chain(
    zoo: Zoo,
    chain: Chain,
    base: Chain,
    name: str,
    budget: float,
    codecs: Sequence[str] = CODECS,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> Chain:
    """Publishes a chain like `chain` whose changed attentions, ffns and experts are deltas on `base`'s.

    Vectors (norms, biases) that changed are kept exactly. Each component gets the codec that buys the most
    error for its bytes, within the budget of all; one may stay as it is. Other changed components
    (embeddings, final norm, routers) stay as they are and do not count.

    Args:
      zoo: holds both chains.
      chain: the fine-tune.
      base: what it was tuned from.
      name: of the new chain.
      budget: bytes that the deltas may take, as a share of those of the components they stand for.
      codecs: of CODECS, which may be used.
      advance: called with the bytes of each component that was looked at, and again when it was written.

    Raises:
      ZooError: the two are no base and fine-tune, or the budget is too small for any codec.
    """
    _check(chain, base, name, budget, codecs)
    changed = _changed(zoo, chain, base)
    if not changed:
        raise ZooError(
            f"{chain.name}@{chain.version} shares every component that could be compressed with "
            f"{base.name}@{base.version}: there is nothing to do"
        )
    options: dict[int, list[Option]] = {}
    factors: dict[int, Factors] = {}
    before = 0
    for index, (own, under) in changed.items():
        before += own.nbytes
        options[index], factors[index] = _options(zoo, own, under, codecs)
        advance(own.nbytes)
    chosen = choose(options, budget * before)
    steps = list(chain.steps)
    found: dict[tuple[str, str], Edge] = {}
    provenance: dict[str, Any] = {"command": "compress", "base": f"{base.name}@{base.version}"}
    after, error, norm = 0, 0.0, 0.0
    counts: dict[str, int] = {}
    with zoo.writer() as writer:
        for index, (own, under) in changed.items():
            label = chosen[index].label
            counts[label] = counts.get(label, 0) + 1
            after += chosen[index].nbytes
            if label != _AS_IT_IS:
                deltas, loss = _deltas(zoo, own, under, label, factors.pop(index))
                error, norm = error + loss[0], norm + loss[1]
                ids = tuple(writer.put_delta(spec, under.id, tensors) for spec, tensors in deltas)
                ids += tuple(
                    writer.put_delta(zoo.delta(d).spec, under.id, zoo.load_delta(d))
                    for d in chain.steps[index].deltas
                )
                step = dataclasses.replace(chain.steps[index], component=under.id, deltas=ids)
                steps[index] = step
                substitute = Step(component=under.id, deltas=ids[: len(deltas)])
                found[own.id, under.id] = Edge(
                    kind="quantized",
                    original=(Step(component=own.id),),
                    substitute=(substitute,),
                    scores={"change_error": Score(value=_ratio(*loss))},
                    provenance=provenance | {"codec": label},
                    versions=versions(),
                )
                writer.advance()
            advance(own.nbytes)
        how = {
            **provenance,
            "budget": budget,
            "bytes_before": before,
            "bytes_after": after,
            "change_error": _ratio(error, norm),
            "codecs": dict(sorted(counts.items())),
        }
        published = writer.publish(chain.derive(name, steps, (base.policy, "near"), how))
        edges.put_edges(zoo, *found.values())
    return published


_AS_IT_IS = "as it is"
Compressible = AttentionSpec | FfnSpec | ExpertSpec


def choose(options: Mapping[int, Sequence[Option]], budget: float) -> dict[int, Option]:
    """One option for each component, of little error in all, within `budget` bytes.

    Greedy over the lower convex hull of each component's options: from the smallest, the step that takes
    most error off for its bytes is taken as long as it fits (the usual heuristic for this knapsack).

    Raises:
      ZooError: the smallest options do not fit.
    """
    hulls = {index: _hull(of) for index, of in options.items()}
    at = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].nbytes for hull in hulls.values())
    if spent > budget:
        raise ZooError(
            f"the smallest codecs take {spent} bytes, the budget allows {int(budget)}: give more, or "
            "more codecs"
        )
    closed: set[int] = set()
    while True:
        steps = [
            (
                (hull[at[i]].error - hull[at[i] + 1].error)
                / (hull[at[i] + 1].nbytes - hull[at[i]].nbytes),
                i,
            )
            for i, hull in hulls.items()
            if i not in closed and at[i] + 1 < len(hull)
        ]
        if not steps:
            return {i: hull[at[i]] for i, hull in hulls.items()}
        _, index = max(steps)
        more = hulls[index][at[index] + 1].nbytes - hulls[index][at[index]].nbytes
        if spent + more > budget:
            closed.add(index)
        else:
            spent, at[index] = spent + more, at[index] + 1


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options that no mix of two others beats, smallest first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(small: Option, large: Option) -> float:
    return (small.error - large.error) / (large.nbytes - small.nbytes)


def _check(chain: Chain, base: Chain, name: str, budget: float, codecs: Sequence[str]) -> None:
    if check_name(name) == chain.name:
        raise ZooError(f"--name {name!r} is the model itself: give the copy its own name")
    if not 0 < budget <= 1:
        raise ZooError(f"--budget is {budget}: give a share of the bytes, over 0 and at most 1")
    unknown = [c for c in codecs if c not in CODECS]
    if unknown or not codecs:
        raise ZooError(f"--codec {unknown} is not known; known: {', '.join(CODECS)}")
    if len(chain.steps) != len(base.steps):
        raise ZooError(
            f"{chain.name} has {len(chain.steps)} components, {base.name} {len(base.steps)}: give the "
            "base that it was tuned from"
        )
    if any(s.deltas for s in base.steps):
        raise ZooError(f"--base {base.name} has deltas itself: give what those ride on")


def _changed(
    zoo: Zoo, chain: Chain, base: Chain
) -> dict[int, tuple[ComponentRecord, ComponentRecord]]:
    """The steps to compress: index -> the fine-tune's component and the base's."""
    found = {}
    for index, (step, under) in enumerate(zip(chain.steps, base.steps, strict=True)):
        own, other = zoo.component(step.component), zoo.component(under.component)
        if own.id == other.id or not isinstance(own.spec, Compressible):
            continue
        if own.spec != other.spec or own.spec.quant is not None:
            raise ZooError(
                f"component {index} of {chain.name} and of {base.name} are of different forms or "
                "quantized: give the base that it was tuned from, before it was quantized"
            )
        found[index] = (own, other)
    return found


def _differences(spec: ComponentSpec, own: Tensors, under: Tensors) -> dict[str, np.ndarray]:
    """float32 [out, in] of every projection that changed."""
    found = {}
    for name in own:
        if is_projection(spec, name):
            difference = own[name].astype(np.float32) - under[name].astype(np.float32)
            if difference.any():
                turned = difference.T if getattr(spec, "transposed", False) else difference
                found[name.removesuffix(".weight")] = turned
    return found


def _vectors(spec: ComponentSpec, own: Tensors, under: Tensors) -> dict[str, np.ndarray]:
    return {
        n: own[n]
        for n in own
        if not is_projection(spec, n) and not np.array_equal(own[n], under[n])
    }


def _options(
    zoo: Zoo, own: ComponentRecord, under: ComponentRecord, codecs: Sequence[str]
) -> tuple[list[Option], Factors]:
    """What a component can be kept as, and the low-rank factors of its projections, decomposed once."""
    mine, theirs = zoo.load_component(own.id), zoo.load_component(under.id)
    differences = _differences(own.spec, mine, theirs)
    vectors = sum(v.nbytes for v in _vectors(own.spec, mine, theirs).values())
    norms = {
        p: float(np.sum(np.square(mine[f"{p}.weight"], dtype=np.float32))) for p in differences
    }
    options = [Option(_AS_IT_IS, own.nbytes, 0.0)]
    factors: Factors = {}
    if "low_rank" in codecs:
        rows: list[dict[str, tuple[int, float]]] = [{} for _ in RANKS]
        for p, d in differences.items():
            parts = coding.decompose(d, max(RANKS))
            made = factors[p] = coding.low_rank(parts, len(parts[1]))
            # A rank that a projection does not have is all the rank it has.
            ranks = tuple(min(rank, len(parts[1])) for rank in RANKS)
            for row, rank, left in zip(
                rows, ranks, coding.low_rank_errors(d, made, ranks), strict=True
            ):
                row[p] = (_nbytes(coding.truncated(made, rank)), left)
        for rank, row in zip(RANKS, rows, strict=True):
            options.append(_option(f"low_rank {rank}", row, norms, vectors))
            if all(rank >= len(made["scale"]) for made in factors.values()):
                break
    for target in BITS if "bits" in codecs else ():
        if any(d.shape[1] * target.bits % 8 for d in differences.values()):
            continue
        row = {}
        for p, d in differences.items():
            tensors, left = coding.few_bits(d, target)
            row[p] = (_nbytes(tensors), left)
        options.append(_option(_label(target), row, norms, vectors))
    return options, factors


def _option(
    label: str, made: Mapping[str, tuple[int, float]], norms: Mapping[str, float], vectors: int
) -> Option:
    """From the bytes and the squared error of each projection."""
    error = sum(left / norms[p] for p, (_, left) in made.items())
    return Option(label, vectors + sum(n for n, _ in made.values()), error)


def _deltas(
    zoo: Zoo, own: ComponentRecord, under: ComponentRecord, label: str, factors: Factors
) -> tuple[list[tuple[Any, dict[str, np.ndarray]]], tuple[float, float]]:
    """(spec, tensors) of the deltas; squared sizes of what they leave of the change, and of the change."""
    mine, theirs = zoo.load_component(own.id), zoo.load_component(under.id)
    differences = _differences(own.spec, mine, theirs)
    vectors = _vectors(own.spec, mine, theirs)
    deltas: list[tuple[Any, dict[str, np.ndarray]]] = []
    if vectors:
        deltas.append((BiasNormSpec(names=tuple(sorted(vectors))), vectors))
    kind, _, rest = label.partition(" ")
    tensors: dict[str, np.ndarray] = {}
    for p, d in differences.items():
        if kind == "low_rank":
            made = coding.truncated(factors[p], int(rest))
        else:
            made, _ = coding.few_bits(d, _target(label))
        tensors |= {f"{p}.{part}": value for part, value in made.items()}
    if kind == "low_rank":
        spec: LowRankSpec | BitDeltaSpec = LowRankSpec(
            targets={p: len(tensors[f"{p}.scale"]) for p in differences}
        )
    else:
        spec = BitDeltaSpec(targets=dict.fromkeys(differences, _target(label)))
    error = change = 0.0
    for p, d in differences.items():
        error += float(np.sum((compress.difference_of(spec, tensors, p) - d) ** 2))
        change += float(np.sum(d**2))
    if differences:
        deltas.append((spec, tensors))
    return deltas, (error, change)


def _label(target: BitsTarget) -> str:
    return f"bits {target.bits}" + (f"/{target.group}" if target.group else "")


def _target(label: str) -> BitsTarget:
    return next(t for t in BITS if _label(t) == label)


def _nbytes(tensors: Tensors) -> int:
    return sum(t.nbytes for t in tensors.values())


def _ratio(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else 0.0
