"""Room on the device for what is not always there: bytes of weights; slots, rank blocks and places of
adapters."""

from collections.abc import Collection, Iterable, Sequence

from jblock.engine.kv_cache.page_pool import IdAllocator
from jblock.engine.weights.needs import Needs
from jblock.engine.weights.residents import Adapter, Resident, Weights


class Room:
    """What is taken and what is free.

    Attributes:
      slots: of adapters, one each; numbered from 1.
      pieces: of adapters, as many as each has, where tables have all; numbered from 1.
      weight_bytes: bytes of weights that are on the device or have their room there.
      max_weight_bytes: most of them; 0 is no bound.

    Adapters with codes of few bits have a place each too, of as many as their tables have. Where tables are
    sized by what is served, other pieces and places are those of other tables: they are given back with the
    last request on these.
    """

    def __init__(self, slots: int, pieces: int, max_weight_bytes: int):
        self.slots, self.pieces = IdAllocator(slots, 1), IdAllocator(pieces, 1)
        self.weight_bytes = 0
        self.max_weight_bytes = max_weight_bytes
        self._places: dict[int, IdAllocator] = {}
        self._pieces: dict[int, IdAllocator] = {0: self.pieces}

    def occupy(self, resident: Resident) -> None:
        """Gives a resident its room; there must be enough."""
        if isinstance(resident, Weights):
            self.weight_bytes += resident.size
        elif isinstance(resident, Adapter):
            (resident.slot,) = self.slots.allocate(1)
            resident.pieces = self._pieces_of(resident).allocate(resident.size)
            if resident.places:
                (resident.place,) = self._places_of(resident).allocate(1)

    def vacate(self, resident: Resident) -> None:
        """Takes back the room of a resident."""
        if isinstance(resident, Weights):
            resident.tensors.clear()
            self.weight_bytes -= resident.size
        elif isinstance(resident, Adapter):
            self.slots.free([resident.slot])
            self._pieces_of(resident).free(resident.pieces)
            if resident.places:
                self._places_of(resident).free([resident.place])
            resident.slot, resident.pieces, resident.place = 0, [], 0

    def problem(self, needs: Needs, all_pinned: Collection[Resident]) -> str:
        """Why a chain can never have its room beside those that are pinned, or ""."""
        own = {needs.adapter, *needs.weights.members}
        pinned = [r for r in all_pinned if r not in own and not _replaces(needs.adapter, r)]
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
            mine, total = needs.adapter, self._pieces_of(needs.adapter).total
            beside = [r for r in others if r.table_pieces == mine.table_pieces]
            pieces = total - sum(r.size for r in beside)
            if needs.adapter.size > pieces or len(others) >= self.slots.total:
                return (
                    f"adapter_slots {self.slots.total} gives room for {total} pieces of "
                    f"8 ranks, which does not hold the {needs.adapter.size} of model "
                    f"{needs.chain.name!r}"
                    + (f" beside {len(others)} pinned adapters" if others else "")
                    + ": give more"
                )
            places = needs.adapter.places
            if places and sum(r.places == places for r in others) >= places:
                return f"all {places} places for codes of few bits are those of pinned models: pin fewer"
        return ""

    def victims(
        self,
        cold: Sequence[Resident],
        candidates: Iterable[Resident],
        leaving: Sequence[Resident] = (),
    ) -> tuple[list[Resident], bool]:
        """The first candidates that help to make room for `cold`, beside those that leave anyway, and
        whether they suffice."""
        mine = next((r for r in cold if isinstance(r, Adapter)), None)  # A chain has one at most.
        lack = self._shortage(cold, leaving, mine)
        chosen: list[Resident] = []
        for part in candidates:
            if not any(lack):
                break
            given = _amounts(part, mine)
            if any(n and g for n, g in zip(lack, given, strict=True)):
                chosen.append(part)
                lack = [max(0, n - g) for n, g in zip(lack, given, strict=True)]
        return chosen, not any(lack)

    def _shortage(
        self, cold: Iterable[Resident], leaving: Iterable[Resident], mine: Adapter | None
    ) -> list[int]:
        """Bytes, slots, pieces and places that lack for `cold` once all of `leaving` have left."""
        free = [
            self.max_weight_bytes - self.weight_bytes,
            self.slots.num_free,
            self._pieces_of(mine).num_free if mine else 0,
            self._places_of(mine).num_free if mine and mine.places else 0,
        ]
        needed = [0, 0, 0, 0]
        for sign, parts in ((1, cold), (-1, leaving)):
            for part in parts:
                amounts = _amounts(part, mine)
                needed = [n + sign * a for n, a in zip(needed, amounts, strict=True)]
        if not self.max_weight_bytes:
            needed[0] = free[0] = 0
        return [max(0, n - f) for n, f in zip(needed, free, strict=True)]

    def _pieces_of(self, adapter: Adapter) -> IdAllocator:
        """The pieces of the tables that an adapter's lie in."""
        number = adapter.table_pieces
        return self._pieces.setdefault(number, IdAllocator(number, 1))

    def _places_of(self, adapter: Adapter) -> IdAllocator:
        """The places of the tables that an adapter's codes lie in."""
        return self._places.setdefault(adapter.places, IdAllocator(adapter.places, 1))


def _replaces(adapter: Adapter | None, other: Resident) -> bool:
    """Whether the other one is the same deltas on tables of another size, which leave for these."""
    return adapter is not None and isinstance(other, Adapter) and other.deltas == adapter.deltas


def _amounts(resident: Resident, mine: Adapter | None) -> tuple[int, int, int, int]:
    """Bytes and slots that something takes; pieces and places of the tables of `mine`."""
    if isinstance(resident, Weights):
        return resident.size, 0, 0, 0
    if not isinstance(resident, Adapter) or mine is None:
        return 0, 0, 0, 0
    pieces = resident.size if resident.table_pieces == mine.table_pieces else 0
    return 0, 1, pieces, int(mine.places > 0 and resident.places == mine.places)
