"""The cache's decisions: who holds which room, who goes, who waits. Pure: time comes in, victims and moves go out.

Who is worth how much is an eviction policy's to say (`model_store.cache.eviction`), who goes for whom
`model_store.cache.victim_selection`'.

One `Cache` per device share, owned by the worker's step thread. It never touches memory: it says *evict these slots*,
*move that row*, *copy your row to this offset*, and is told when that has happened. Room is one pool of equal slabs. A
family holds slabs and a model a row in one of them; a single (an ONNX session) holds plain bytes of the same budget.
"""

from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from model_store.cache.eviction import Policy, policy_named
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
    """Room is yours: bring the numbers, then call `ready` or `abandon`."""

    slot: Slot


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


def _failure_bytes(model: ModelName, failure: Failure) -> int:
    """What remembering a failure costs, about: an ASCII text takes a byte a character, others up to four."""
    return 4 * (len(model) + len(str(failure.error))) + FAILURE_OVERHEAD_BYTES


class Cache:
    """The slots of one device share under one byte budget. See the module's docstring for who calls what.

    `policy` is this cache's own; LRU where none is given.
    """

    def __init__(
        self, budget_bytes: int, slab_bytes: int, moves_per_call: int = 8, policy: Policy | None = None
    ) -> None:
        self._policy = policy or policy_named("lru")
        self._slots: dict[ModelName, Slot] = {}  # the serving slot of each model: ready, or retiring but revivable
        self._loading: dict[ModelName, Slot] = {}
        self._loads: dict[ModelName, Load] = {}
        self._failures: OrderedDict[ModelName, Failure] = OrderedDict()
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
        """The numbers are in place: serve from this slot. Returns the version it replaces if that can leave at once."""
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

    def abandon(self, slot: Slot) -> None:
        """The numbers never arrived: the room is free again. The load is still to be ended by `failed`."""
        self._room.free(self._loading.pop(slot.model))

    def unchanged(self, model: ModelName, version: str) -> Slot | None:
        """The slot that serves this version already, if one does: a reload found nothing new, and is over."""
        slot = self._slots.get(model)
        if slot is None or slot.version != version:
            return None
        del self._loads[model]
        self._forget_failure(model)
        return slot

    def dismiss(self, model: ModelName) -> None:
        """A speculative load that found no room is over, and held against nobody."""
        del self._loads[model]

    def failed(self, model: ModelName, error: LoadError, now: float) -> Failure:
        """The load is over without a model. Remembered for the error's back-off, twice as long on each repetition."""
        del self._loads[model]
        before = self._forget_failure(model)
        times = before.times + 1 if before else 1
        wait = min(error.back_off_s * 2 ** min(times - 1, 30), error.max_back_off_s)
        failure = self._failures[model] = Failure(error, now + wait, times)
        self._failure_bytes += _failure_bytes(model, failure)
        while len(self._failures) > MAX_FAILURES or self._failure_bytes > MAX_FAILURE_BYTES:
            self._forget_failure(next(iter(self._failures)))
        return failure

    def _forget_failure(self, model: ModelName) -> Failure | None:
        """Drop what is remembered of the model's failed loads, and return it."""
        failure = self._failures.pop(model, None)
        if failure is not None:
            self._failure_bytes -= _failure_bytes(model, failure)
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
                self._victims.lost.add(slot.model, slot.family, len(self._slots) + 1)
        self._room.free(slot)
        return True

    def moved(self, slot: Slot, offset: int) -> None:
        """The row has been copied to `offset`; a slab left empty goes back to the pool."""
        self._room.move(slot, offset)

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
    def budget_bytes(self) -> int:
        """All the room there is."""
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
        for slot in self._victims.idle(None):
            if need <= 0:
                break
            slot.state = State.RETIRING
            victims.append(slot)
            need -= slot.charge
        return tuple(victims)

    def _condemn(self, slot: Slot) -> None:
        slot.condemned = True
        slot.state = State.RETIRING
        del self._slots[slot.model]
        self._policy.leave(slot.model)
