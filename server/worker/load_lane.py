"""One lane of a worker's loads: its threads, and the steps that run on them.

The step thread owns it, but for `step` and `pass_on`, which run on the threads.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

from model_store.errors import LoadError
from model_store.names import ModelName
from model_store.stores.load_parts import LoadParts
from server.worker.model_loader import AskStore, BuildFetched, LoadedModel, LoadSteps, StartCode
from server.worker.thread_priority import yield_to_others

KEPT = 7 / 8  #: weight of the times that were measured before

Outcome = AskStore | BuildFetched | StartCode | LoadedModel | LoadError
StepEnd = tuple[Outcome, float]  # and the seconds that the step took


@dataclass(slots=True, eq=False)
class LoadRun:
    """One load on its way through the lanes. `entered_at`: its lane; `began_at`: its step. Monotonic seconds."""

    model: ModelName
    steps: LoadSteps
    entered_at: float
    began_at: float = 0.0
    fetched: bool = False  #: its archive is in memory and waits to be built
    has_copy: bool = False  #: it asks the store, and a copy on disk could be served meanwhile
    stand_in: "LoadRun | None" = None  #: the load of that copy
    stands_in_for: "LoadRun | None" = None
    left: bool = False  #: the load has ended without it: of what it finds only the copy on disk is of use
    parts: LoadParts = field(default_factory=LoadParts)  #: how long its parts took

    def __repr__(self) -> str:
        """For example `<LoadRun of au/NSW1.mar>`."""
        return f"<LoadRun of {self.model}{', left' if self.left else ''}>"


class Lane:
    """Threads and who waits for them. `most`: steps at a time, beyond which it is full; it may have more threads.

    `step` runs on the threads, and so does `pass_on`, which takes what it gave. `yields`: its threads leave the
    processor to those that answer requests. They are made when they are missed, and do not keep the process alive: one
    may hang in a request to the store. A queue and plain threads cost a step a third of what an executor does.
    """

    def __init__(
        self,
        name: str,
        most: int,
        now: float,
        step: Callable[[LoadRun], StepEnd],
        pass_on: "Callable[[Lane, LoadRun, StepEnd], object]",
        threads: int = 0,
        *,
        yields: bool = False,
    ) -> None:
        self.most = most
        self.running: set[LoadRun] = set()
        self.seconds = 0.0  #: what a step takes, as a moving mean
        self._moved_at = now  # when a step last began or ended
        self._name, self._step, self._pass_on, self._yields = name, step, pass_on, yields
        self._most_threads = max(most, threads)
        self._threads: list[threading.Thread] = []
        self._to_run = SimpleQueue[LoadRun | None]()  # None: a thread is to end

    @property
    def is_full(self) -> bool:
        """Whether all threads are busy."""
        return len(self.running) >= self.most

    def begin(self, run: LoadRun, now: float) -> None:
        """Run the run's next step on a thread."""
        self.running.add(run)
        run.began_at = self._moved_at = now
        if len(self._threads) < min(self._most_threads, len(self.running)):
            name = f"{self._name}_{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._run_steps, name=name, daemon=True))
            self._threads[-1].start()
        self._to_run.put(run)

    def _run_steps(self) -> None:
        if self._yields:
            yield_to_others()
        while (run := self._to_run.get()) is not None:
            self._pass_on(self, run, self._step(run))
            del run  # an idle thread holds no archive

    def end(self, run: LoadRun, now: float) -> None:
        """The step has ended."""
        self.running.discard(run)
        self._moved_at = now

    def measure(self, seconds: float) -> None:
        """Note what a step took."""
        self.seconds = seconds if not self.seconds else KEPT * self.seconds + (1 - KEPT) * seconds

    def stuck_s(self, now: float) -> float:
        """For how many seconds all threads have been busy with the same steps; 0 while one is idle."""
        return now - self._moved_at if self.is_full else 0.0

    def close(self) -> None:
        """End the threads, each after its step."""
        for _ in self._threads:
            self._to_run.put(None)
