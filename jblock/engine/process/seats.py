"""Which processors and devices of a machine each of several engine processes has."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

# How libtpu is told the form of a process's chips; of other counts it finds out by itself.
_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}


@dataclasses.dataclass(frozen=True)
class Seat:
    """What one process has; the default is all that there is.

    Attributes:
      cores: processors it runs on; empty: those of its parent.
      environment: variables it has beside those of its parent, set before it imports jax.
    """

    cores: tuple[int, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


WHOLE_MACHINE = Seat()


def share_out(agents: int, devices: int, cores: Sequence[int] = ()) -> list[Seat]:
    """A seat for each of so many processes: neighboring cores, and devices in their order. XLA's CPU client
    has as many threads as the process has cores.

    Args:
      agents: how many processes.
      devices: accelerators that each computes on. jax counts them within what `CUDA_VISIBLE_DEVICES` and its
        like leave it. Without accelerators this has no effect.
      cores: of all together; by default those that this process may use, where the system can say and pin.
        Where there are fewer than processes, several share one.
    """
    if not cores and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    seats = []
    for agent in range(agents):
        first, last = (i * len(cores) // agents for i in (agent, agent + 1))
        own = cores[first:last] or cores[first : first + 1]
        mine = ",".join(str(agent * devices + i) for i in range(devices))
        environment = {
            "JAX_CUDA_VISIBLE_DEVICES": mine,
            "JAX_ROCM_VISIBLE_DEVICES": mine,
            "TPU_VISIBLE_CHIPS": mine,
        }
        if devices in _TPU_BOUNDS:
            environment["TPU_PROCESS_BOUNDS"] = "1,1,1"
            environment["TPU_CHIPS_PER_PROCESS_BOUNDS"] = _TPU_BOUNDS[devices]
        seats.append(Seat(tuple(own), environment))
    return seats
