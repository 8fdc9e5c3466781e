"""The lanes of a worker's loads: the disk lane builds, the store lane asks the store, the code lane starts code.

A load begins in the disk lane, where a copy at hand is built. What the store has to be asked for goes on in the store
lane, and comes back to be built. A code archive is unpacked in the disk lane, and goes on in the code lane, where its
process is started. The step thread owns everything here but the steps, which run on the lanes' threads.

INVARIANT: no thread of the disk lane waits for the store, or for the code of an archive. So keys that hang keep no
model waiting that is on disk, and code that hangs keeps only code waiting.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Protocol

from model_store.errors import CodeBusy, LoadError, StoreUnavailable
from model_store.names import ModelName
from model_store.stores.load_part import LoadPart
from model_store.stores.load_parts import LoadParts
from server.ipc.pulse import Pulse
from server.worker.bell import Bell
from server.worker.engine.device_errors import ending_if_lost
from server.worker.load_lane import KEPT, Lane, LoadRun, Outcome, StepEnd
from server.worker.model_loader import (
    AskStore,
    BuildFetched,
    LoadedModel,
    ModelBuilder,
    StartCode,
    unexpected,
)

#: Seconds for which the store may be asked: then a due copy is served meanwhile, and another request may begin.
SLOW_S = 1.0
#: Bytes of archives that requests to the store may bring at a time, by the size of the latest ones.
FETCHED_BYTES = 64 << 20
#: Slow requests to the store for each loader thread, beside those that are not slow.
SLOW_PLACES = 2
#: Seconds for which a key that timed out is suspected to do so again.
SUSPECTED_S = 60.0
MAX_SUSPECTS = 4096
#: Code archives that load at a time, each in a process of its own, and that wait for that with their files unpacked.
CODE_PLACES, MOST_CODE_WAITING = 8, 64


class LaneOwner(Protocol):
    """What the lanes tell `ModelLoads`, and ask it, on the step thread."""

    def may_build(self) -> bool:
        """Whether there is memory for one more built model."""

    def may_start_code(self) -> bool:
        """Whether one more code archive may be loaded: few of those that are wait for memory."""

    def refuse_asking(self, model: ModelName) -> LoadError | None:
        """The load has to ask the store: why it must not, or None."""

    def end_load(self, model: ModelName, built: LoadedModel | LoadError) -> None:
        """A load has ended."""


class LoadLanes:
    """The lanes of one worker: `threads` for the disk, as many and SLOW_PLACES times more for the store.

    While the store answers quickly and its archives are small, it is asked for `asks` at a time.
    """

    def __init__(
        self,
        loader: ModelBuilder,
        owner: LaneOwner,
        *,
        pulse: Pulse,
        threads: int,
        now: Callable[[], float],
        asks: int = 0,
    ) -> None:
        self._loader, self._owner, self._pulse, self._now = loader, owner, pulse, now
        self._threads, self._asks = threads, max(threads, asks)
        self._archive_bytes = 0.0  # of the largest of the latest archives from the store; 0: none is known
        parts = self._step, self._pass_on
        self.disk = Lane("loader", threads, now(), *parts, yields=True)
        self.store = Lane("store", threads * (1 + SLOW_PLACES), now(), *parts, self._asks, yields=True)
        self.code = Lane("code", CODE_PLACES, now(), *parts)
        self._ended = deque[tuple[Lane, LoadRun, StepEnd]]()  # steps, as the threads pass them on
        self._bell = Bell(self._end_steps)
        self._to_start = deque[LoadRun]()
        self._to_build = deque[LoadRun]()
        self._fetched = 0  # those of them whose archives are in memory
        self._to_ask = deque[LoadRun]()  # keys that have not timed out lately
        self._to_ask_suspects = deque[LoadRun]()
        self._runs: dict[ModelName, LoadRun] = {}  # of the loads that have not ended
        self._left: set[ModelName] = set()  # whose runs still ask the store for a load that has ended
        self._suspects: OrderedDict[ModelName, float] = OrderedDict()  # keys that timed out -> until when it counts
        self._due: dict[ModelName, float] = {}  # when a load is expected to end
        self._parts: dict[ModelName, LoadParts] = {}  # of loads that have not been taken by `take_parts`
        self._is_closed = False

    def __repr__(self) -> str:
        """For example `<LoadLanes 3 build, 4 wait to, 12 ask the store, 7 wait to>`."""
        building, asking = len(self.disk.running), len(self.store.running)
        waiting = len(self._to_build)
        return f"<LoadLanes {building} build, {waiting} wait to, {asking} ask the store, {self.waiting_to_ask} wait to>"

    @property
    def waiting_to_ask(self) -> int:
        """Loads that wait for a place in the store lane."""
        return len(self._to_ask) + len(self._to_ask_suspects)

    @property
    def waiting_to_build(self) -> int:
        """Loads that wait for a thread of the disk lane."""
        return len(self._to_build)

    def expected_s(self, model: ModelName, now: float) -> float:
        """In how many seconds a model that is being loaded is expected to be built; 0 while no load was measured."""
        return max(0.0, self._due.get(model, now) - now)

    def stuck_s(self, now: float) -> float:
        """How many seconds all threads of a lane have been busy with the same steps; 0 while both have idle ones."""
        return max(self.disk.stuck_s(now), self.store.stuck_s(now))

    def is_doubtful(self, now: float) -> bool:
        """Whether a request to the store is slow, so that it is worth to ask whether the store answers at all."""
        return any(now - run.began_at >= SLOW_S for run in self.store.running)

    def prefers_copy(self, model: ModelName, now: float) -> bool:
        """Whether a due copy is to be served at once: the model's key timed out lately, or is still being asked for."""
        return model in self._left or self._suspects.get(model, now) > now

    # --- loads ------------------------------------------------------------------------------------------------------

    def start(self, model: ModelName, *, revalidate: bool, stale: bool) -> None:
        """Begin a load; see `ModelBuilder.load`. It ends by `LaneOwner.end_load`."""
        now = self._now()
        run = LoadRun(model, self._loader.load(model, revalidate=revalidate, stale=stale), now)
        self._runs[model] = run
        self._parts[model] = run.parts
        self._expect(model, self._build_wait(), now)
        self._to_build.append(run)
        self.advance()

    def late(self, now: float) -> Iterator[ModelName]:
        """Models whose load waits for the store for too long, while there is a copy that could be served."""
        for run in (*self._to_ask, *self._to_ask_suspects, *self.store.running):
            if run.has_copy and run.stand_in is None and not run.left and now - run.entered_at >= SLOW_S:
                yield run.model

    def serve_copy(self, model: ModelName) -> None:
        """Load the copy on disk; with it the load ends, see `leave`."""
        run = self._runs[model]
        steps = self._loader.load(model, stale=True)
        run.stand_in = LoadRun(model, steps, self._now(), stands_in_for=run)
        self._parts[model] = run.stand_in.parts  # what it waited for the store until now is in the time of the load
        self._to_build.append(run.stand_in)
        self.advance()

    def leave(self, model: ModelName) -> None:
        """The load has ended otherwise; a request to the store that has begun goes on, and its answer is kept on disk.

        One that has not begun is forgotten, so that no more of them wait than there are loads.
        """
        run = self._runs.pop(model)
        self._due.pop(model, None)
        run.left = True
        for queue in (self._to_ask, self._to_ask_suspects):
            if run in queue:
                queue.remove(run)
                run.steps.close()
                return
        self._left.add(model)

    def take_parts(self, model: ModelName) -> list[LoadPart]:
        """The parts of the model's load, which has ended; none where it came from memory."""
        found = self._parts.pop(model, None)
        return [] if found is None else found.parts

    def advance(self) -> None:
        """Start the steps that may start now: called when one ends, when memory is free, and as time passes."""
        if self._is_closed:
            return
        while self._to_build and not self.disk.is_full and self._owner.may_build():
            self._begin(self.disk, self._to_build.popleft())
        while self._to_start and not self.code.is_full and self._owner.may_start_code():
            self._begin(self.code, self._to_start.popleft())
        while (run := self._choose_to_ask(self._now())) is not None:
            self._begin(self.store, run)

    def close(self) -> None:
        """Start no more steps."""
        self._is_closed = True
        self.disk.close()
        self.store.close()
        self.code.close()
        self._bell.close()

    # --- steps ------------------------------------------------------------------------------------------------------

    def _choose_to_ask(self, now: float) -> LoadRun | None:
        """The load that may ask the store next.

        1. A request is slow, and all places are taken: none.
        2. A request is slow, and as many as there are loader threads ask and are not slow, or have got what waits to be
           built: none. So a request that hangs gives its place to another after SLOW_S, and archives in memory are few.
        3. None is slow, and as many as `_most_asked` ask or have got what waits to be built: none.
        4. Keys that timed out lately have at most half of the loader threads. Else the one that waits for longest.
        """
        if not self.waiting_to_ask:
            return None
        quick = sum(now - run.began_at < SLOW_S for run in self.store.running)
        is_slow = quick < len(self.store.running)
        if is_slow and self.store.is_full:
            return None
        if quick + self._fetched >= (self._threads if is_slow else self._most_asked):
            return None
        suspects = sum(run.model in self._suspects for run in self.store.running)
        queues = [self._to_ask]
        if suspects < max(1, self._threads // 2):
            queues.append(self._to_ask_suspects)
        filled = [queue for queue in queues if queue]
        return min(filled, key=lambda queue: queue[0].entered_at).popleft() if filled else None

    @property
    def _most_asked(self) -> int:
        """Requests to a quick store at a time: as many as loader threads while nothing is known of its archives."""
        if not self._archive_bytes:
            return self._threads
        return min(self._asks, max(self._threads, int(FETCHED_BYTES / self._archive_bytes)))

    def _begin(self, lane: Lane, run: LoadRun) -> None:
        self._fetched -= run.fetched
        run.fetched = False
        lane.begin(run, self._now())

    def _step(self, run: LoadRun) -> StepEnd:
        """Run the next step, on a lane's thread. It is noted: foreign bytes in native code may end this process."""
        started = time.perf_counter()
        outcome: Outcome
        try:
            with self._pulse.noting(run.model, "load"), ending_if_lost(), run.parts.listening():
                outcome = next(run.steps)
        except StopIteration as end:
            outcome = end.value
        except LoadError as error:  # no variable keeps it: its traceback holds this frame, and the archive's bytes
            return error, time.perf_counter() - started
        except Exception as error:  # a bug of ours must cost one model, not the worker
            return unexpected(run.model, error), time.perf_counter() - started
        return outcome, time.perf_counter() - started

    def _pass_on(self, lane: Lane, run: LoadRun, end: StepEnd) -> None:
        """Runs on the lane's thread. The step thread is told once of all that ends until it looks."""
        self._ended.append((lane, run, end))
        self._bell.ring()

    def _end_steps(self) -> None:
        """Take what has ended. INVARIANT: a failure leaves nothing that is not told again."""
        try:
            for _ in range(len(self._ended)):
                lane, run, (outcome, seconds) = self._ended.popleft()
                self._end_step(lane, run, outcome, seconds)
        finally:
            if self._ended:
                self._bell.ring()
            self.advance()

    def _end_step(self, lane: Lane, run: LoadRun, outcome: Outcome, seconds: float) -> None:
        now = self._now()
        lane.end(run, now)
        if lane is self.store:
            self._judge_key(run, outcome, now)
            if not is_unanswered(outcome):
                lane.measure(seconds)
        elif isinstance(outcome, LoadedModel):
            lane.measure(seconds)
        self._go_on(run, outcome, now)

    def _judge_key(self, run: LoadRun, outcome: Outcome, now: float) -> None:
        """Suspect a key that timed out; forget the suspicion when it is answered."""
        self._suspects.pop(run.model, None)
        if is_unanswered(outcome) and now - run.began_at >= SLOW_S:
            self._suspects[run.model] = now + SUSPECTED_S
            if len(self._suspects) > MAX_SUSPECTS:
                self._suspects.popitem(last=False)

    def _go_on(self, run: LoadRun, outcome: Outcome, now: float) -> None:
        """What follows a step: the other lane, or the end of the load."""
        if run.left:  # what it fetched is on disk
            run.steps.close()
            if run.stands_in_for is None:
                self._left.discard(run.model)
        elif isinstance(outcome, AskStore):
            self._enter_store(run, outcome, now)
        elif isinstance(outcome, BuildFetched):
            run.fetched, run.entered_at, run.has_copy = True, now, False
            self._fetched += 1
            self._archive_bytes = max(outcome.size, KEPT * self._archive_bytes)
            self._expect(run.model, self._build_wait(), now)
            self._to_build.append(run)
        elif isinstance(outcome, StartCode):
            self._enter_code(run)
        elif run.stands_in_for is None:
            self._end(run, outcome)
        elif isinstance(outcome, LoadedModel) and run.stands_in_for.has_copy:
            self.leave(run.model)
            self._owner.end_load(run.model, outcome)
        # else the copy is none, or the store has answered meanwhile: the load itself goes on

    def _enter_store(self, run: LoadRun, ask: AskStore, now: float) -> None:
        if run.stands_in_for is not None:  # the copy has gone meanwhile
            run.steps.close()
            return
        run.entered_at, run.has_copy = now, ask.has_copy
        wait = self.store.seconds * (1 + self.waiting_to_ask / self._most_asked) + self.disk.seconds
        self._expect(run.model, min(wait, SLOW_S + self.disk.seconds) if ask.has_copy else wait, now)
        refused = None if ask.has_copy else self._owner.refuse_asking(run.model)
        if refused is not None:
            run.steps.close()
            self._end(run, refused)
        else:
            (self._to_ask_suspects if self._suspects.get(run.model, now) > now else self._to_ask).append(run)

    def _enter_code(self, run: LoadRun) -> None:
        """The load has to start code: it waits for its turn, unless too many do."""
        if len(self._to_start) < MOST_CODE_WAITING:
            self._to_start.append(run)
            return
        run.steps.close()
        if run.stands_in_for is None:
            self._end(run, CodeBusy(f"{run.model}: {MOST_CODE_WAITING} code archives wait to be loaded already"))

    def _end(self, run: LoadRun, outcome: LoadedModel | LoadError) -> None:
        del self._runs[run.model]
        self._due.pop(run.model, None)
        if run.stand_in is not None:
            run.stand_in.left = True
        self._owner.end_load(run.model, outcome)

    def _expect(self, model: ModelName, wait: float, now: float) -> None:
        if wait:
            self._due[model] = now + wait

    def _build_wait(self) -> float:
        return self.disk.seconds * (1 + len(self._to_build) / self._threads)


def is_unanswered(outcome: Outcome) -> bool:
    """Whether the store did not answer a request."""
    return isinstance(outcome, StoreUnavailable) or (isinstance(outcome, BuildFetched) and outcome.stale)
