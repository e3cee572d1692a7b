"""Records of edges: what was measured of steps that may replace others. Plain data, no I/O."""

import dataclasses
import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from typing import Any

from jblock.blocks.spec_json import canonical_json
from jblock.zoo import codec
from jblock.zoo.records import VERSION_NAME, NewerError, Step, ZooError

FOLDER = "edges"
"""The zoo's folder of edges."""

_SIDES = ("original", "substitute")
_MOST = 1 << 60  # the size of a number that an edge holds
KINDS = {
    "equivalent": "near",  # a component of another model, measured to do about the same
    "quantized": "near",  # made from the original's own weights by a lossy codec
    "quantised": "near",  # the same, as edges of before are spelled
    "surrogate": "adaptive",  # smaller, trained to do about the same
    "stitch": "adaptive",  # trained to join layers of two models
}
"""Kind of an edge -> the policy that a chain needs to use it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """What one number of an edge says.

    Attributes:
      better: "higher" or "lower".
      output: it compares what models put out; without, it looks at parameters alone.
      licenses: good values of it are proof that two models do the same. Perplexity is none: a fine-tune is
        worse than its base on general text, so putting the base back even improves it.
      two_sided: it is a change, and a threshold bounds its size in both directions.
      text: what it is, for people.
    """

    better: str
    output: bool
    licenses: bool
    two_sided: bool
    text: str


def _measure(
    better: str, text: str, output: bool = True, licenses: bool = False, two_sided: bool = False
) -> Measure:
    return Measure(better=better, output=output, licenses=licenses, two_sided=two_sided, text=text)


MEASURES = {
    "parameter_cosine": _measure("higher", "cosine of all parameters as one vector", output=False),
    "parameter_error": _measure(
        "lower", "|difference| / |original| of all parameters as one vector", output=False
    ),
    "change_error": _measure(
        "lower",
        "|difference| / |what the fine-tune changed| of all parameters as one vector",
        output=False,
    ),
    "hidden_error": _measure(
        "lower", "|difference| / |original| of the last hidden state, mean over tokens"
    ),
    "kl": _measure(
        "lower",
        "KL(original || substitute) of the next token, nats, mean over tokens",
        licenses=True,
    ),
    "top1_agreement": _measure("higher", "share of tokens with the same best next token"),
    "perplexity_change": _measure(
        "lower", "perplexity of substitute / original - 1", two_sided=True
    ),
    "accuracy_change": _measure(
        "higher",
        "share of task items right, less that of the original",
        licenses=True,
        two_sided=True,
    ),
}
"""What edges hold. A threshold on a two-sided one bounds its size, whatever the sign of either."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One number of an edge.

    Attributes:
      value: in the unit of its measure.
      low: lower end of its 95% interval; None where none was worked out.
      high: upper end.
      count: tokens or items it was taken over; 0 for parameters.
    """

    value: float
    low: float | None = None
    high: float | None = None
    count: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """Data that an edge was measured on: a name for people, the sha256 (hex) of the data itself, and how
    many tokens it has."""

    name: str
    digest: str
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edge:
    """That `substitute` may take the place of `original`, and what that costs.

    Attributes:
      kind: one of KINDS.
      original: steps of a chain, following each other.
      substitute: steps that can be put in their place.
      scores: by measure, one of MEASURES.
      chain: "name@version" of the chain in which the scores were measured, from end to end; None where
        only parameters were compared.
      probe: what they were measured on; None where only parameters were compared.
      provenance: how it was made: the command's name and settings, seeds. Plain JSON without times, so
        that doing the same again gives the same record.
      versions: of the software that made it, see `versions`.
    """

    kind: str
    original: tuple[Step, ...]
    substitute: tuple[Step, ...]
    scores: Mapping[str, Score]
    chain: str | None = None
    probe: Probe | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ZooError(f"edge: kind {self.kind!r} is not known; known: {', '.join(KINDS)}")
        if not self.original or not self.substitute:
            raise ZooError("edge: original and substitute each need a step")
        for step in (*self.original, *self.substitute):
            for id_ in (step.component, *step.deltas):
                codec.check_id(id_)
        for name, score in self.scores.items():
            if name not in MEASURES:
                raise ZooError(f"edge: measure {name!r} is not known; known: {', '.join(MEASURES)}")
            numbers = [n for n in (score.value, score.low, score.high) if n is not None]
            if not all(math.isfinite(n) for n in numbers):
                raise ZooError(f"edge: {name} is {score}: give finite numbers")
            if not _within(score):
                raise ZooError(f"edge: {name} is {score}: the value lies outside its interval")
        if (self.chain is None or self.probe is None) and any(
            MEASURES[m].output for m in self.scores
        ):
            raise ZooError(
                "edge: scores of outputs need the chain and the probe they were taken on"
            )
        if self.probe is not None:
            codec.check_id(self.probe.digest)
        if self.chain is not None and not VERSION_NAME.fullmatch(self.chain):
            raise ZooError(f"edge: chain {self.chain!r} is not NAME@VERSION")

    @property
    def policy(self) -> str:
        """The policy a chain needs to use it."""
        return KINDS[self.kind]

    @property
    def id(self) -> str:
        """sha256 (hex) of the record."""
        return hashlib.sha256(canonical_json(self.record()).encode()).hexdigest()

    @property
    def relation(self) -> str:
        """What it is about, whatever was measured: a later edge with the same takes its place."""
        data = self.to_json()
        names = ("kind", "original", "substitute", "chain")
        probe = self.probe.digest if self.probe else None
        return canonical_json([*(data[n] for n in names), probe])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of the edge."""
        sides = {side: [s.to_json() for s in getattr(self, side)] for side in _SIDES}
        scores = {n: dataclasses.asdict(s) for n, s in self.scores.items()}
        return dataclasses.asdict(self) | sides | {"scores": scores}

    def record(self) -> dict[str, Any]:
        """What its file holds and its id covers, in which the substitute has its first name."""
        data = self.to_json()
        return data | {"stand_in": data.pop("substitute")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Edge":
        """Inverse of `to_json`.

        Raises:
          NewerError: a field, kind or measure that this version does not know.
          ZooError: fields missing or of a wrong type.
        """
        _check_known(data)
        try:
            fields = dict(data)
            if "stand_in" in fields:
                fields["substitute"] = fields.pop("stand_in")
            for side in _SIDES:
                fields[side] = tuple(Step.from_json(s) for s in fields[side])
            fields["scores"] = {n: _score(s) for n, s in fields["scores"].items()}
            if fields.get("probe") is not None:
                fields["probe"] = _probe(fields["probe"])
            if not all(isinstance(fields.get(n, {}), dict) for n in ("provenance", "versions")):
                raise TypeError("provenance and versions are objects")
            return cls(**fields)
        except (TypeError, KeyError, AttributeError) as e:
            raise ZooError(f"edge has missing or malformed fields: {e}") from e


def _check_known(data: Mapping[str, Any]) -> None:
    """Raises NewerError for what this version does not know; what is malformed is found elsewhere."""
    kind, scores, probe = (data.get(n) for n in ("kind", "scores", "probe"))
    scores = scores if isinstance(scores, dict) else {}
    known = (
        ("field", data, {*_fields(Edge), "stand_in"}),
        ("kind", [kind] if isinstance(kind, str) else (), KINDS),
        ("measure", scores, MEASURES),
        ("field", probe if isinstance(probe, dict) else (), _fields(Probe)),
        *(("field", s, _fields(Score)) for s in scores.values() if isinstance(s, dict)),
    )
    for what, found, names in known:
        unknown = sorted(set(found) - set(names))
        if unknown:
            raise NewerError(
                f"edge has the {what} {unknown[0]!r}: a newer version of jblock wrote it; use that version"
            )


def _fields(record: type[Edge] | type[Score] | type[Probe]) -> set[str]:
    return {f.name for f in dataclasses.fields(record)}


def _score(data: Mapping[str, Any]) -> Score:
    score = Score(**data)
    numbers = (score.value, score.low, score.high)
    if not all(n is None or (type(n) in (int, float) and abs(n) < _MOST) for n in numbers):
        raise TypeError(f"score {str(dict(data))[:120]}")
    if type(score.count) is not int or not 0 <= score.count < _MOST:
        raise TypeError(f"score {str(dict(data))[:120]}")
    return score


def _probe(data: Mapping[str, Any]) -> Probe:
    probe = Probe(**data)
    if not isinstance(probe.name, str) or type(probe.tokens) is not int:
        raise TypeError(f"probe {str(dict(data))[:120]}")
    return probe


def _within(score: Score) -> bool:
    low = score.value if score.low is None else score.low
    high = score.value if score.high is None else score.high
    return low <= score.value <= high


def versions() -> dict[str, str]:
    """Of the software that measures: what an edge carries of them."""
    found = {"python": platform.python_version()}
    for package in ("jblock", "jax", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "source"  # run from a checkout
    return found
