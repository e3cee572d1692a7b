"""Edges: what was measured of steps that may stand in for others, and when they may.

`edges/<id>.json` is one immutable record, named by the hash of what it says. It tells what lies in the zoo;
it changes no chain. A chain that uses what an edge offers is a named chain of its own.
"""

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jblock.blocks.spec import canonical_json
from jblock.zoo import codec, disk, lease
from jblock.zoo.records import POLICIES, GoneError, Step, ZooError
from jblock.zoo.store import Zoo

FOLDER = "edges"
KINDS = {
    "equivalent": "near",  # a component of another model, measured to do about the same
    "quantised": "near",  # made from the original's own weights by a lossy codec
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
      text: what it is, for people.
    """

    better: str
    output: bool
    text: str


def _measure(better: str, text: str, output: bool = True) -> Measure:
    return Measure(better=better, output=output, text=text)


MEASURES = {
    "parameter_cosine": _measure("higher", "cosine of all parameters as one vector", output=False),
    "parameter_error": _measure(
        "lower", "|difference| / |original| of all parameters as one vector", output=False
    ),
    "hidden_error": _measure(
        "lower", "|difference| / |original| of the last hidden state, mean over tokens"
    ),
    "kl": _measure("lower", "KL(original || stand-in) of the next token, nats, mean over tokens"),
    "top1_agreement": _measure("higher", "share of tokens with the same best next token"),
    "perplexity_change": _measure("lower", "perplexity of stand-in / original - 1"),
    "accuracy_change": _measure("higher", "share of task items right, less that of the original"),
}


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
    """That `stand_in` may take the place of `original`, and what that costs.

    Attributes:
      kind: one of KINDS.
      original: steps of a chain, following each other.
      stand_in: steps that can be put in their place.
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
    stand_in: tuple[Step, ...]
    scores: Mapping[str, Score]
    chain: str | None = None
    probe: Probe | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ZooError(f"edge: kind {self.kind!r} is not known; known: {', '.join(KINDS)}")
        if not self.original or not self.stand_in:
            raise ZooError("edge: original and stand_in each need a step")
        for step in (*self.original, *self.stand_in):
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
        if self.chain is not None and not re.fullmatch(r"[^@]+@[1-9][0-9]{0,8}", self.chain):
            raise ZooError(f"edge: chain {self.chain!r} is not NAME@VERSION")

    @property
    def policy(self) -> str:
        """The policy a chain needs to use it."""
        return KINDS[self.kind]

    @property
    def id(self) -> str:
        """sha256 (hex) of the record."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()

    @property
    def relation(self) -> str:
        """What it is about, whatever was measured: a later edge with the same takes its place."""
        data = self.to_json()
        names = ("kind", "original", "stand_in", "chain")
        probe = self.probe.digest if self.probe else None
        return canonical_json([*(data[n] for n in names), probe])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of the edge."""
        data = dataclasses.asdict(self)
        return data | {"scores": {n: dataclasses.asdict(s) for n, s in self.scores.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Edge":
        """Inverse of `to_json`.

        Raises:
          ZooError: fields missing, unknown or of a wrong type.
        """
        try:
            fields = dict(data)
            for side in ("original", "stand_in"):
                fields[side] = tuple(
                    Step(component=s["component"], deltas=tuple(s["deltas"]), joined=s["joined"])
                    for s in fields[side]
                )
            fields["scores"] = {n: _score(s) for n, s in fields["scores"].items()}
            if fields.get("probe") is not None:
                fields["probe"] = Probe(**fields["probe"])
            return cls(**fields)
        except (TypeError, KeyError, AttributeError) as e:
            raise ZooError(f"edge has missing or unknown fields: {e}") from e


def _score(data: Mapping[str, Any]) -> Score:
    score = Score(**data)
    numbers = (score.value, score.low, score.high)
    if not all(n is None or isinstance(n, int | float) for n in numbers):
        raise TypeError(f"score {dict(data)}")
    return score


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


# What an operator accepts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accepted:
    """What an operator accepts of edges. By default nothing.

    Attributes:
      policy: the widest policy: "exact", "near" or "adaptive".
      thresholds: measure -> the worst value that is good enough.
    """

    policy: str = "exact"
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise ZooError(f"policy {self.policy!r} is not known; known: {', '.join(POLICIES)}")
        for name, value in self.thresholds.items():
            if name not in MEASURES:
                raise ZooError(f"threshold {name!r} is no measure; measures: {', '.join(MEASURES)}")
            if not math.isfinite(value):
                raise ZooError(f"threshold {name}={value}: give a finite number")


def reasons_against(edge: Edge, accepted: Accepted) -> list[str]:
    """Why an edge may not be used; empty if it may.

    Every threshold must be met, by the worse end of the interval where there is one, and one of them must
    be of outputs: parameters that look alike are no proof.
    """
    found = []
    if POLICIES.index(edge.policy) > POLICIES.index(accepted.policy):
        found.append(f"{edge.kind} needs policy {edge.policy}, not {accepted.policy}")
    if not any(MEASURES[name].output for name in accepted.thresholds):
        outputs = ", ".join(n for n, m in MEASURES.items() if m.output)
        found.append(f"no threshold on outputs is set: set one of {outputs}")
    for name, bound in accepted.thresholds.items():
        score = edge.scores.get(name)
        if score is None:
            found.append(f"{name} was not measured")
            continue
        higher = MEASURES[name].better == "higher"
        worst = score.low if higher else score.high
        worst = score.value if worst is None else worst
        if (worst < bound) if higher else (worst > bound):
            found.append(f"{name} may be {worst:.4g}, {'under' if higher else 'over'} {bound:.4g}")
    return found


# On the disk


def edges(zoo: Zoo) -> list[Edge]:
    """All edges of a zoo, in the order of their ids.

    Raises:
      ZooError: one is damaged.
    """
    found = []
    for id_ in edge_ids(zoo):
        try:
            found.append(edge(zoo, id_))
        except GoneError:
            continue  # removed in the meantime
    return found


def edge_ids(zoo: Zoo) -> list[str]:
    """File names under edges/ without their ending."""
    folder = zoo.path / FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(n.removesuffix(".json") for n in names)


def edge(zoo: Zoo, id: str) -> Edge:
    """One edge.

    Raises:
      ZooError: no such edge, or its record says something else than its id.
    """
    path = _path(zoo, id)
    if not path.is_file() or path.is_symlink():
        raise GoneError(f"{zoo.path} has no edge {id}: it was removed or never added")
    try:
        found = Edge.from_json(codec.read_json(path))
    except ZooError as e:
        raise ZooError(f"edge {id}: {e}: measure it again, or remove {path}") from e
    if found.id != id:
        raise ZooError(f"edge {id} says something else than its id: measure it again")
    return found


def check_edge(zoo: Zoo, edge: Edge) -> None:
    """Checks that what an edge names is there.

    Raises:
      GoneError: what is not.
    """
    for step in (*edge.original, *edge.stand_in):
        zoo.component(step.component)
        for id_ in step.deltas:
            if zoo.delta(id_).component != step.component:
                raise ZooError(f"edge: delta {id_} is for another component than {step.component}")
    if edge.chain is not None:
        name, _, version = edge.chain.rpartition("@")
        if int(version) not in zoo.versions(name):
            raise GoneError(f"{zoo.path} has no model {edge.chain}: it was removed or never added")


def put_edges(zoo: Zoo, *new: Edge) -> list[str]:
    """Adds edges in one go; returns their ids. Edges that say the same of the same steps, chain and probe
    as a new one are replaced by it.

    Inside `zoo.writer()`, commit what they name first.

    Raises:
      GoneError: one names something the zoo does not hold; nothing was added.
      ZooError: the zoo cannot be written.
    """
    with disk.disk_errors(zoo.path), lease.exclusive(zoo.path) as mine:
        for one in new:
            check_edge(zoo, one)  # nothing is removed while the lock is held
        folder = zoo.path / FOLDER
        folder.mkdir(exist_ok=True)
        for one in new:
            data = canonical_json(one.to_json()) + "\n"
            disk.write_atomic(_path(zoo, one.id), data.encode(), mine)
        ids, relations = {one.id for one in new}, {one.relation for one in new}
        for id_ in edge_ids(zoo):
            if id_ in ids:
                continue
            try:
                old = edge(zoo, id_)
            except ZooError:
                continue  # fsck tells
            if old.relation in relations:
                os.rename(_path(zoo, id_), mine / id_)
        disk.fsync_path(folder)
        return [one.id for one in new]


def remove_edge(zoo: Zoo, id: str) -> None:
    """Removes an edge, damaged or not; `gc` then frees what only it named.

    Raises:
      ZooError: no such edge.
    """
    with disk.disk_errors(zoo.path), lease.exclusive(zoo.path) as mine:
        path = _path(zoo, id)
        if not path.is_file():
            raise GoneError(
                f"{zoo.path} has no edge {id}: 'jblock-convert list --edges' lists them"
            )
        os.rename(path, mine / id)
        disk.fsync_path(path.parent)


def find_edge(zoo: Zoo, prefix: str) -> str:
    """The id that begins with `prefix`.

    Raises:
      ZooError: none does, or several do.
    """
    hits = [i for i in edge_ids(zoo) if i.startswith(prefix)]
    if len(hits) != 1 or not prefix:
        raise ZooError(
            f"{len(hits)} edges begin with {prefix!r}: give more of the id, as "
            "'jblock-convert list --edges' has it"
        )
    return hits[0]


def _path(zoo: Zoo, id: str) -> Path:
    return zoo.path / FOLDER / f"{codec.check_id(id)}.json"
