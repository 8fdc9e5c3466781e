"""Who goes for the room of another: pure. A policy gives the order, here is said what each one's going would free.

A row takes the place of another row of its family, or a slab's: of singles, or of another family that can spare one.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import ceil, inf

from model_store.cache.eviction import Policy
from model_store.cache.slab_allocator import Bank, Room, movable
from model_store.cache.slots import Slot, evictable
from model_store.names import ModelName

MAX_SPARED = 2048  #: of those about to be asked, that one search for a victim passes over


@dataclass(frozen=True, slots=True)
class Evict:
    """These must go first: forget them, call `retired` for each, then ask again."""

    victims: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Moves:
    """These rows make room by moving: copy each to its offset, call `moved`, then ask again."""

    moves: tuple[tuple[Slot, int], ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """All room is leased or on its way out: ask again when a lease has ended."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Waiting would not help; the text says why."""

    why: str


class Lost:
    """Rows that were evicted lately and have not come back: what families, also those without a bank, lack room for."""

    def __init__(self) -> None:
        self._families: OrderedDict[ModelName, str] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Lost {len(self._families)} of {len(self._counts)} families>"

    def add(self, model: ModelName, family: str, most: int) -> None:
        """A model was evicted; beyond so many the oldest are forgotten."""
        self.found(model)
        self._families[model] = family
        self._counts[family] += 1
        while len(self._families) > most:
            self.found(next(iter(self._families)))

    def found(self, model: ModelName) -> None:
        """It is here again, or does not matter any more."""
        family = self._families.pop(model, None)
        if family is not None:
            self._counts[family] -= 1
            if not self._counts[family]:
                del self._counts[family]

    def of(self, family: str) -> int:
        """How many of a family."""
        return self._counts[family]


class Victims:
    """The choice of victims in one cache's room. `slots` and `pins` are the cache's own, `lost` is told by it."""

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
        """Nobody has room to give away: whoever is worth least of what could go, if enough of it can.

        `bank`: of the row of `charge` bytes that is to come; None for plain bytes. For a row that is another row of its
        family, not of `spare` if there is one, singles worth a slab, or another family's slab. A slab has rows for more
        models than this one, so for a family that lost some of late it may cost more than that one row. A large single
        may need several slabs, one after another.
        """
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
        """Whether a model that nobody waits for is worth the plan."""
        if isinstance(plan, Evict):
            spared = any(victim.model in spare for victim in plan.victims)
            return not spared and self._worth(plan.victims) < self._policy.worth(model)
        return isinstance(plan, Moves)

    def pins_fill(self, bank: Bank | None, charge: int) -> Refuse | None:
        """Whether pins alone leave no room, if they moved together as far as they can: then waiting is in vain."""
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
                return None  # a slab that pins hold anyway has an unpinned row for this family
            held += ceil(count / other.rows_per_slab) * self._room.slab_bytes
        need = charge if bank is None else self._room.slab_bytes
        total = self._room.budget_bytes
        if need <= total - held:
            return None
        return Refuse(f"pinned models hold {held} of {total} bytes; unpin some or raise model_cache_bytes")

    def idle(self, family: str | None) -> Iterator[Slot]:
        """Slots of a family, or singles, that may go now: the first to go first."""
        return filter(evictable, map(self._slots.__getitem__, self._policy.victims(family)))

    def _first(self, family: str, now: float, spare: Container[ModelName]) -> Slot | None:
        """Who goes first of a family, but of `spare` only where the first MAX_SPARED all are of that.

        Those that were passed over stay as if they had been asked, so that nobody passes over them again and again.
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
        """How many models another slab would hold that are not here now, the one that needs room among them."""
        return min(bank.rows_per_slab, self.lost.of(bank.family) + 1)

    def _reclaimable(self) -> int:
        """Bytes that singles and families could give up if all that may go went and the rest moved together."""
        total = sum(slot.charge for slot in self.idle(None))
        for bank in self._room.banks.values():
            stay = bank.occupied - sum(1 for _ in self.idle(bank.family))
            fixed = sum(not movable(slab) for slab in bank.slabs.values())
            total += (len(bank.slabs) - max(fixed, ceil(stay / bank.rows_per_slab))) * self._room.slab_bytes
        return total

    def _singles_worth(self, need: int, price: float) -> tuple[Slot, ...]:
        """The first singles to go that together free `need` bytes; none if they cannot, or are not worth less."""
        victims = []
        for slot in self._cheap(None, price):
            victims.append(slot)
            need -= slot.charge
            if need <= 0:
                return tuple(victims)
        return ()

    def _drain(self, bank: Bank, price: float) -> tuple[float, Evict | Moves] | None:
        """How the family gives up one slab, and what that costs; None if it cannot, or for no less than the price.

        The first rows to go do so, wherever they lie; then the others of the emptiest slab move to their places. Rows
        that would be filled soon count as the others do: else a slab that has just been taken is the cheapest of all.
        """
        excess = max(0, bank.occupied - (len(bank.slabs) - 1) * bank.rows_per_slab)
        filled = min(bank.holes, self.lost.of(bank.family))
        times = 1 + filled / excess if excess else 1
        victims = tuple(islice(self._cheap(bank.family, price / times), excess))
        if len(victims) < excess:
            return None
        by_size = sorted(bank.slabs, key=lambda index: len(bank.slabs[index]))
        slab = next((index for index in by_size if movable(bank.slabs[index])), None)
        if slab is None:
            return None
        if victims:
            return times * self._worth(victims), Evict(victims)
        return 0, Moves(tuple(self._moves(bank, slab, by_size[::-1])))

    def _cheap(self, family: str | None, price: float) -> Iterator[Slot]:
        """Who may go of a family, or of the singles, in order, while all of them together are worth less than that."""
        for slot in self.idle(family):
            price -= self._worth((slot,))
            if price <= 0:
                return
            yield slot

    def _moves(self, bank: Bank, slab: int, targets: Iterable[int]) -> Iterator[tuple[Slot, int]]:
        """Rows of the slab, and the holes of the others that they go to."""
        holes = (
            target * self._room.slab_bytes + row * bank.row_bytes
            for target in targets
            if target != slab
            for row in bank.slabs[target].holes
        )
        yield from zip(islice(bank.slabs[slab].rows.values(), self._moves_per_call), holes, strict=False)
