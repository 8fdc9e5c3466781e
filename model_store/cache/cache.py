"""The cache of models: decides which model gets memory, which models are evicted, and which loads wait.

All decisions are pure: the current time is an argument, and victims and moves are return values. The eviction policy
(`model_store.cache.eviction`) ranks models; `model_store.cache.victim_selection` chooses victims by that ranking.

There is one `Cache` for each worker's share of a device. The worker's step thread owns it. The cache never touches
memory itself: it tells the caller to evict slots, to move a row, or to copy a new row to an offset, and the caller
reports when that is done. The memory is one pool of equally large slabs. A family of models holds slabs, and each of
its models holds one row of a slab; a single (an ONNX session) holds plain bytes of the same budget.

INVARIANT: memory of a slot is reused only after its last lease has ended and `retired` was called for it.
"""

from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from model_store.cache.eviction import Policy, make_policy
from model_store.cache.slab_allocator import Room
from model_store.cache.slots import Slot, State
from model_store.cache.victim_selection import Evict, Moves, Refuse, Victims, Wait
from model_store.errors import LoadError
from model_store.names import ModelName

MAX_FAILURES = 10_000
MAX_FAILURE_BYTES = 16 * 1024 * 1024  #: of remembered names and messages: a client can make up both
FAILURE_OVERHEAD_BYTES = 512  #: of one record, beside its texts


@dataclass(frozen=True, slots=True)
class Placed:
    """The model has a slot. The caller copies the numbers there, then calls `ready` or `abandon`."""

    slot: Slot


Placement = Placed | Evict | Moves | Wait | Refuse


@dataclass(slots=True)
class FailedLoad:
    """A failed load. Until `until` (seconds) requests get this error, so that a broken archive is not fetched again."""

    error: LoadError
    until: float
    times: int


@dataclass(slots=True)
class Load:
    """A load in flight. INVARIANT: there is at most one for each model, however many requests wait for it."""

    speculative: bool = False  #: a prefetch: no request waits for it yet
    victims: tuple[Slot, ...] = ()


def _failure_bytes(model: ModelName, failure: FailedLoad) -> int:
    """What remembering a failure costs, about: an ASCII text takes a byte a character, others up to four."""
    return 4 * (len(model) + len(str(failure.error))) + FAILURE_OVERHEAD_BYTES


class Cache:
    """The slots of one device share under one budget of bytes.

    `policy` must belong to this cache alone; the default is a new LRU. `moves_per_call` limits how many rows one
    `Moves` contains, and so how long a step can be delayed by copies.
    """

    def __init__(
        self, budget_bytes: int, slab_bytes: int, moves_per_call: int = 8, policy: Policy | None = None
    ) -> None:
        self._policy = policy or make_policy("lru")
        self._slots: dict[ModelName, Slot] = {}  # the serving slot of each model: ready, or retiring but revivable
        self._loading: dict[ModelName, Slot] = {}
        self._loads: dict[ModelName, Load] = {}
        self._failures: OrderedDict[ModelName, FailedLoad] = OrderedDict()
        self._failure_bytes = 0
        self._pins: set[ModelName] = set()
        self._room = Room(budget_bytes, slab_bytes)
        self._victims = Victims(self._room, self._policy, self._slots, self._pins, moves_per_call)

    def __repr__(self) -> str:
        """For example `<Cache 50 models, 3 loads, 1 pins, 3.5 of 4.0 MB>`."""
        used, budget = self.used_bytes / 1e6, self.budget_bytes / 1e6
        counts = f"{len(self._slots)} models, {len(self._loads)} loads, {len(self._pins)} pins"
        return f"<Cache {counts}, {used:.1f} of {budget:.1f} MB>"

    # --- requests ---------------------------------------------------------------------------------------------------

    def lease(self, model: ModelName, now: float) -> Slot | None:
        """The model's slot, with one lease more; None when the model is not resident (then call `want`).

        A victim that has not been retired yet is revived: the load that wanted its memory calls `place` again and gets
        another victim.
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

    def lease_all(self, models: Iterable[ModelName], now: float) -> list[Slot]:
        """The slots of models that are resident, each with one lease more, as `lease` gives them one by one."""
        slots, pins, hit, found = self._slots, self._pins, self._policy.hit, list[Slot]()
        for model in models:
            slot = slots[model]
            if slot.state is State.RETIRING:
                slot.state = State.READY
            slot.leases += 1
            slot.used_at = now
            if model not in pins:
                hit(model, now)
            found.append(slot)
        return found

    def release(self, slot: Slot) -> bool:
        """End one lease. True when the slot is condemned and this was its last lease: then call `retired`."""
        assert slot.leases > 0, f"{slot!r} was released more often than leased"
        slot.leases -= 1
        return slot.condemned and slot.leases == 0

    def release_all(self, slots: Iterable[Slot]) -> list[Slot]:
        """End one lease of each. Returns the slots of which `release` says True."""
        found = list[Slot]()
        for slot in slots:
            assert slot.leases > 0, f"{slot!r} was released more often than leased"
            slot.leases -= 1
            if slot.condemned and not slot.leases:
                found.append(slot)
        return found

    def want(
        self, model: ModelName, now: float, *, reload: bool = False, speculative: bool = False
    ) -> Load | FailedLoad | None:
        """Ask for a load of an absent model.

        Returns a new `Load` (a miss: the caller starts it), None (coalesced: a load is already running), or the
        `FailedLoad` of a recent load. With `reload` a load starts even if the model is resident or has just failed.
        A `speculative` load is a prefetch: `place` does not evict a model for it that is expected as soon. The first
        request that wants the model makes the load a normal one.
        """
        load = self._loads.get(model)
        if load is not None:
            load.speculative &= speculative
            return None
        failure = self._failures.get(model)
        if failure is not None and now < failure.until and not reload:
            return failure
        load = self._loads[model] = Load(speculative)
        return load

    def expect(self, model: ModelName, now: float) -> bool:
        """Keep a model that a request is expected for, as if it had been requested. False if it is not resident."""
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
        """Memory for a model that is built and verified: a row of `charge` bytes of `family`, or `charge` plain bytes.

        `spare`: models that are expected to be requested soon; they are evicted only if nothing else can be.

        INVARIANT: no model is evicted unless the victims together free enough memory.
        """
        # The possible outcomes:
        # 1. The victims of an earlier call have not been retired yet: wait for them.
        # 2. The model is larger than the budget, or its row larger than a slab: refuse it.
        # 3. An empty row or enough bytes are free: the model is placed there.
        # 4. A speculative load would evict a model that is worth as much or is spared: refuse it (see `dismiss`).
        # 5. Nothing can be evicted: refuse if pins alone hold all memory, otherwise wait for a lease to end.
        # 6. Victims free enough memory: mark them as retiring and return them; the caller evicts and calls again.
        # 7. Moving rows empties a slab: return the moves; the caller copies the rows and calls again.
        load = self._loads[model]
        if any(victim.state is State.RETIRING and not victim.leases for victim in load.victims):
            return Wait()
        room = self._room
        bank = None if family is None else room.bank(family, charge)
        limit = room.budget_bytes if bank is None else min(room.slab_bytes, room.slabs * room.slab_bytes)
        if charge > limit:
            what = "the cache budget (model_cache_bytes)" if bank is None else "a slab (slab_bytes)"
            return Refuse(f"the model needs {charge} bytes, more than {what} of {limit} bytes")
        offset = room.take(bank, charge)
        if offset is not None:
            slot = self._loading[model] = Slot(model, version, family, charge, offset, State.LOADING, now)
            if bank is not None:
                room.put(slot)
            return Placed(slot)
        plan = self._victims.plan(bank, charge, now, spare)
        if load.speculative and not self._victims.may_go_for(model, plan, spare):
            return Refuse("all room is held by models that are expected as soon, or in use")
        if isinstance(plan, Wait):
            return self._victims.pins_fill(bank, charge) or plan
        if isinstance(plan, Evict):
            load.victims = plan.victims
            for victim in plan.victims:
                victim.state = State.RETIRING
        return plan

    def ready(self, slot: Slot, now: float) -> Slot | None:
        """Serve from this slot: its numbers are in place. Returns the replaced version's slot if it has no lease."""
        slot.state = State.READY
        slot.loaded_at = slot.used_at = now
        model = slot.model
        self._victims.lost.found(model)
        old = self._slots.get(model)
        load = self._loads.pop(model)
        del self._loading[model]
        self._forget_failure(model)
        if old is not None:
            self._condemn(old)
        self._slots[model] = slot
        if model not in self._pins:
            self._policy.enter(model, slot.family, now, asked=old is None and not load.speculative)
        return old if old is not None and old.leases == 0 else None

    def adopt(self, model: ModelName, version: str, family: str, charge: int, offset: int, now: float) -> Slot | None:
        """Serve a row that lies at this offset already; None where its place is no empty row, or its model is known."""
        if model in self._slots or model in self._loads or not self._room.take_at(family, charge, offset):
            return None
        slot = self._slots[model] = Slot(model, version, family, charge, offset, State.READY, now, now)
        self._room.put(slot)
        if model not in self._pins:
            self._policy.enter(model, family, now, asked=False)
        return slot

    def abandon(self, slot: Slot) -> None:
        """Free a slot whose numbers could not be copied. The caller still ends the load by `failed`."""
        self._room.free(self._loading.pop(slot.model))

    def unchanged(self, model: ModelName, version: str) -> Slot | None:
        """End a reload that found no new version. Returns the slot that serves this version already, if one does."""
        slot = self._slots.get(model)
        if slot is None or slot.version != version:
            return None
        del self._loads[model]
        self._forget_failure(model)
        return slot

    def dismiss(self, model: ModelName) -> None:
        """End a speculative load that got no memory. It is not remembered as a failure."""
        del self._loads[model]

    def failed(self, model: ModelName, error: LoadError, now: float) -> FailedLoad:
        """End a load that failed. The failure is kept for the error's back-off time, doubled on each repetition."""
        del self._loads[model]
        before = self._forget_failure(model)
        times = before.times + 1 if before else 1
        wait = min(error.back_off_s * 2 ** min(times - 1, 30), error.max_back_off_s)
        failure = self._failures[model] = FailedLoad(error, now + wait, times)
        self._failure_bytes += _failure_bytes(model, failure)
        while len(self._failures) > MAX_FAILURES or self._failure_bytes > MAX_FAILURE_BYTES:
            self._forget_failure(next(iter(self._failures)))
        return failure

    def _forget_failure(self, model: ModelName) -> FailedLoad | None:
        """Drop what is remembered of the model's failed loads, and return it."""
        failure = self._failures.pop(model, None)
        if failure is not None:
            self._failure_bytes -= _failure_bytes(model, failure)
        return failure

    # --- evictions --------------------------------------------------------------------------------------------------

    def unload(self, model: ModelName) -> Slot | None:
        """Condemn the model's slot. The caller retires it now if it has no lease, else when `release` returns True."""
        slot = self._slots.get(model)
        if slot is not None:
            self._condemn(slot)
        return slot

    def retired(self, slot: Slot) -> bool:
        """Free the slot's memory; no step can read it any more. False if the slot was revived in the meantime."""
        if slot.state is not State.RETIRING or slot.leases:
            return False
        if self._slots.get(slot.model) is slot:
            del self._slots[slot.model]
            self._policy.leave(slot.model)
            if slot.family is not None:
                self._victims.lost.add(slot.model, slot.family, len(self._slots) + 1)
        self._room.free(slot)
        return True

    def recharge(self, slot: Slot, charge: int) -> None:
        """Count other bytes for a single that was measured again. They may exceed the budget; see `relieve`."""
        self._room.recharge(slot, charge)

    def moved(self, slot: Slot, offset: int) -> None:
        """Record that the row was copied to `offset`. A slab that becomes empty returns to the pool."""
        self._room.move(slot, offset)

    # --- pins -------------------------------------------------------------------------------------------------------

    def pin(self, model: ModelName) -> None:
        """Never evict the model, from now on or once it is loaded. The pin outlives an unload."""
        self._pins.add(model)
        slot = self._slots.get(model)
        if slot is not None:
            self._policy.leave(model)
            slot.state = State.READY

    def unpin(self, model: ModelName) -> None:
        """Allow the model to be evicted again."""
        if model not in self._pins:
            return
        self._pins.discard(model)
        slot = self._slots.get(model)
        if slot is not None:
            self._policy.enter(model, slot.family, slot.used_at, asked=False)

    # --- contents ---------------------------------------------------------------------------------------------------

    @property
    def budget_bytes(self) -> int:
        """The whole budget."""
        return self._room.budget_bytes

    @property
    def used_bytes(self) -> int:
        """Slabs held by families and bytes held by singles."""
        return self._room.used_bytes

    @property
    def loads(self) -> Iterable[ModelName]:
        """Models being loaded."""
        return self._loads.keys()

    @property
    def is_awaited(self) -> bool:
        """Whether a request waits for one of the loads; for a reload of a resident model none does."""
        return any(not load.speculative and model not in self._slots for model, load in self._loads.items())

    def is_speculative(self, model: ModelName) -> bool:
        """Whether the model is being loaded and no request waits for it."""
        load = self._loads.get(model)
        return load is not None and load.speculative

    @property
    def pins(self) -> frozenset[ModelName]:
        """Pinned names, resident or not."""
        return frozenset(self._pins)

    def failures(self) -> Iterable[tuple[ModelName, FailedLoad]]:
        """Models whose last load failed, also after their back-off."""
        return self._failures.items()

    def get(self, model: ModelName) -> Slot | None:
        """The model's slot without a lease: its numbers must not be read."""
        return self._slots.get(model)

    def __contains__(self, model: ModelName) -> bool:
        return model in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def relieve(self, need: int) -> tuple[Slot, ...]:
        """Evict singles, coldest first, until they free `need` bytes: the device has less memory than the budget says.

        The caller drops them and calls `retired` for each. Rows stay, because evicting a row does not free its slab.
        """
        victims = []
        for slot in self._victims.idle(None):
            if need <= 0:
                break
            slot.state = State.RETIRING
            victims.append(slot)
            need -= slot.charge
        return tuple(victims)

    def make_room(self, need: int, keep: Slot) -> tuple[Slot, ...] | None:
        """Evict singles other than `keep`, coldest first, until `need` bytes more fit into the budget.

        None, and none is evicted, where they would not fit. The caller drops them and calls `retired` for each.
        """
        over, victims = self.used_bytes + need - self.budget_bytes, list[Slot]()
        for slot in self._victims.idle(None):
            if over <= 0:
                break
            if slot is not keep:
                victims.append(slot)
                over -= slot.charge
        if over > 0:
            return None
        for slot in victims:
            slot.state = State.RETIRING
        return tuple(victims)

    def _condemn(self, slot: Slot) -> None:
        slot.condemned = True
        slot.state = State.RETIRING
        del self._slots[slot.model]
        self._policy.leave(slot.model)
