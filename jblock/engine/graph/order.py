"""The order in which a step visits blocks."""

import collections
from collections.abc import Iterable

from jblock.engine.graph.graph import BlockInstance, Route


def visiting_order(routes: Iterable[Route]) -> tuple[BlockInstance, ...]:
    """The blocks of some routes, each behind those that lead to it; where blocks lead to each other in a
    circle, the one that routes reach first goes first."""
    before: dict[BlockInstance, set[BlockInstance]] = {}
    depth: dict[BlockInstance, int] = {}
    for route in routes:
        last: BlockInstance | None = None
        for at, instance in enumerate(route.instances):
            depth[instance] = min(at, depth.get(instance, at))
            leads = before.setdefault(instance, set())
            if last is not None and last is not instance:
                leads.add(last)
            last = instance
    after: dict[BlockInstance, list[BlockInstance]] = collections.defaultdict(list)
    for instance, leads in before.items():
        for lead in leads:
            after[lead].append(instance)
    waits = {instance: len(leads) for instance, leads in before.items()}
    left = sorted(before, key=depth.__getitem__)
    order: list[BlockInstance] = []
    while left:
        ready = [i for i in left if waits[i] <= 0] or left[:1]
        order += ready
        left = [i for i in left if i not in ready]
        for instance in ready:
            for following in after[instance]:
                waits[following] -= 1
    return tuple(order)
