"""Asks the store for the versions of resident archives, as cheaply as it can. On daemon threads of the supervisor.

A listing answers for a thousand archives by one request; a request without a body (HEAD) answers for one, and may be
permitted where listings are not. The threads are daemons, so that a store that hangs does not hold up the server's end.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from model_store.errors import LoadError, ModelNotFound, StoreDenied, StoreUnavailable
from model_store.names import ModelName
from model_store.stores.object_store import Source
from model_store.stores.store_health import PROBE, StoreHealth

FEW = 20  #: archives that are asked one by one in any case
PRICE = 10  #: requests for one archive that a page of a listing is worth: what S3 and its kin bill
PAGE = 1000  #: archives on a page of a listing
THREADS = 8  #: that ask for single archives at the same time
MOST_PAUSE_S = 0.1  #: between two requests of a thread; less where the time there is would not do

_Result = TypeVar("_Result")

log = structlog.get_logger()


@dataclass
class Found:
    """What the store said. An archive that is in none of these was not asked for: the store was gone before.

    `failed`: archives that it refuses, or names no version of. `gone`: why it cannot be asked at all.
    """

    versions: dict[ModelName, str] = field(default_factory=dict)
    removed: set[ModelName] = field(default_factory=set)
    failed: set[ModelName] = field(default_factory=set)
    gone: str = ""


class StoreLookups:
    """Lookups in one store. It remembers whether listings are of use there."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._listing_denied = False
        self._listed = 0  # archives that the last listing had, at least

    def __repr__(self) -> str:
        """For example `<StoreLookups in Source(...), 300 listed>`."""
        return f"<StoreLookups in {self._source!r}, {self._listed} listed>"

    async def find_versions(self, names: Collection[ModelName], spread_s: float) -> Found:
        """The versions of these archives. The pauses between requests for single ones are at most `spread_s` in all."""
        found = Found()
        asking = _Asking(self._source, found)
        try:
            if self.prefers_listing(len(names)):
                await _run_on_daemon(lambda: self._list(names, found))
            # Some stores end a listing at an odd key, so what is missing there is not known to be removed.
            rest = sorted(set(names) - found.versions.keys())
            pause_s = min(MOST_PAUSE_S, spread_s * THREADS / max(1, len(rest)))
            shares = [share for at in range(THREADS) if (share := rest[at::THREADS])]
            asks = (_run_on_daemon(lambda share=share: asking.ask_each(share, pause_s)) for share in shares)  # type: ignore[misc]
            if not found.gone:
                await asyncio.gather(*asks)
        finally:
            asking.stop.set()
        return found

    def prefers_listing(self, names: int) -> bool:
        """Whether a listing costs less than a request for each of so many archives."""
        return not self._listing_denied and names > FEW and self._listed <= _most_listed(names)

    def _list(self, names: Collection[ModelName], found: Found) -> None:
        """Take versions from a listing; give it up when it proves too long."""
        count, most, wanted = 0, _most_listed(len(names)), frozenset(names)
        try:
            prefix = os.path.commonprefix(list(names))  # noqa: RUF071 -- of texts: that is what a listing takes
            for each in self._source.list(prefix):
                count += 1
                if count > most:
                    break
                if each.name in wanted and each.version:
                    found.versions[each.name] = each.version
        except StoreDenied as error:
            self._listing_denied = True
            log.info("store_not_listed", why=str(error), instead="archives are asked for one by one")
        except LoadError as error:
            found.gone = str(error)
        self._listed = count


class _Asking:
    """A round of requests for single archives, by several threads. `stop`: no further one is begun."""

    def __init__(self, source: Source, found: Found) -> None:
        self._source, self._found = source, found
        self.stop = threading.Event()
        self._health = StoreHealth()
        self._probing = threading.Lock()

    def __repr__(self) -> str:
        """For example `<_Asking Source(...), <StoreHealth answering>>`."""
        return f"<_Asking {self._source!r}, {self._health!r}>"

    def ask_each(self, names: Sequence[ModelName], pause_s: float) -> None:
        """Ask for archives one by one, until the store is gone."""
        for name in names:
            if self.stop.wait(pause_s):
                return
            try:
                version = self._ask(name)
            except ModelNotFound:
                self._found.removed.add(name)
            except StoreUnavailable as error:
                if self._is_gone(error):
                    return
                self._found.failed.add(name)
            except LoadError:
                self._found.failed.add(name)
            else:
                if version:
                    self._found.versions[name] = version
                else:
                    self._found.failed.add(name)

    def _ask(self, name: ModelName) -> str:
        asked_at = time.monotonic()
        try:
            version = self._source.read_version(name)
        except StoreUnavailable:
            self._health.note_failure(asked_at)
            raise
        except LoadError:
            self._health.note_answer()
            raise
        self._health.note_answer()
        return version

    def _is_gone(self, error: StoreUnavailable) -> bool:
        """Whether the store fails, and not one of its keys: nothing was answered since, and a probe is not either."""
        with self._probing:
            if not self.stop.is_set() and self._health.is_out:
                with contextlib.suppress(LoadError):
                    self._ask(PROBE)
            if not self.stop.is_set() and self._health.is_out:
                self._found.gone = str(error)
                self.stop.set()
            return self.stop.is_set()


def _most_listed(names: int) -> int:
    """The archives of a listing that costs as much as a request for each of `names`."""
    return PAGE * max(1, names // PRICE)


async def _run_on_daemon(work: Callable[[], _Result]) -> _Result:
    """The result of `work`, which runs on a thread of its own that nobody waits for at the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def settle(result: _Result | None, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            outcome = (work(), None)
        except BaseException as error:  # it is the caller's
            outcome = (None, error)  # type: ignore[assignment]
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="store-lookup", daemon=True).start()
    return await future
