"""Chains that no record names: a version of a model with some of its steps replaced as edges say. They are
called "name+edge+edge@version", with the first twelve digits of each edge's id; no public name has a "+"."""

import dataclasses
from collections.abc import Sequence

from jblock.zoo.edge_records import Edge
from jblock.zoo.edges import edge, find_edge
from jblock.zoo.records import POLICIES, Chain, ZooError
from jblock.zoo.store import Zoo

_DIGITS = 12


def assembled_name(name: str, edges: Sequence[str]) -> str:
    """What a model is called in which edges of these ids are used."""
    return "+".join([name, *sorted(id_[:_DIGITS] for id_ in edges)])


def is_assembled(model: str) -> bool:
    """Whether a name is one of these."""
    return "+" in model


def serve(zoo: Zoo, model: str) -> Chain:
    """The chain "name", "name@version" or "name+edge@version", held and checked (see `Zoo.serve`).

    Raises:
      ZooError: it cannot be read, or an edge was measured in another chain or cannot stand in this one.
    """
    whole, at, version = model.partition("@")
    name, *prefixes = whole.split("+")
    chain = zoo.serve(name, version if at else None)
    if not prefixes:
        return chain
    made = assembled(chain, [edge(zoo, find_edge(zoo, prefix)) for prefix in prefixes])
    zoo.hold(made)
    zoo.check_chain(dataclasses.replace(made, name=name))  # as if it had a public name
    return made


def assembled(chain: Chain, edges: Sequence[Edge]) -> Chain:
    """A chain with the substitutes of some edges in it.

    Raises:
      ZooError: an edge was measured in another chain, or cannot stand in this one.
    """
    name = f"{chain.name}@{chain.version}"
    places = []
    for one in edges:
        at = place(chain, one)
        if at is None:
            raise ZooError(
                f"edge {one.id[:_DIGITS]} has no one place in model {name}: use edges measured in it"
            )
        places.append((at, one))
    steps: list = []
    done = 0
    for at, one in sorted(places, key=lambda p: p[0]):
        if at < done:
            raise ZooError(f"edges of model {name} replace the same step {at}: use one of them")
        steps += [*chain.steps[done:at], *one.substitute]
        done = at + len(one.original)
    ids = [one.id for one in edges]
    return dataclasses.replace(
        chain,
        name=assembled_name(chain.name, ids),
        steps=(*steps, *chain.steps[done:]),
        policy=max((chain.policy, *(one.policy for one in edges)), key=POLICIES.index),
        source_files=None,
        whole={},
        derived={"chain": name, "command": "assembled", "edges": sorted(ids)},
    )


def place(chain: Chain, edge: Edge) -> int | None:
    """The one step from which on an edge replaces steps of a chain in which it was measured; None: there is
    none, or there are several, of which nobody knows which was meant."""
    if edge.chain != f"{chain.name}@{chain.version}":
        return None
    count = len(edge.original)
    found = [
        at
        for at in range(len(chain.steps) - count + 1)
        if chain.steps[at : at + count] == edge.original
    ]
    return found[0] if len(found) == 1 else None
