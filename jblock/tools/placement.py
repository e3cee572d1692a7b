"""`jblock placement`: where the blocks of a zoo's models would lie on some agents, and why.

Agents are described by flags, --agent NAME=GIB[xDEVICES][@HOST[/ZONE]], or by a JSON file; see
docs/placement.md.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jblock.command import program
from jblock.scheduler.placement import (
    Agent,
    Block,
    Chain,
    Link,
    Links,
    Placement,
    PlacementError,
    Problem,
    place,
)
from jblock.scheduler.placement.explain import explain, text
from jblock.zoo import latency_profiles
from jblock.zoo.latency_profiles import Profile
from jblock.zoo.records import Chain as ZooChain
from jblock.zoo.records import ZooError
from jblock.zoo.store import Zoo

_AGENT = re.compile(r"([^=@/]+)=([0-9.]+)(?:x([0-9]+))?(?:@([^/]+)(?:/(.+))?)?")
_BATCHES = {1: 1.0, 8: 1.4, 32: 2.4, 128: 6.8}
"""Batch -> its step's time, of that of one row: a model of 250M parameters on CPU."""
_UNMEASURED = Profile(hop_seconds=20e-6, bytes_per_second=20e9, signatures=())


def parser(name: str) -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog=name, description=__doc__)
    made.add_argument("--zoo", required=True, help="folder or URL of the zoo")
    made.add_argument(
        "--models", nargs="+", default=[], help="models to place (default: all that are exact)"
    )
    made.add_argument(
        "--agent",
        action="append",
        default=[],
        help="NAME=GIB[xDEVICES][@HOST[/ZONE]]: its memory for blocks, and where it is; may be repeated",
    )
    made.add_argument(
        "--agents", type=Path, help="JSON file of agents, links and popularity (docs/placement.md)"
    )
    made.add_argument(
        "--popularity",
        action="append",
        default=[],
        metavar="MODEL=ROWS",
        help="tokens a second that are expected of a model (default: 1); may be repeated",
    )
    made.add_argument("--previous", type=Path, help="what --json printed before: stays, if it can")
    made.add_argument("--json", action="store_true", help="print the placement and why as JSON")
    return made


def described(args: argparse.Namespace) -> Problem:
    """The problem that a command line names.

    Raises:
      ZooError: the zoo or a model cannot be read.
      PlacementError: agents or popularity cannot be used.
    """
    given = _read(args.agents) if args.agents is not None else {}
    agents = [*_listed(given, "agents", Agent), *(_agent(flag) for flag in args.agent)]
    if not agents:
        raise PlacementError(
            "no agent is described: give --agent NAME=GIB, or --agents FILE (docs/placement.md)"
        )
    links = {
        name: _made(Link, link, f"links.{name}") for name, link in _map(given, "links").items()
    }
    zoo = Zoo.open(args.zoo)
    chains = _chains(zoo, args.models)
    popularity = _popularity(given, args.popularity, chains)
    return problem_of(zoo, chains, agents, _made(Links, links, "links"), popularity)


def problem_of(
    zoo: Zoo,
    chains: Mapping[str, ZooChain],
    agents: Sequence[Agent],
    links: Links,
    popularity: Mapping[str, float],
) -> Problem:
    """Chains of a zoo as blocks, with what they are expected to take.

    Args:
      zoo: they are of; its profile of this machine, if there is one, says how fast weights are read.
      chains: by name.
      agents: to place them on.
      links: between the agents.
      popularity: rows a second by name; others count as 1.
    """
    plan = zoo.block_plan(chains)
    target = latency_profiles.target()
    profile = latency_profiles.read(zoo.path / "profiles", target) or _UNMEASURED
    growth = _growth(profile)
    blocks: dict[str, Block] = {}
    placed = []
    for name, run in plan.blocks.items():
        ids = []
        for block in run:
            nbytes = sum(zoo.component(c).nbytes for c in block.components)
            digest = hashlib.sha256(" ".join(block.components).encode()).hexdigest()
            id_ = f"{zoo.component(block.components[0]).spec.kind}_{digest[:12]}"
            one = profile.hop_seconds + nbytes / profile.bytes_per_second
            seconds = {batch: one * times for batch, times in growth.items()}
            blocks.setdefault(id_, Block(id=id_, nbytes=nbytes, seconds=seconds))
            ids.append(id_)
        width = getattr(zoo.component(run[0].components[0]).spec, "hidden_size", 0)
        placed.append(
            Chain(
                name=name,
                blocks=tuple(ids),
                popularity=popularity.get(name, 1.0),
                row_bytes=4 * width,
            )
        )
    return Problem(agents=tuple(agents), blocks=blocks, chains=tuple(placed), links=links)


def _growth(profile: Profile) -> dict[int, float]:
    """Batch -> its step's time, of that of one row, over all that was measured."""
    sums: dict[int, float] = {}
    for signature in profile.signatures:
        times = {
            int(t["num_seqs"]): float(t["seconds"]) for t in signature["times"] if t["q_len"] == 1
        }
        if 1 in times:
            for batch, seconds in times.items():
                sums[batch] = sums.get(batch, 0.0) + seconds
    return {b: s / sums[1] for b, s in sorted(sums.items())} if sums.get(1) else dict(_BATCHES)


def _chains(zoo: Zoo, models: Sequence[str]) -> dict[str, ZooChain]:
    found = [zoo.chain(name) for name in models or zoo.chains()]
    found = [chain for chain in found if models or chain.policy == "exact"]
    if not found:
        raise ZooError(f"zoo {zoo.storage.location!r} has no exact models: name some with --models")
    return {chain.name: chain for chain in found}


def _popularity(
    given: Mapping[str, Any], flags: Sequence[str], chains: Mapping[str, ZooChain]
) -> dict[str, float]:
    found = dict(_map(given, "popularity"))
    for flag in flags:
        name, _, rows = flag.rpartition("=")
        found[name] = rows
    out = {}
    for name, value in found.items():
        if name not in chains:
            raise PlacementError(
                f"popularity: model {name!r} is not placed; placed: {', '.join(list(chains)[:8])}"
            )
        try:
            out[name] = float(value)
        except (TypeError, ValueError):
            raise PlacementError(
                f"popularity of {name!r} is {value!r}: give tokens a second, as {name}=2.5"
            ) from None
    return out


def _agent(flag: str) -> Agent:
    match = _AGENT.fullmatch(flag)
    if match is None:
        raise PlacementError(
            f"agent {flag!r}: give NAME=GIB[xDEVICES][@HOST[/ZONE]], as a0=16x4@host1/zone1"
        )
    name, gib, devices, host, zone = match.groups()
    try:
        memory = int(float(gib) * 2**30)
    except ValueError:
        raise PlacementError(f"agent {flag!r}: memory {gib!r} is no number of GiB") from None
    return Agent(
        name=name, memory=memory, devices=int(devices or 1), host=host or "", zone=zone or ""
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise PlacementError(f"{path}: {e}: give a JSON file") from e
    if not isinstance(data, dict):
        raise PlacementError(f"{path}: holds no JSON object: see docs/placement.md")
    return data


def _listed(given: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    values = given.get(name, [])
    if not isinstance(values, list):
        raise PlacementError(f"{name} is no list: see docs/placement.md")
    return [_made(kind, value, f"{name}[{i}]") for i, value in enumerate(values)]


def _map(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name, {})
    if not isinstance(value, dict):
        raise PlacementError(f"{name} is no JSON object: see docs/placement.md")
    return value


def _made(kind: type, fields: Any, where: str) -> Any:
    known = [f.name for f in dataclasses.fields(kind)]
    try:
        return kind(**fields)
    except TypeError as e:
        raise PlacementError(f"{where}: {e}: the fields are {', '.join(known)}") from e


def run() -> None:
    """Entry point of `jblock placement`."""
    args = parser(program(sys.argv[0], "jblock placement")).parse_args(sys.argv[1:])
    try:
        problem = described(args)
        previous = None
        if args.previous is not None:
            previous = Placement.from_json(_read(args.previous).get("placement", {}))
        placement = place(problem, previous)
    except (PlacementError, ZooError, OSError) as e:
        sys.exit(f"jblock placement: {e}")
    report = explain(problem, placement)
    if args.json:
        print(json.dumps({"placement": placement.to_json(), **report}, indent=2))
    else:
        print(text(report))
    sys.exit(0)
