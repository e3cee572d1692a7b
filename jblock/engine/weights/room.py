"""Room on the device for what is not always there: bytes of weights, slots and rank blocks of adapters."""

from collections.abc import Collection, Iterable, Sequence

from jblock.engine.kv_cache.page_pool import IdAllocator
from jblock.engine.weights.needs import Needs
from jblock.engine.weights.residents import Adapter, Resident, Weights


class Room:
    """What is taken and what is free.

    Attributes:
      slots: of adapters, one each; numbered from 1.
      pieces: of adapters, as many as each has; numbered from 1.
      weight_bytes: bytes of weights that are on the device or have their room there.
      max_weight_bytes: most of them; 0 is no bound.
    """

    def __init__(self, slots: int, pieces: int, max_weight_bytes: int):
        self.slots, self.pieces = IdAllocator(slots, 1), IdAllocator(pieces, 1)
        self.weight_bytes = 0
        self.max_weight_bytes = max_weight_bytes

    def occupy(self, resident: Resident) -> None:
        """Gives a resident its room; there must be enough."""
        if isinstance(resident, Weights):
            self.weight_bytes += resident.size
        elif isinstance(resident, Adapter):
            (resident.slot,) = self.slots.allocate(1)
            resident.pieces = self.pieces.allocate(resident.size)

    def vacate(self, resident: Resident) -> None:
        """Takes back the room of a resident."""
        if isinstance(resident, Weights):
            resident.tensors.clear()
            self.weight_bytes -= resident.size
        elif isinstance(resident, Adapter):
            self.slots.free([resident.slot])
            self.pieces.free(resident.pieces)
            resident.slot, resident.pieces = 0, []

    def problem(self, needs: Needs, all_pinned: Collection[Resident]) -> str:
        """Why a chain can never have its room beside those that are pinned, or ""."""
        own = {needs.adapter, *needs.weights.members}
        pinned = [r for r in all_pinned if r not in own]
        if self.max_weight_bytes:
            needed = sum(w.size for w in needs.weights.members)
            kept = sum(r.size for r in pinned if isinstance(r, Weights))
            if needed + kept > self.max_weight_bytes:
                return (
                    f"weights_memory_mb {self.max_weight_bytes // 10**6} does not hold the "
                    f"{-(-needed // 10**6)} MB of model {needs.chain.name!r}"
                    + (f" beside {-(-kept // 10**6)} MB of pinned ones" if kept else "")
                    + ": give more"
                )
        if needs.adapter is not None:
            others = [r for r in pinned if isinstance(r, Adapter)]
            pieces = self.pieces.total - sum(r.size for r in others)
            if needs.adapter.size > pieces or len(others) >= self.slots.total:
                return (
                    f"adapter_slots {self.slots.total} gives room for {self.pieces.total} pieces of "
                    f"8 ranks, which does not hold the {needs.adapter.size} of model "
                    f"{needs.chain.name!r}"
                    + (f" beside {len(others)} pinned adapters" if others else "")
                    + ": give more"
                )
        return ""

    def _shortage(self, cold: Iterable[Resident], free: Iterable[Resident]) -> tuple[int, int, int]:
        """Bytes, slots and pieces that lack for `cold` once all of `free` have left."""
        need_bytes = need_slots = need_pieces = 0
        for part in cold:
            if isinstance(part, Weights):
                need_bytes += part.size
            elif isinstance(part, Adapter):
                need_slots, need_pieces = need_slots + 1, need_pieces + part.size
        if self.max_weight_bytes:
            need_bytes += self.weight_bytes - self.max_weight_bytes
        else:
            need_bytes = 0
        need_slots -= self.slots.num_free
        need_pieces -= self.pieces.num_free
        for part in free:
            if isinstance(part, Weights):
                need_bytes -= part.size
            elif isinstance(part, Adapter):
                need_slots, need_pieces = need_slots - 1, need_pieces - part.size
        return max(0, need_bytes), max(0, need_slots), max(0, need_pieces)

    def victims(
        self,
        cold: Sequence[Resident],
        candidates: Iterable[Resident],
        leaving: Sequence[Resident] = (),
    ) -> tuple[list[Resident], bool]:
        """The first candidates that help to make room for `cold`, beside those that leave anyway, and
        whether they suffice."""
        chosen: list[Resident] = []
        lack = self._shortage(cold, leaving)
        for part in candidates:
            if not any(lack):
                break
            if isinstance(part, Weights) and lack[0]:
                chosen.append(part)
                lack = (max(0, lack[0] - part.size), *lack[1:])
            elif isinstance(part, Adapter) and (lack[1] or lack[2]):
                chosen.append(part)
                lack = (lack[0], max(0, lack[1] - 1), max(0, lack[2] - part.size))
        return chosen, not any(lack)
