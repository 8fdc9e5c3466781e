"""What `server.supervisor.actuals.service` asks of the workers. Runs on the supervisor's event loop."""

import contextlib
from collections.abc import Iterator, Sequence

import structlog

from server.ipc.control import ChannelClosed, ControlError
from server.ipc.operations import BandOffsets, KeptLevels, SetBands, TakeForecasts
from server.supervisor.children import Child
from server.supervisor.workers import LIST_S, Workers

MOST_MODELS = 500  #: of one message

log = structlog.get_logger()

Bands = dict[str, list[BandOffsets]]


class ActualsRollout:
    """See `service.WatchedFleet`."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._receipts: dict[int, str] = {}  # of what came last, by worker

    def __repr__(self) -> str:
        """For example `<ActualsRollout to <Workers 3 of 3 up>>`."""
        return f"<ActualsRollout to {self._workers!r}>"

    async def take_forecasts(self) -> Sequence[KeptLevels]:
        """The forecasts that workers have since the last time. What a worker has that ends is lost with it.

        A worker that answers too late hands the same over at the next time.
        """
        try:
            answers, _ = await self._workers.ask_all(TakeForecasts(list(self._receipts.values())), LIST_S)
        except ControlError as error:
            log.warning("forecasts_not_taken", error=str(error))
            return []
        self._receipts |= {index: taken.receipt for index, taken in answers}
        return [taken for _, taken in answers]

    async def announce_bands(self, models: Bands, *, whole: bool) -> list[int]:
        """Have all workers shift these markets. Those that have not said so in time: they do when their loops turn."""
        unheard = set[int]()
        for operation in _split(models, whole=whole):
            try:
                _, missing = await self._workers.ask_all(operation, LIST_S)
            except ControlError as error:
                log.error("bands_not_followed", error=str(error))  # noqa: TRY400 -- the worker's fault, not ours
                missing = [worker.index for worker in self._workers.list_up()]
            unheard |= set(missing)
        return sorted(unheard)


async def greet_worker(worker: Child, models: Bands) -> None:
    """Have a worker that has come up shift these markets, before a front knows of it."""
    if not models or worker.channel is None:
        return
    for operation in _split(models, whole=True):
        with contextlib.suppress(ControlError, ChannelClosed, TimeoutError):  # it has ended, or follows when it turns
            await worker.channel.ask(operation, LIST_S)


def _split(models: Bands, *, whole: bool) -> Iterator[SetBands]:
    names = list(models)
    for at in range(0, max(1, len(names)), MOST_MODELS):
        yield SetBands({name: models[name] for name in names[at : at + MOST_MODELS]}, whole=whole and at == 0)
