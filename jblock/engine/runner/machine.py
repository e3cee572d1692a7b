"""What the scheduler has to know of a device now."""

from jblock.engine.graph.graph import Route
from jblock.engine.kv_cache.sequence_pages import Boundary
from jblock.engine.runner.latency_profile import Profile
from jblock.engine.runner.runner import Runner
from jblock.engine.scheduling.machine import Machine


def machine_of(device: Runner, profile: Profile) -> Machine:
    """A device as it is, at the times of its profile."""

    def chunk_seconds(route: Route, chunk: int, entry: Boundary | None) -> float | None:
        at, layer = (entry.stage, entry.layer) if entry else (0, 0)
        return profile.chunk_seconds(route.instances[at:], chunk, layer)

    def token_seconds(route: Route) -> float | None:
        return profile.token_seconds(route.instances)

    return Machine(
        greedy_only=device.greedy_only,
        rates=device.rates,
        chunks=sorted({b.q_len for b in device.buckets if b.q_len > 1}),
        chunk_seconds=chunk_seconds,
        token_seconds=token_seconds,
    )
