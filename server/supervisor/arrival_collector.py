"""What the supervisor asks the workers for the access log. Runs on the supervisor's event loop."""

from collections.abc import Sequence

from server.access_log import Arrivals, Receipt
from server.ipc.operations import TakeAccessLog
from server.supervisor.workers import LIST_S, Workers


class ArrivalCollector:
    """Takes the workers' rows, and tells each the next time that they have arrived."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._receipts: dict[int, Receipt] = {}  # of what came last, by worker

    def __repr__(self) -> str:
        """For example `<ArrivalCollector of <Workers 3 of 3 up>>`."""
        return f"<ArrivalCollector of {self._workers!r}>"

    async def take(self) -> Sequence[Arrivals]:
        """The rows that the workers have since the last time. Those of a worker that ends are lost with it.

        A worker that answers too late hands the same over at the next time, and holds up no other's rows.
        """
        answers = await self._workers.ask_each(TakeAccessLog(list(self._receipts.values())), LIST_S)
        taken = {worker.index: answer for worker, answer in answers if isinstance(answer, Arrivals)}
        self._receipts |= {index: arrivals.receipt for index, arrivals in taken.items()}
        return list(taken.values())
