"""Carries out what clients of TorchServe's and Multi Model Server's management APIs ask. Runs on the supervisor's loop.

A version with workers is loaded when it is registered or scaled, and unloaded when it has none any more. Between the
two the cache decides, as for every model: one that is evicted for others is loaded again by its next request.

Use it from a dialect: `register`, `scale`, `set_default`, `unregister` change the table and tell all fronts before they
return; `table` is read directly, and `observe` says what the workers have of a version. Each raises a
`RegistrationRefused`, and then nothing is changed.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Protocol

import msgspec
import structlog
from msgspec import Struct

from model_store.archives.manifest import Kind
from model_store.names import InvalidModelName, ModelName, parse_model_name
from server.errors import Situation
from server.ipc.control import ControlError
from server.ipc.operations import ArchiveFacts, Batching, ModelState, RegisteredModel
from server.supervisor.registrations.archive_urls import find_key, name_archive
from server.supervisor.registrations.refusals import (
    ArchiveUnreadable,
    BadOption,
    NotInStore,
    NotLoaded,
    RegistrationRefused,
    shorten_name,
)
from server.supervisor.registrations.table import Registration, RegistrationTable, ServingOptions, with_workers

log = structlog.get_logger()

DEFAULT_VERSION = "1.0"  #: of an archive that says none, as the archivers have it
MAX_WORKERS = 64


class RegisterRequest(Struct, frozen=True):
    """What a client asks to register. Empty texts: what the archive says holds."""

    url: str
    name: str = ""
    version: str = ""
    handler: str = ""
    runtime: str = ""
    options: ServingOptions = ServingOptions()  #: `min_workers` are the initial ones


class ScaleRequest(Struct, frozen=True):
    """How many workers a version is to have. No version: the default one."""

    name: str
    version: str | None
    min_workers: int
    max_workers: int


class RegisteredFleet(Protocol):
    """What the service has of the supervisor."""

    async def read_archive(self, key: ModelName) -> ArchiveFacts:
        """What the archive says of itself. Raises ControlError."""

    async def load_registered(self, key: ModelName) -> None:
        """Load it at its home. Raises ControlError."""

    async def describe_by_code(self, key: ModelName, headers: list[tuple[str, str]]) -> bytes:
        """What its code says of itself. Raises ControlError."""

    async def set_batching(self, key: ModelName, batching: Batching | None) -> None:
        """Have it batched so from its next load on; None: as it says itself."""

    async def set_replicas(self, key: ModelName, count: int) -> None:
        """Have so many processes of it on each worker that has it loaded."""

    async def await_replicas(self, key: ModelName) -> int:
        """How many processes it has, once none is being started. Raises ControlError."""

    async def unload_registered(self, key: ModelName) -> None:
        """Unload it everywhere, unless it is pinned: its memory is free then. Raises ControlError."""

    async def observe_registered(self, key: ModelName) -> Sequence[tuple[int, ModelState]]:
        """What each worker has of it."""

    async def announce_registrations(self, models: dict[str, RegisteredModel | None]) -> None:
        """Have all fronts follow this from now on."""


class RegistrationService:
    """See the module. `store`: the store's location. Changes reach fronts one after another; no load holds one up."""

    def __init__(self, store: str, fleet: RegisteredFleet) -> None:
        self._store, self._fleet = store, fleet
        self.table = RegistrationTable()
        self.is_used = False  #: whether anything was registered since the start
        self._replicas: dict[ModelName, int] = {}  # of the archives with more than one process, as workers were told
        self._changing = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        """For example `<RegistrationService of <RegistrationTable 12 names>>`."""
        return f"<RegistrationService of {self.table!r}>"

    async def register(self, asked: RegisterRequest, *, wait: bool, at_start: bool = False) -> Registration:
        """Register a version, and load it where it is to have workers. `wait`: until it is loaded.

        `at_start`: the settings ask for it, and no client.

        INVARIANT: what could not be loaded is not registered, if `wait` is False from the time that this is known.
        """
        key = find_key(asked.url, self._store)
        facts = await self._read(key, asked.url)
        name = _check_name(asked.name or facts.name or name_archive(key))
        version = asked.version or facts.version or DEFAULT_VERSION
        _check_handler(asked.handler, facts)
        _check_workers(asked.options.min_workers, asked.options.max_workers)
        loads = asked.options.min_workers > 0
        registration = Registration(
            name,
            version,
            asked.url,
            key,
            facts.handler,
            asked.runtime or facts.runtime or "python",
            asked.options,
            loaded_at=time.time() if loads else 0.0,
            has_code=facts.kind == Kind.CODE,
            is_loading=loads,
            at_start=at_start,
        )
        self.table.require_free(registration)
        if asked.options.says_batching:
            await self._fleet.set_batching(key, asked.options.batching)
            await self._fleet.unload_registered(key)  # it is batched so from its next load on
        if loads and wait:
            await self._load(registration)
            registration = msgspec.structs.replace(registration, is_loading=False)
        async with self._changing:
            self.table.add(registration)
            self.is_used = True
            await self._announce(name)
        await self._follow_replicas(registration, wait=wait)
        log.info("registered", name=name, version=version, model=key, workers=asked.options.min_workers)
        if loads and not wait:
            self._start(self._load_later(registration, None))
        return registration

    async def scale(self, asked: ScaleRequest, *, wait: bool) -> Registration:
        """Give a version workers, or take them. `wait`: until it is loaded, or its memory is free."""
        _check_workers(asked.min_workers, asked.max_workers)
        before = self.table.find(asked.name, asked.version)
        loads = asked.min_workers > 0
        after = with_workers(before, asked.min_workers, asked.max_workers, time.time(), is_loading=loads and not wait)
        if loads and wait:
            await self._load(after)
        async with self._changing:
            self.table.put(after)
            await self._announce(asked.name)
        await self._follow_replicas(after, wait=wait and loads)
        if not loads:
            await self._unload(after)
        log.info("scaled", name=after.name, version=after.version, workers=asked.min_workers)
        if loads and not wait:
            self._start(self._load_later(after, before))
        return after

    async def set_default(self, name: str, version: str) -> None:
        """Make this version the one that answers where none is named."""
        async with self._changing:
            self.table.set_default(name, version)
            await self._announce(name)
        log.info("default_version_set", name=name, version=version)

    async def unregister(self, name: str, version: str | None = None) -> Registration:
        """Remove a version, or the only one; its memory is free when this returns."""
        async with self._changing:
            removed = self.table.remove(name, version)
            await self._announce(name)
        await self._follow_replicas(removed, wait=False)
        changes_batches = removed.options.says_batching
        if changes_batches:
            await self._fleet.set_batching(removed.key, self.table.find_batching(removed.key))
        await self._unload(removed, even_if_shared=changes_batches)
        log.info("unregistered", name=name, version=removed.version)
        return removed

    async def observe(self, registration: Registration) -> Sequence[tuple[int, ModelState]]:
        """What each worker has of a version, by the worker's index."""
        return await self._fleet.observe_registered(registration.key)

    async def describe_by_code(self, registration: Registration, headers: list[tuple[str, str]]) -> bytes:
        """What the code of a version says of itself, asked with these headers. Raises ControlError."""
        return await self._fleet.describe_by_code(registration.key, headers)

    async def close(self) -> None:
        """Give up loads that nobody waits for."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _read(self, key: ModelName, url: str) -> ArchiveFacts:
        try:
            return await self._fleet.read_archive(key)
        except ControlError as error:
            if error.situation == Situation.NOT_FOUND:
                raise NotInStore(url, f"Model not found at: {url}") from error
            raise ArchiveUnreadable(str(error), error.situation) from error

    async def _load(self, registration: Registration) -> None:
        try:
            await self._fleet.load_registered(registration.key)
        except ControlError as error:
            raise NotLoaded(str(error), error.situation) from error

    async def _load_later(self, registration: Registration, before: Registration | None) -> None:
        """Load what nobody waits for. Where that fails, `before` holds again; None: the version is removed."""
        failure = None
        try:
            await self._load(registration)
        except NotLoaded as error:
            failure = error
        async with self._changing:
            try:
                if self.table.find(registration.name, registration.version) != registration:
                    return  # it was changed meanwhile
            except RegistrationRefused:
                return
            if failure is None:
                self.table.put(msgspec.structs.replace(registration, is_loading=False))
                return
            log.error("registered_not_loaded", name=registration.name, version=registration.version, why=str(failure))
            if before is None:
                self.table.discard(registration)
            else:
                self.table.put(before)
            await self._announce(registration.name)
        await self._follow_replicas(registration, wait=False)

    async def _follow_replicas(self, registration: Registration, *, wait: bool) -> None:
        """Have as many processes of the archive as the table says. `wait`: until they are there, or have no room."""
        key, count = registration.key, self.table.find_replicas(registration.key)
        if count == self._replicas.get(key, 1):
            return
        if count > 1:
            self._replicas[key] = count
        else:
            del self._replicas[key]
        await self._fleet.set_replicas(key, count)
        if not wait:
            return
        try:
            there = await self._fleet.await_replicas(key)
        except ControlError as error:
            log.warning("replicas_unknown", model=key, wanted=count, why=str(error))
            return
        if there < count:
            log.warning("fewer_replicas", model=key, wanted=count, replicas=there)

    async def _unload(self, registration: Registration, *, even_if_shared: bool = False) -> None:
        """Free the memory, unless the same archive serves under another name or version. Its next load starts anew.

        `even_if_shared`: those other names would go on with what this one has said of it, such as its batches.
        """
        if self.table.shares_key(registration) and not even_if_shared:
            return
        try:
            await self._fleet.unload_registered(registration.key)
        except ControlError as error:
            log.warning("not_unloaded", name=registration.name, model=registration.key, why=str(error))

    async def _announce(self, name: str) -> None:
        await self._fleet.announce_registrations({name: self.table.describe_for_fronts(name)})

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _check_name(name: str) -> str:
    """The name, which may have slashes as an archive's. Raises BadOption."""
    try:
        return parse_model_name(name)
    except InvalidModelName as error:
        raise BadOption(str(error)) from error


def _check_handler(wanted: str, facts: ArchiveFacts) -> None:
    """Raises BadOption where a client asks for another handler than the archive's own, which alone is called."""
    if wanted and wanted.removesuffix(".py") != facts.handler.removesuffix(".py"):
        own = f"its manifest names {shorten_name(facts.handler)}" if facts.handler else "it has none"
        raise BadOption(f"Parameter handler: the archive is run by its own handler ({own}); pack it with the other one")


def _check_workers(least: int, most: int) -> None:
    """Raises BadOption, as TorchServe says it."""
    if most < least:
        raise BadOption("max_worker cannot be less than min_worker.")
    if not 0 <= least <= MAX_WORKERS or most > MAX_WORKERS:
        raise BadOption(f"a version has 0 to {MAX_WORKERS} workers")
