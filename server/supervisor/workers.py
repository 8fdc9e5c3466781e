"""The workers as operators, the watch and releases see them: which are up, which is a model's home, asking one or all.

Runs on the supervisor's event loop. `server.supervisor.children` runs the processes.
"""

import asyncio
from collections.abc import Iterator, Sequence

from server.errors import Situation
from server.ipc.control import ControlError
from server.ipc.operations import Operation, Reply
from server.routing import Router
from server.supervisor.children import Child

LIST_S = 2.0  #: how long a list waits for a worker; it then names the worker as unheard
SILENT_WAIT_S = 0.5  #: how long an operation waits for a silent worker, which performs it should it turn again


class Workers:
    """All workers by index, up or not. `patience_s`: how long an operation without a limit of its own is waited for."""

    def __init__(self, workers: Sequence[Child], patience_s: float) -> None:
        self._workers, self._patience_s = workers, patience_s
        self._homes = Router()  # over all workers, up or not: a pin's home does not wander
        for worker in workers:
            self._homes.worker_up(worker.index)

    def __repr__(self) -> str:
        """For example `<Workers 2 of 3 up>`."""
        return f"<Workers {len(self.list_up())} of {len(self._workers)} up>"

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Child]:
        return iter(self._workers)

    def __getitem__(self, index: int) -> Child:
        return self._workers[index]

    def list_up(self) -> list[Child]:
        """Those that are up, silent ones too."""
        return [worker for worker in self._workers if worker.ready.is_set()]

    def find_ready(self) -> set[int]:
        """The indices of those that are up and turn."""
        return {worker.index for worker in self.list_up() if not worker.is_silent}

    def home(self, model: str) -> Child:
        """The worker that owns the model by rendezvous over all workers."""
        return self._workers[self._homes.order(model)[0]]

    def tell(self, operation: Operation[None]) -> None:
        """Tell all that are up."""
        for worker in self.list_up():
            if worker.channel is not None:
                worker.channel.tell(operation)

    async def ask(self, worker: Child, operation: Operation[Reply], timeout_s: float | None = None) -> Reply:
        """The worker's reply. Raises ControlError."""
        return await worker.ask(operation, timeout_s or self._patience_s)

    async def ask_each(
        self, operation: Operation[Reply], timeout_s: float | None = None
    ) -> list[tuple[Child, Reply | BaseException]]:
        """What came of each worker that is up: its reply, or why there is none. A silent one is waited for briefly."""
        up = self.list_up()
        asked = (self.ask(worker, operation, SILENT_WAIT_S if worker.is_silent else timeout_s) for worker in up)
        return list(zip(up, await asyncio.gather(*asked, return_exceptions=True), strict=True))

    async def ask_all(
        self, operation: Operation[Reply], timeout_s: float | None = None
    ) -> tuple[list[tuple[int, Reply]], list[int]]:
        """The replies of all workers that are up, by index, and the workers that have not answered in time.

        A worker that dies meanwhile holds nothing any more. Raises ControlError for any other failure.
        """
        found, unheard = [], []
        for worker, answer in await self.ask_each(operation, timeout_s):
            if isinstance(answer, ControlError):
                if answer.situation == Situation.DEADLINE:
                    unheard.append(worker.index)
                elif answer.situation != Situation.WORKER_LOST and worker.ready.is_set():
                    raise answer
            elif not isinstance(answer, BaseException):
                found.append((worker.index, answer))
        return found, unheard
