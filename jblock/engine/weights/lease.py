"""A request's claim on what its chain needs on the device."""

import dataclasses

from jblock.engine.weights.needs import Needs


@dataclasses.dataclass(eq=False)
class Lease:
    """A claim on what a chain needs; `WeightCache.acquire` makes it.

    Attributes:
      needs: what is claimed.
      optional: given up where it would have to wait for room.
      granted: room is there for all of it, and will stay until the lease is given back.
      pending: how much of that is still being read.
      error: why it will never be ready, and in error_code the name of a gRPC status.
      released: given back.
    """

    needs: Needs
    optional: bool = False
    granted: bool = False
    pending: int = 0
    error: str = ""
    error_code: str = ""
    released: bool = False

    @property
    def ready(self) -> bool:
        """All of it is on the device."""
        return self.granted and not self.pending and not self.error

    @property
    def slot(self) -> int:
        """Slot of its adapter in the tables; 0 without."""
        return self.needs.adapter.slot if self.needs.adapter else 0
