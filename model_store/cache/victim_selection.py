"""Chooses which models to evict to make room. Pure.

The eviction policy ranks models; this module computes how much memory each eviction frees. A new row takes the place of
another row of its family, or a whole slab becomes free: of singles, or of another family.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import ceil, inf

from model_store.cache.eviction import Policy
from model_store.cache.slab_allocator import Bank, Room, can_move_rows
from model_store.cache.slots import Slot, is_evictable
from model_store.names import ModelName

MAX_SPARED = 2048  #: models that one search for a victim skips at most because a request for them is expected


@dataclass(frozen=True, slots=True)
class Evict:
    """The caller must evict these slots, call `retired` for each, and then ask again."""

    victims: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Moves:
    """The caller must copy each of these rows to its offset, call `moved` for each, and then ask again."""

    moves: tuple[tuple[Slot, int], ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """All memory is leased or being retired: the caller asks again when a lease has ended."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Waiting would not help. `why` is the reason for the client."""

    why: str


class Lost:
    """Rows that were evicted lately and have not been loaded again, counted by family: what a family lacks room for.

    Families that have no bank any more are counted too.
    """

    def __init__(self) -> None:
        self._families: OrderedDict[ModelName, str] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Lost {len(self._families)} of {len(self._counts)} families>"

    def add(self, model: ModelName, family: str, most: int) -> None:
        """Record an eviction; the oldest are forgotten beyond `most`."""
        self.found(model)
        self._families[model] = family
        self._counts[family] += 1
        while len(self._families) > most:
            self.found(next(iter(self._families)))

    def found(self, model: ModelName) -> None:
        """Forget the model: it is resident again, or its eviction is too long ago."""
        family = self._families.pop(model, None)
        if family is not None:
            self._counts[family] -= 1
            if not self._counts[family]:
                del self._counts[family]

    def of(self, family: str) -> int:
        """How many models of this family are recorded."""
        return self._counts[family]


class Victims:
    """The choice of victims for one cache, which owns `slots` and `pins` and updates `lost`."""

    def __init__(
        self,
        room: Room,
        policy: Policy,
        slots: Mapping[ModelName, Slot],
        pins: Collection[ModelName],
        moves_per_call: int,
    ) -> None:
        self.lost = Lost()
        self._room = room
        self._policy = policy
        self._slots = slots
        self._pins = pins
        self._moves_per_call = moves_per_call

    def __repr__(self) -> str:
        """For example `<Victims by <Lru 50 models>, <Lost 3 of 1 families>>`."""
        return f"<Victims by {self._policy!r}, {self.lost!r}>"

    def plan(self, bank: Bank | None, charge: int, now: float, spare: Container[ModelName]) -> Evict | Moves | Wait:
        """The cheapest way to free a row of `bank` (of `charge` bytes), or `charge` plain bytes where `bank` is None.

        The price of a way is the summed worth of its victims, as the policy estimates it. To be called when no memory
        is free. A large single may need several slabs: then this is called once for each.
        """
        # The candidates, compared by price:
        # 1. One row of the same family, if `spare` leaves one. A slab holds rows for more than this model, so this
        #    price is multiplied by the number of models that a slab of its own would bring back (`_gain`).
        # 2. Singles that together free a slab, or the bytes that are needed.
        # 3. One slab of another family, emptied by evicting its coldest rows or only by moving rows together.
        # Wait, if none of them is possible, or if all evictable memory together would not be enough.
        need = (charge if bank is None else self._room.slab_bytes) - self._room.free_bytes
        best: Evict | Moves | None = None
        price = inf
        own = None if bank is None else self._first(bank.family, now, spare)
        if bank is not None and own is not None:
            best, price = Evict((own,)), self._gain(bank) * self._worth((own,))
        elif need > self._room.slab_bytes and need > self._reclaimable():
            return Wait()
        singles = self._singles_worth(need, price)
        if singles:
            best, price = Evict(singles), self._worth(singles)
        for other in self._room.banks.values():
            drain = None if other is bank else self._drain(other, price)
            if drain is not None:
                price, best = drain
        return best or Wait()

    def may_go_for(self, model: ModelName, plan: Evict | Moves | Wait, spare: Container[ModelName]) -> bool:
        """Whether a speculative load is worth the plan: it evicts no spared model and only what is worth less."""
        if isinstance(plan, Evict):
            spared = any(victim.model in spare for victim in plan.victims)
            return not spared and self._worth(plan.victims) < self._policy.worth(model)
        return isinstance(plan, Moves)

    def pins_fill(self, bank: Bank | None, charge: int) -> Refuse | None:
        """A refusal if pinned models alone leave no room, even with their rows moved together; waiting cannot help."""
        rows: dict[str, int] = {}
        held = 0
        for slot in filter(None, map(self._slots.get, self._pins)):
            if slot.family is None:
                held += slot.charge
            else:
                rows[slot.family] = rows.get(slot.family, 0) + 1
        for family, count in rows.items():
            other = self._room.banks[family]
            if other is bank and count % bank.rows_per_slab:
                return None  # a slab that is held by pins anyway has a row for this family
            held += ceil(count / other.rows_per_slab) * self._room.slab_bytes
        need = charge if bank is None else self._room.slab_bytes
        total = self._room.budget_bytes
        if need <= total - held:
            return None
        return Refuse(f"pinned models hold {held} of {total} bytes; unpin some or raise model_cache_bytes")

    def idle(self, family: str | None) -> Iterator[Slot]:
        """Evictable slots of a family, or singles where None, in the policy's order."""
        return filter(is_evictable, map(self._slots.__getitem__, self._policy.victims(family)))

    def _first(self, family: str, now: float, spare: Container[ModelName]) -> Slot | None:
        """The family's first victim that is not in `spare`; a spared one only if the first MAX_SPARED all are.

        Models that are skipped count as requested, so that the next search does not skip them again.
        """
        passed: list[Slot] = []
        for slot in islice(self.idle(family), MAX_SPARED):
            if slot.model not in spare:
                for each in passed:
                    self._policy.foresee(each.model, now)
                return slot
            passed.append(slot)
        return passed[0] if passed else None

    def _worth(self, slots: Iterable[Slot]) -> float:
        return sum(self._policy.worth(slot.model) for slot in slots)

    def _gain(self, bank: Bank) -> int:
        """How many absent models one more slab would hold, the one that needs room among them."""
        return min(bank.rows_per_slab, self.lost.of(bank.family) + 1)

    def _reclaimable(self) -> int:
        """Bytes that would be free if all evictable slots were evicted and the other rows moved together."""
        total = sum(slot.charge for slot in self.idle(None))
        for bank in self._room.banks.values():
            stay = bank.occupied - sum(1 for _ in self.idle(bank.family))
            fixed = sum(not can_move_rows(slab) for slab in bank.slabs.values())
            total += (len(bank.slabs) - max(fixed, ceil(stay / bank.rows_per_slab))) * self._room.slab_bytes
        return total

    def _singles_worth(self, need: int, price: float) -> tuple[Slot, ...]:
        """The coldest singles that together free `need` bytes; none if they cannot, or cost the price or more."""
        victims = []
        for slot in self._cheap(None, price):
            victims.append(slot)
            need -= slot.charge
            if need <= 0:
                return tuple(victims)
        return ()

    def _drain(self, bank: Bank, price: float) -> tuple[float, Evict | Moves] | None:
        """How the family gives up one slab, and at what price; None if it cannot for less than `price`.

        The coldest rows are evicted, wherever they lie; then the rows left in the emptiest slab move to their places.
        Empty rows that the family would soon fill count as occupied: otherwise a slab that a family has just taken
        would be the cheapest of all.
        """
        excess = max(0, bank.occupied - (len(bank.slabs) - 1) * bank.rows_per_slab)
        filled = min(bank.holes, self.lost.of(bank.family))
        times = 1 + filled / excess if excess else 1
        victims = tuple(islice(self._cheap(bank.family, price / times), excess))
        if len(victims) < excess:
            return None
        by_size = sorted(bank.slabs, key=lambda index: len(bank.slabs[index]))
        slab = next((index for index in by_size if can_move_rows(bank.slabs[index])), None)
        if slab is None:
            return None
        if victims:
            return times * self._worth(victims), Evict(victims)
        return 0, Moves(tuple(self._moves(bank, slab, by_size[::-1])))

    def _cheap(self, family: str | None, price: float) -> Iterator[Slot]:
        """Evictable slots of a family (or singles), coldest first, while their summed worth stays below the price."""
        for slot in self.idle(family):
            price -= self._worth((slot,))
            if price <= 0:
                return
            yield slot

    def _moves(self, bank: Bank, slab: int, targets: Iterable[int]) -> Iterator[tuple[Slot, int]]:
        """Rows of the slab, each with the offset of an empty row of another slab."""
        holes = (
            target * self._room.slab_bytes + row * bank.row_bytes
            for target in targets
            if target != slab
            for row in bank.slabs[target].holes
        )
        yield from zip(islice(bank.slabs[slab].rows.values(), self._moves_per_call), holes, strict=False)
