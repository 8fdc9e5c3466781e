"""The cache's decisions: who holds which room, who goes, who waits. Pure: time comes in, victims and moves go out.

Who is worth how much is an eviction policy's to say (`model_store.eviction`); what its going would free is said here.

One `Cache` per device share, owned by the worker's step thread. It never touches memory: it says *evict these slots*,
*move that row*, *copy your row to this offset*, and is told when that has happened. Room is one pool of equal slabs. A
family holds slabs and a model a row in one of them; a single (an ONNX session) holds plain bytes of the same budget.
"""

from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil, inf

from model_store.errors import LoadError
from model_store.eviction import Policy, policy_named
from model_store.names import ModelName
from model_store.slots import Bank, Lost, Slab, Slot, State, evictable, movable

MAX_FAILURES = 10_000
MAX_SPARED = 2048  #: of those about to be asked, that one search for a victim passes over
NO_ROW = -1


@dataclass(frozen=True, slots=True)
class Placed:
    """Room is yours: bring the numbers, then call `ready` or `abandon`."""

    slot: Slot


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


Placement = Placed | Evict | Moves | Wait | Refuse


@dataclass(slots=True)
class Failure:
    """A failed load, remembered until `until` so that a broken archive is not fetched a thousand times."""

    error: LoadError
    until: float
    times: int


@dataclass(slots=True)
class Load:
    """A load in flight: one per model however many wait."""

    started_at: float
    speculative: bool = False  #: no request waits for it yet
    victims: tuple[Slot, ...] = ()


class Cache:
    """The slots of one device share under one byte budget. See the module's docstring for who calls what.

    `policy` is this cache's own; LRU where none is given.
    """

    def __init__(
        self, budget_bytes: int, slab_bytes: int, moves_per_call: int = 8, policy: Policy | None = None
    ) -> None:
        self.budget_bytes = budget_bytes
        self.slab_bytes = slab_bytes
        self.moves_per_call = moves_per_call
        self._free_slabs = list(range(budget_bytes // slab_bytes))[::-1]
        self._banks: dict[str, Bank] = {}
        self._policy = policy or policy_named("lru")
        self._single_bytes = 0
        self._slots: dict[ModelName, Slot] = {}  # the serving slot of each model: ready, or retiring but revivable
        self._loading: dict[ModelName, Slot] = {}
        self._loads: dict[ModelName, Load] = {}
        self._failures: OrderedDict[ModelName, Failure] = OrderedDict()
        self._lost = Lost()
        self._pins: set[ModelName] = set()
        self._slab_count = len(self._free_slabs)

    def __repr__(self) -> str:
        """For example `<Cache 50 models, 3 loads, 1 pins, 3.5 of 4.0 MB>`."""
        used, budget = self.used_bytes / 1e6, self.budget_bytes / 1e6
        pins = len(self._pins)
        counts = f"{len(self._slots)} models, {len(self._loads)} loads, {pins} pins"
        return f"<Cache {counts}, {used:.1f} of {budget:.1f} MB>"

    # --- requests ---------------------------------------------------------------------------------------------------

    def lease(self, model: ModelName, now: float) -> Slot | None:
        """The model's slot, leased; None when the model is not here (then ask `want`).

        A victim that has not left yet is revived: whoever wanted its room asks `place` again and gets another one.
        """
        slot = self._slots.get(model)
        if slot is None:
            return None
        if slot.state is State.RETIRING:
            slot.state = State.READY
        slot.leases += 1
        slot.used_at = now
        if model not in self._pins:
            self._policy.hit(model, now)
        return slot

    def release(self, slot: Slot) -> bool:
        """End one lease. True when the slot was told to go and this was its last lease: forget it, then `retired`."""
        assert slot.leases > 0, f"{slot!r} was released more often than leased"
        slot.leases -= 1
        return slot.condemned and slot.leases == 0

    def want(
        self, model: ModelName, now: float, *, reload: bool = False, speculative: bool = False
    ) -> Load | Failure | None:
        """What a request for an absent model does: a new `Load` (miss: start it), None (coalesced: one is running), or
        the remembered `Failure` of a recent load. `reload` starts one though the model is here or failed just now.

        `speculative`: nobody asks yet, so that `place` gives it no room of a model that is expected as soon; the first
        request that wants it makes it a load like any other.
        """
        load = self._loads.get(model)
        if load is not None:
            load.speculative &= speculative
            return None
        failure = self._failures.get(model)
        if failure is not None and now < failure.until and not reload:
            return failure
        load = self._loads[model] = Load(now, speculative)
        return load

    def expect(self, model: ModelName, now: float) -> bool:
        """The model is about to be asked: where it is here, it is to stay as if it had been. False where it is not."""
        if model not in self._slots:
            return False
        if model not in self._pins:
            self._policy.foresee(model, now)
        return True

    # --- loads ------------------------------------------------------------------------------------------------------

    def place(
        self,
        model: ModelName,
        version: str,
        charge: int,
        now: float,
        family: str | None = None,
        *,
        spare: Container[ModelName] = (),
    ) -> Placement:
        """Room for a model that is built and verified: a row of `charge` bytes of `family`, or `charge` plain bytes.

        For a row, another one of its family goes that is not of `spare`, about to be asked, as long as there is one.
        Nobody is asked to go unless enough of them can: a model that would not fit in the end evicts no one. A
        speculative load takes what is free, or what the policy expects to be asked later than its own model (where it
        expects nothing, as LRU does, the first to go), and nothing of `spare`; else it is refused, to be ended by
        `dismiss`.
        """
        load = self._loads[model]
        if any(victim.state is State.RETIRING and not victim.leases for victim in load.victims):
            return Wait()
        bank = None if family is None else self._bank(family, charge)
        limit = self.budget_bytes if bank is None else min(self.slab_bytes, self._slab_count * self.slab_bytes)
        if charge > limit:
            what = "the cache budget (model_cache_bytes)" if bank is None else "a slab (slab_bytes)"
            return Refuse(f"the model needs {charge} bytes, more than {what} of {limit} bytes")
        offset = self._take_bytes(charge) if bank is None else self._take_row(bank)
        if offset is not None:
            slot = self._loading[model] = Slot(model, version, family, charge, offset, State.LOADING, now)
            if bank is not None:
                bank.put(*self._row_of(slot), slot)
            return Placed(slot)
        plan = self._plan(bank, charge, now, spare)
        if load.speculative and not self._may_make_room(plan, model, spare):
            return Refuse("all room is held by models that are expected as soon, or in use")
        if isinstance(plan, Wait):
            return self._pins_fill(bank, charge) or plan
        if isinstance(plan, Evict):
            load.victims = plan.victims
            for victim in plan.victims:
                victim.state = State.RETIRING
        return plan

    def ready(self, slot: Slot, now: float) -> Slot | None:
        """The numbers are in place: serve from this slot. Returns the version it replaces if that can leave at once."""
        slot.state = State.READY
        slot.loaded_at = slot.used_at = now
        model = slot.model
        self._lost.found(model)
        old = self._slots.get(model)
        load = self._loads.pop(model)
        del self._loading[model]
        self._failures.pop(model, None)
        if old is not None:
            self._condemn(old)
        self._slots[model] = slot
        if model not in self._pins:
            self._policy.enter(model, slot.family, now, asked=old is None and not load.speculative)
        return old if old is not None and old.leases == 0 else None

    def abandon(self, slot: Slot) -> None:
        """The numbers never arrived: the room is free again. The load is still to be ended by `failed`."""
        self._free(self._loading.pop(slot.model))

    def unchanged(self, model: ModelName, version: str) -> Slot | None:
        """The slot that serves this version already, if one does: a reload found nothing new, and is over."""
        slot = self._slots.get(model)
        if slot is None or slot.version != version:
            return None
        del self._loads[model]
        self._failures.pop(model, None)
        return slot

    def dismiss(self, model: ModelName) -> None:
        """A speculative load that found no room is over, and held against nobody."""
        del self._loads[model]

    def failed(self, model: ModelName, error: LoadError, now: float) -> Failure:
        """The load is over without a model. Remembered for the error's back-off, twice as long on each repetition."""
        del self._loads[model]
        before = self._failures.pop(model, None)
        times = before.times + 1 if before else 1
        wait = min(error.back_off_s * 2 ** min(times - 1, 30), error.max_back_off_s)
        failure = self._failures[model] = Failure(error, now + wait, times)
        if len(self._failures) > MAX_FAILURES:
            self._failures.popitem(last=False)
        return failure

    # --- leaving ----------------------------------------------------------------------------------------------------

    def unload(self, model: ModelName) -> Slot | None:
        """Tell the model's slot to go for good. Forget it now if it has no lease, else when `release` says so."""
        slot = self._slots.get(model)
        if slot is not None:
            self._condemn(slot)
        return slot

    def retired(self, slot: Slot) -> bool:
        """The last step that could read the slot is over: its room is free. False if it was revived meanwhile."""
        if slot.state is not State.RETIRING or slot.leases:
            return False
        if self._slots.get(slot.model) is slot:
            del self._slots[slot.model]
            self._policy.leave(slot.model)
            if slot.family is not None:
                self._lost.add(slot.model, slot.family, len(self._slots) + 1)
        self._free(slot)
        return True

    def moved(self, slot: Slot, offset: int) -> None:
        """The row has been copied to `offset`; a slab left empty goes back to the pool."""
        assert slot.family is not None, "a single has no row"
        self._vacate(slot)
        slot.offset = offset
        self._banks[slot.family].put(*self._row_of(slot), slot)

    # --- pins -------------------------------------------------------------------------------------------------------

    def pin(self, model: ModelName) -> None:
        """The model, once here, is never evicted. Unloading it is still possible; the pin then holds for the next."""
        self._pins.add(model)
        slot = self._slots.get(model)
        if slot is not None:
            self._policy.leave(model)
            slot.state = State.READY

    def unpin(self, model: ModelName) -> None:
        """The model may be evicted again."""
        if model not in self._pins:
            return
        self._pins.discard(model)
        slot = self._slots.get(model)
        if slot is not None:
            self._policy.enter(model, slot.family, slot.used_at, asked=False)

    # --- what is here -----------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Slabs held by families and bytes held by singles."""
        return (self._slab_count - len(self._free_slabs)) * self.slab_bytes + self._single_bytes

    @property
    def loads(self) -> Iterable[ModelName]:
        """Models being loaded."""
        return self._loads.keys()

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for one of the loads."""
        return any(not load.speculative for load in self._loads.values())

    def is_speculative(self, model: ModelName) -> bool:
        """Whether the model is being loaded and nobody waits for that."""
        load = self._loads.get(model)
        return load is not None and load.speculative

    @property
    def pins(self) -> frozenset[ModelName]:
        """Pinned names, here or not."""
        return frozenset(self._pins)

    def failures(self) -> Iterable[tuple[ModelName, Failure]]:
        """Models whose last load failed, also after their back-off."""
        return self._failures.items()

    def get(self, model: ModelName) -> Slot | None:
        """The model's slot, without a lease: for looking, not for running."""
        return self._slots.get(model)

    def __contains__(self, model: ModelName) -> bool:
        return model in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def relieve(self, need: int) -> tuple[Slot, ...]:
        """The device has less memory than the budget says: the coldest singles worth `need` bytes, or all that may go.

        Forget them and call `retired` for each. Rows stay: they lie in slabs, whose memory their going would not free.
        """
        victims = []
        for slot in self._idle(None):
            if need <= 0:
                break
            slot.state = State.RETIRING
            victims.append(slot)
            need -= slot.charge
        return tuple(victims)

    # --- room -------------------------------------------------------------------------------------------------------

    def _bank(self, family: str, row_bytes: int) -> Bank:
        """The family's bank, or one that is kept once it has a slab."""
        bank = self._banks.get(family) or Bank(family, row_bytes, max(1, self.slab_bytes // row_bytes))
        assert bank.row_bytes == row_bytes, f"family {family} has rows of {bank.row_bytes} bytes, not of {row_bytes}"
        return bank

    def _idle(self, family: str | None) -> Iterator[Slot]:
        """Slots of a family, or singles, that may go now: the first to go first."""
        return filter(evictable, map(self._slots.__getitem__, self._policy.victims(family)))

    def _first(self, family: str, now: float, spare: Container[ModelName]) -> Slot | None:
        """Who goes first of a family, but of `spare` only where the first MAX_SPARED all are of that.

        Those that were passed over stay as if they had been asked, so that nobody passes over them again and again.
        """
        passed: list[Slot] = []
        for slot in islice(self._idle(family), MAX_SPARED):
            if slot.model not in spare:
                for each in passed:
                    self._policy.foresee(each.model, now)
                return slot
            passed.append(slot)
        return passed[0] if passed else None

    def _worth(self, slots: Iterable[Slot]) -> float:
        return sum(self._policy.worth(slot.model) for slot in slots)

    def _row_of(self, slot: Slot) -> tuple[int, int]:
        """Indices of its slab and of its row in there."""
        slab, at = divmod(slot.offset, self.slab_bytes)
        return slab, at // slot.charge

    def _condemn(self, slot: Slot) -> None:
        slot.condemned = True
        slot.state = State.RETIRING
        del self._slots[slot.model]
        self._policy.leave(slot.model)

    def _take_bytes(self, charge: int) -> int | None:
        if charge > self.budget_bytes - self.used_bytes:
            return None
        self._single_bytes += charge
        return NO_ROW

    def _take_row(self, bank: Bank) -> int | None:
        """An empty row's offset, in the fullest slab that has one (so that others can empty), else in a fresh slab."""
        if bank.open:
            slab = max(bank.open, key=lambda index: len(bank.slabs[index]))
        elif self.budget_bytes - self.used_bytes >= self.slab_bytes:
            slab = self._free_slabs.pop()
            bank.slabs[slab] = Slab({}, set(range(bank.rows_per_slab)))
            bank.open.add(slab)
            self._banks[bank.family] = bank
        else:
            return None
        row = next(iter(bank.slabs[slab].holes))
        return slab * self.slab_bytes + row * bank.row_bytes

    def _free(self, slot: Slot) -> None:
        slot.state = State.EMPTY
        if slot.family is None:
            self._single_bytes -= slot.charge
        else:
            self._vacate(slot)

    def _vacate(self, slot: Slot) -> None:
        assert slot.family is not None, "a single has no row"
        bank = self._banks[slot.family]
        slab, row = self._row_of(slot)
        bank.drop(slab, row)
        if slab not in bank.slabs:
            self._free_slabs.append(slab)
        if not bank.slabs:
            del self._banks[bank.family]

    # --- who goes ---------------------------------------------------------------------------------------------------

    def _pins_fill(self, bank: Bank | None, charge: int) -> Refuse | None:
        """Whether pins alone leave no room, if they moved together as far as they can: then waiting is in vain."""
        rows: dict[str, int] = {}
        held = 0
        for slot in filter(None, map(self._slots.get, self._pins)):
            if slot.family is None:
                held += slot.charge
            else:
                rows[slot.family] = rows.get(slot.family, 0) + 1
        for family, count in rows.items():
            other = self._banks[family]
            if other is bank and count % bank.rows_per_slab:
                return None  # a slab that pins hold anyway has an unpinned row for this family
            held += ceil(count / other.rows_per_slab) * self.slab_bytes
        need = charge if bank is None else self.slab_bytes
        if need <= self.budget_bytes - held:
            return None
        total = self.budget_bytes
        return Refuse(f"pinned models hold {held} of {total} bytes; unpin some or raise model_cache_bytes")

    def _plan(self, bank: Bank | None, charge: int, now: float, spare: Container[ModelName]) -> Evict | Moves | Wait:
        """Nobody has room to give away: whoever is worth least of what could go, if enough of it can.

        For a row that is another row of its family, singles worth a slab, or another family's slab. A slab has rows for
        more models than this one, so for a family that lost some of late it may cost more than that one row. A large
        single may need several slabs, one after another.
        """
        need = (charge if bank is None else self.slab_bytes) - (self.budget_bytes - self.used_bytes)
        best: Evict | Moves | None = None
        price = inf
        own = None if bank is None else self._first(bank.family, now, spare)
        if bank is not None and own is not None:
            best, price = Evict((own,)), self._gain(bank) * self._worth((own,))
        elif need > self.slab_bytes and need > self._reclaimable():
            return Wait()
        singles = self._singles_worth(need, price)
        if singles:
            best, price = Evict(singles), self._worth(singles)
        for other in self._banks.values():
            drain = None if other is bank else self._drain(other, price)
            if drain is not None:
                price, best = drain
        return best or Wait()

    def _gain(self, bank: Bank) -> int:
        """How many models another slab would hold that are not here now, the one that needs room among them."""
        return min(bank.rows_per_slab, self._lost.of(bank.family) + 1)

    def _may_make_room(self, plan: Evict | Moves | Wait, model: ModelName, spare: Container[ModelName]) -> bool:
        """Whether a load that nobody waits for is worth the plan."""
        if isinstance(plan, Evict):
            spared = any(victim.model in spare for victim in plan.victims)
            return not spared and self._worth(plan.victims) < self._policy.worth(model)
        return isinstance(plan, Moves)

    def _reclaimable(self) -> int:
        """Bytes that singles and families could give up if all that may go went and the rest moved together."""
        total = sum(slot.charge for slot in self._idle(None))
        for bank in self._banks.values():
            stay = bank.occupied - sum(1 for _ in self._idle(bank.family))
            fixed = sum(not movable(slab) for slab in bank.slabs.values())
            total += (len(bank.slabs) - max(fixed, ceil(stay / bank.rows_per_slab))) * self.slab_bytes
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
        filled = min(bank.holes, self._lost.of(bank.family))
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
        for slot in self._idle(family):
            price -= self._worth((slot,))
            if price <= 0:
                return
            yield slot

    def _moves(self, bank: Bank, slab: int, targets: Iterable[int]) -> Iterator[tuple[Slot, int]]:
        """Rows of the slab, and the holes of the others that they go to."""
        holes = (
            target * self.slab_bytes + row * bank.row_bytes
            for target in targets
            if target != slab
            for row in bank.slabs[target].holes
        )
        yield from zip(islice(bank.slabs[slab].rows.values(), self.moves_per_call), holes, strict=False)
