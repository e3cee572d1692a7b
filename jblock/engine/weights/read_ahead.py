"""Reads what new chains need before a running engine is changed for them."""

import contextlib
import functools
from collections.abc import Collection, Mapping, Sequence

from jblock.blocks.spec import ComponentSpec
from jblock.engine.adapters import compose
from jblock.engine.api import UnknownChain
from jblock.engine.weights.readers import Readers
from jblock.zoo import assembled
from jblock.zoo.records import Chain, NotFoundError, ZooError
from jblock.zoo.store import Zoo

# Where more chains come at once only their records are read, and tensors when they are asked for.
_MOST_CHAINS = 8


def find_chains(zoo: Zoo, models: Sequence[str]) -> list[Chain]:
    """The chains of a zoo: "name" in its live version, or "name@version".

    Raises:
      UnknownChain: the zoo does not have one.
      ZooError, OSError: one cannot be read.
    """
    known = set(zoo.chains())
    if not known:
        raise ZooError(f"zoo {str(zoo.path)!r} has no models, or is not there")
    return [_find(zoo, model, known) for model in models]


def read_ahead(
    zoo: Zoo, chain: Chain, served: Collection[str], *, whole: bool
) -> Mapping[ComponentSpec, frozenset[str]]:
    """Reads the deltas of a chain once, so that storage that hangs or files that are damaged show here and
    not in the middle of a change. Components are begun to be read.

    Args:
      zoo: where it is.
      chain: that will be served.
      served: ids of components that need no reading.
      whole: read tensors too, and not records alone.

    Returns:
      What it adapts, by spec.

    Raises:
      ZooError, OSError: something cannot be read.
    """
    targets: dict[ComponentSpec, frozenset[str]] = {}
    for step in chain.steps:
        if whole and step.component not in served:
            zoo.prefetch(step.component)
        if not step.deltas:
            continue
        spec = zoo.component(step.component).spec
        adapted = frozenset(compose.targets(spec, [zoo.delta(d).spec for d in step.deltas]))
        targets[spec] = targets.get(spec, frozenset()) | adapted
        for delta in step.deltas if whole else ():
            zoo.load_delta(delta)
    return targets


def read_new(
    readers: Readers, zoo: Zoo, models: Sequence[str], served: Collection[str]
) -> tuple[list[Chain], dict[ComponentSpec, frozenset[str]]]:
    """The chains of some models, and what exact ones adapt, by spec; see `find_chains`, `read_ahead`. By
    itself, so that storage that hangs holds up no other change, and tables are made for all that the new
    chains adapt before any of them waits for its own.

    Raises:
      UnknownChain, ZooError, OSError: see there.
    """
    targets: dict[ComponentSpec, frozenset[str]] = {}
    if not models:
        return [], targets
    find = functools.partial(find_chains, zoo, models)
    chains: list[Chain] = readers.run("records", ", ".join(models), find)
    for chain in chains:
        whole = len(chains) <= _MOST_CHAINS
        read = functools.partial(read_ahead, zoo, chain, served, whole=whole)
        found = readers.run("records", chain.name, read)
        # Of approximate ones the graph looks at all deltas anyway (graph/table_forms.py).
        for spec, adapted in found.items() if chain.policy == "exact" else ():
            targets[spec] = targets.get(spec, frozenset()) | adapted
    return chains, targets


def _find(zoo: Zoo, model: str, known: Collection[str]) -> Chain:
    if model.partition("@")[0].partition("+")[0] in known:
        with contextlib.suppress(NotFoundError):
            return assembled.serve(zoo, model)
    raise UnknownChain(
        f"{model!r} is not in the zoo, which has {', '.join(sorted(known))}; convert it first"
    )
