"""What the supervisor asks the workers for the access log. Runs on the supervisor's event loop."""

import asyncio
from collections.abc import Sequence

from server.access_log import Arrivals, Receipt
from server.ipc.operations import TakeAccessLog
from server.supervisor.workers import LIST_S, SILENT_WAIT_S, Workers


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
        operation, up = TakeAccessLog(list(self._receipts.values())), self._workers.list_up()
        asked = (self._workers.ask(each, operation, SILENT_WAIT_S if each.is_silent else LIST_S) for each in up)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        taken = {each.index: answer for each, answer in zip(up, answers, strict=True) if isinstance(answer, Arrivals)}
        self._receipts |= {index: arrivals.receipt for index, arrivals in taken.items()}
        return list(taken.values())
