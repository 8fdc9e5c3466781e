"""Resident models follow the store: a changed archive is noticed while its model is resident, and its holders load it.

The supervisor compares what its workers serve with what the store has, so that a host asks once however many workers
it has, and no worker's threads wait for a listing. A holder loads the new version beside the old one, proves it and
swaps between two steps, as `POST /fleet/reload` has it. An archive that was removed goes on serving.

Runs on the supervisor's event loop.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, Protocol

import structlog

from model_store.errors import LoadError
from model_store.names import ModelName
from model_store.stores.object_store import InvalidStoreUrl, Source
from server.errors import Situation
from server.ipc.control import ControlError
from server.metrics import HostMetrics
from server.supervisor.store_watch.lookups import Found, StoreLookups

LEAST_PAUSE_S = 0.5  #: between two rounds, however short `revalidate_s` is
MOST_PAUSE_S = 600.0  #: between two rounds while the store is gone, unless `revalidate_s` is longer
AT_ONCE = 256  #: models whose reloads wait for their workers at the same time
MOST_TOLD = 10_000  #: names that events have brought and that are not reloaded yet
RETRY_S = 10.0  #: after which an event without effect is followed again where nothing is compared; doubles each time
MOST_TRIES = 8  #: of an event: the last one comes 21 minutes later
SETTLED_ROUNDS = 10  #: for how many rounds an archive that was refused, or twice found unchanged, is not loaded

log = structlog.get_logger()

Residents = Mapping[ModelName, Mapping[int, str]]  #: the version that each worker serves, by model
Holding = tuple[ModelName, int]  #: a model at a worker


class Settled(NamedTuple):
    """What came of a reload that has swapped nothing: counts until a round, for one version in the store.

    `newest`: that version. `is_final`: the archive is not loaded meanwhile. A first load that finds the serving version
    is not final: the store may have failed in between, so that the copy on disk was taken.
    """

    newest: str
    until: int
    is_final: bool


class Retry(NamedTuple):
    """An event without effect: it is followed again `at` (monotonic), and was so many times."""

    at: float
    tries: int


class Fleet(Protocol):
    """What the watch has of the supervisor."""

    async def list_versions(self) -> Residents:
        """What the workers serve."""

    def has_listed_all(self) -> bool:
        """Whether the last list has what all workers serve: none was starting, silent or slow."""

    async def reload_at(self, worker: int, model: ModelName) -> str:
        """Have the worker ask the store, load and swap. The version that serves then. Raises ControlError."""


class TooManyEvents(Exception):
    """Events come faster than their models are reloaded."""


class StoreWatch:
    """See the module. `revalidate_s`: within this time a change is noticed. `lanes`: loads at one worker at a time."""

    def __init__(self, fleet: Fleet, metrics: HostMetrics, revalidate_s: float, lanes: int, *, polls: bool) -> None:
        self._fleet, self._metrics, self._lanes, self._polls = fleet, metrics, lanes, polls
        self._interval_s = max(LEAST_PAUSE_S, revalidate_s / 2)
        self._rounds = self._failures = 0
        self._failing_since = 0.0  # monotonic; counts while there are failures
        self._settled: dict[Holding, Settled] = {}
        self._told: set[ModelName] = set()
        self._again: dict[ModelName, Retry] = {}
        self._woken = asyncio.Event()

    def __repr__(self) -> str:
        """For example `<StoreWatch every 30 s, 0 settled, 2 told>`."""
        every = f"every {self._interval_s:g} s" if self._polls else "by events alone"
        return f"<StoreWatch {every}, {len(self._settled)} settled, {len(self._told)} told>"

    async def run(self, open_store: Callable[[], Source]) -> None:
        """Watch until cancelled. Where the store cannot be opened, the workers say so; then there is nothing to do."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_following_events())
            if self._polls:
                group.create_task(self._keep_following_store(open_store))

    async def _keep_following_store(self, open_store: Callable[[], Source]) -> None:
        try:
            lookups = StoreLookups(await asyncio.to_thread(open_store))
        except (LoadError, InvalidStoreUrl) as error:
            log.warning("store_not_watched", error=str(error))
            return
        loop, pause_s = asyncio.get_running_loop(), self._interval_s * random.uniform(0.5, 1.0)  # noqa: S311 -- jitter
        while True:
            await asyncio.sleep(pause_s)
            started = loop.time()
            try:
                await self.follow_store(lookups)
            except Exception:  # a bug of ours must not end the watch
                log.exception("watch_failed")
            pause_s = max(0.0, started + self.pause_s() - loop.time())

    async def _keep_following_events(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._until_retry_s()):
                    await self._woken.wait()
            try:
                await self.follow_events()
            except Exception:  # as above
                log.exception("watch_failed")

    def pause_s(self) -> float:
        """Seconds from the start of one round to the next: longer each time that the store was gone."""
        return min(max(MOST_PAUSE_S, self._interval_s), self._interval_s * float(2 ** min(self._failures, 20)))

    def failing_s(self) -> float:
        """Seconds since the first of the rounds for which the store was gone; 0 if it answered the last one."""
        return time.monotonic() - self._failing_since if self._failures else 0.0

    # --- by comparison ----------------------------------------------------------------------------------------------

    async def follow_store(self, lookups: StoreLookups) -> None:
        """One round: compare all resident models with the store, and reload what has changed."""
        residents = await self._fleet.list_versions()
        if not residents:
            return
        self._rounds += 1
        self._forget(residents)
        found = await lookups.find_versions(residents.keys(), self._interval_s / 2)
        self._note_outage(found.gone)
        changed = self._find_changed(residents, found)
        self._count(residents, found, {model for model, _ in changed})
        await self._reload_all(residents, changed, found.versions)

    def release(self, model: ModelName) -> None:
        """Load the model's archive again in the next round, whatever came of it before."""
        for holding in [holding for holding in self._settled if holding[0] == model]:
            del self._settled[holding]

    def _forget(self, residents: Residents) -> None:
        """Keep what is settled only for what is still held, and not for ever."""
        for (model, worker), settled in list(self._settled.items()):
            if settled.until <= self._rounds or worker not in residents.get(model, {}):
                del self._settled[model, worker]

    def _note_outage(self, gone: str) -> None:
        if gone and not self._failures:
            log.warning("store_not_followed", error=gone)
            self._failing_since = time.monotonic()
        self._failures = self._failures + 1 if gone else 0

    def _find_changed(self, residents: Residents, found: Found) -> list[Holding]:
        """The models, with each of their holders, of which the store has another version."""
        return [
            (model, worker)
            for model, newest in found.versions.items()
            for worker, version in residents[model].items()
            if newest != version and not self._is_settled((model, worker), newest)
        ]

    def _is_settled(self, holding: Holding, newest: str) -> bool:
        settled = self._settled.get(holding)
        return settled is not None and settled.is_final and settled.newest == newest

    def _count(self, residents: Residents, found: Found, changed: set[ModelName]) -> None:
        checks, failed = self._metrics.checks, len(residents) - len(found.versions) - len(found.removed)
        checks["changed"].inc(len(changed))
        checks["unchanged"].inc(len(found.versions) - len(changed))
        checks["removed"].inc(len(found.removed))
        checks["failed"].inc(failed)

    # --- by events --------------------------------------------------------------------------------------------------

    def tell(self, models: Iterable[ModelName]) -> None:
        """The store says that these have changed. Raises TooManyEvents, and then takes none of them."""
        told = self._told.union(models)
        if len(told.union(self._again)) > MOST_TOLD:
            raise TooManyEvents(
                f"{len(self._told.union(self._again))} changed archives wait for their reload already; send it again"
            )
        self._told = told
        self._woken.set()

    async def follow_events(self) -> None:
        """Reload what events have named, where it is resident.

        An event is answered before. So where no comparison would find what was missed, it is followed again if a worker
        could not be asked or refused for a reason that passes, or if it serves the same version after all: it takes the
        copy on disk while the store is out.
        """
        told = self._take_told()
        if not told:
            return
        residents = await self._fleet.list_versions()
        holdings = [(model, worker) for model in sorted(told) for worker in residents.get(model, {})]
        for holding in holdings:
            self._settled.pop(holding, None)
        vain = await self._reload_all(residents, holdings, {})
        if not self._polls:
            self._try_again(told, vain if self._fleet.has_listed_all() else set(told))

    def _until_retry_s(self) -> float | None:
        return max(0.0, min(retry.at for retry in self._again.values()) - time.monotonic()) if self._again else None

    def _take_told(self) -> dict[ModelName, int]:
        """What is to be reloaded, and how often each was tried before."""
        now = time.monotonic()
        told = {model: retry.tries for model, retry in self._again.items() if retry.at <= now}
        told.update(dict.fromkeys(self._told, 0))
        self._again = {model: retry for model, retry in self._again.items() if model not in told}
        self._told = set()
        self._woken.clear()
        return told

    def _try_again(self, told: Mapping[ModelName, int], vain: Collection[ModelName]) -> None:
        now = time.monotonic()
        for model in vain:
            tries = told[model] + 1
            if tries < MOST_TRIES:
                self._again[model] = Retry(now + RETRY_S * 2.0 ** (tries - 1), tries)
            else:
                log.warning("event_without_effect", model=model, tries=tries)

    # --- loads ------------------------------------------------------------------------------------------------------

    async def _reload_all(
        self, residents: Residents, holdings: list[Holding], versions: Mapping[ModelName, str]
    ) -> set[ModelName]:
        """Reload all, each worker so many at a time that loader threads are left for requests. Those tried in vain."""
        vain: set[ModelName] = set()
        lanes = {worker: asyncio.Semaphore(self._lanes) for _, worker in holdings}
        for at in range(0, len(holdings), AT_ONCE):
            some = holdings[at : at + AT_ONCE]
            followed = await asyncio.gather(
                *(
                    self._reload(model, worker, residents[model][worker], versions.get(model, ""), lanes[worker])
                    for model, worker in some
                )
            )
            vain.update(model for (model, _), done in zip(some, followed, strict=True) if not done)
        return vain

    async def _reload(self, model: ModelName, worker: int, before: str, newest: str, lane: asyncio.Semaphore) -> bool:
        """One model at one holder. What cannot be loaded, or proves to be the same, is left alone for some rounds.

        False where another try may have another end.
        """
        async with lane:
            try:
                served = await self._fleet.reload_at(worker, model)
            except ControlError as error:
                log.warning("change_not_followed", model=model, worker=worker, serving=before, error=str(error))
                if error.situation == Situation.ARCHIVE_FAILED:
                    self._settle((model, worker), newest, is_final=True)
                return error.situation in (Situation.ARCHIVE_FAILED, Situation.NOT_FOUND)
        if served == before:
            known = self._settled.get((model, worker))
            self._settle((model, worker), newest, is_final=known is not None and known.newest == newest)
        else:
            log.info("change_followed", model=model, worker=worker, before=before, version=served)
        return served != before

    def _settle(self, holding: Holding, newest: str, *, is_final: bool) -> None:
        if newest:  # else it was an event, which says nothing of the version
            self._settled[holding] = Settled(newest, self._rounds + SETTLED_ROUNDS, is_final)
