"""Carries out rollbacks and aliases: proves the version, holds it on disk, writes the table, and tells the fronts.

Runs on the supervisor's event loop; what touches disk or store runs on a thread.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import msgspec
import structlog

from model_store.errors import LoadError
from model_store.names import ModelName, at_version, split_version
from model_store.stores.disk_cache import DiskTier
from model_store.stores.kept_versions import KeptVersion
from model_store.stores.object_store import InvalidStoreUrl
from server.errors import Situation
from server.ipc.control import ControlError
from server.ipc.operations import ReleaseArm
from server.settings import Settings
from server.store_access import open_settings_store
from server.supervisor.releases.table import AliasRequest, BadRelease, ReleaseFile, ReleaseTable, choose_previous

log = structlog.get_logger()


class ReleasedFleet(Protocol):
    """What the service has of the supervisor."""

    async def serving_versions(self, model: ModelName) -> set[str]:
        """The versions that workers serve now."""

    async def prove_release(self, model: ModelName, key: ModelName) -> None:
        """Load the model, or one of its versions, at its home, and keep it there where the model is pinned.

        Raises ControlError.
        """

    async def drop_release(self, key: ModelName) -> None:
        """The version may be evicted."""

    async def announce_releases(self, routes: dict[str, list[ReleaseArm]]) -> list[int]:
        """Have all fronts follow this table from now on. Those that have not said so in time."""


class ReleaseService:
    """See the module. Changes are made one after another. INVARIANT: what fronts follow is on the disk."""

    def __init__(self, settings: Settings, fleet: ReleasedFleet) -> None:
        self._settings, self._fleet = settings, fleet
        self._file = ReleaseFile(settings)
        self.table = ReleaseTable("")
        self._changing = asyncio.Lock()
        self._open_disk = cache(self._find_disk)

    def __repr__(self) -> str:
        """For example `<ReleaseService of 3 names>`."""
        return f"<ReleaseService of {len(self.table.names)} names>"

    def open(self) -> None:
        """Read the table. Raises TableUnreadable."""
        self.table = self._file.read()

    # --- what operators ask -----------------------------------------------------------------------------------------

    async def rollback(self, model: ModelName, version: str = "") -> dict[str, Any]:
        """Hold the model at a version, by default at the one that served before the present one.

        Raises ControlError, and then nothing is changed. So do the others.
        """
        async with self._changing:
            held = self.table.held_version(model)
            serving = {held} if held else await self._fleet.serving_versions(model)
            present = serving or await self._find_newest(model)
            chosen = version or choose_previous(await self._list_kept(model), present)
            if chosen is None:
                message = f"no version of {model} is kept from before {', '.join(sorted(present)) or 'now'}"
                raise ControlError(f"{message}; GET /fleet/versions/{model} lists those that are", Situation.NOT_FOUND)
            unheard = await self._change(_decide(lambda: self.table.hold(model, chosen)))
            log.warning("rolled_back", model=model, version=chosen, served=sorted(serving))
            return {"model": model, "version": chosen, "served": sorted(serving), **unheard}

    async def follow(self, model: ModelName) -> dict[str, Any]:
        """Let a model that is rolled back follow the store again, unless its newest version cannot be loaded."""
        async with self._changing:
            held, unheard = self.table.held_version(model), dict[str, Any]()
            if held:
                unheard = await self._change(self.table.remove(model), also=[model])
                log.warning("follows_again", model=model, held=held)
            return {"model": model, "held": held or None, **unheard}

    async def set_alias(self, alias: ModelName, request: AliasRequest) -> dict[str, Any]:
        """Let the alias stand for what is asked."""
        async with self._changing:
            arms = request.make_arms()
            unheard = await self._change(_decide(lambda: self.table.set_alias(alias, arms)))
            log.warning("alias_set", alias=alias, arms=msgspec.to_builtins(arms))
            return {"alias": alias, "arms": msgspec.to_builtins(arms), **unheard}

    async def remove_alias(self, alias: ModelName) -> dict[str, Any]:
        """Let the alias stand for nothing."""
        async with self._changing:
            removed, unheard = self.table.is_alias(alias), dict[str, Any]()
            if removed:
                unheard = await self._change(self.table.remove(alias))
                log.warning("alias_removed", alias=alias)
            return {"alias": alias, "removed": removed, **unheard}

    def describe(self) -> Mapping[str, object]:
        """The whole table."""
        return self.table.describe()

    async def list_versions(self, model: ModelName) -> dict[str, Any]:
        """The versions of the model that this host keeps, the one that served last first."""
        kept = await self._list_kept(model)
        rows = [{"version": k.version, "bytes": k.bytes, "served_at": k.served_at, "held": k.held} for k in kept]
        return {"model": model, "held": self.table.held_version(model) or None, "versions": rows}

    def list_held(self, model: str) -> list[ModelName]:
        """What the model's own name stands for where it is rolled back."""
        name = ModelName(model)
        held = self.table.held_version(name)
        return [at_version(name, held)] if held else []

    # --- changes ----------------------------------------------------------------------------------------------------

    async def _change(self, table: ReleaseTable, also: Sequence[ModelName] = ()) -> dict[str, Any]:
        """From now on `table` holds. First what names will stand for, and `also` these, are loaded and proved, so that
        no request waits for them, or in vain. Returns what an answer says of fronts that do not follow it yet.
        """
        before, after = self.table.held_versions(), table.held_versions()
        added = {model: versions - before.get(model, set()) for model, versions in after.items()}
        if any(added.values()) and not self._settings.disk_cache_bytes:
            message = "versions are kept by the disk cache, which is off (disk_cache_bytes is 0)"
            raise ControlError(message, Situation.BAD_REQUEST)
        for key in sorted({*table.list_keys(), *also} - self.table.list_keys()):
            await self._fleet.prove_release(split_version(key)[0], key)
        touched = [model for model, versions in added.items() if versions]
        try:
            for model in touched:
                await asyncio.to_thread(self._hold, model, before.get(model, set()) | after[model], added[model])
            await asyncio.to_thread(self._file.write, table)
        except (OSError, ControlError) as error:
            for model in touched:
                await self._let_go(model, added[model], before.get(model, set()))
            if isinstance(error, ControlError):
                raise
            message = f"the table of releases cannot be written ({error.strerror or error}); nothing is changed"
            raise ControlError(f"{message}: disk_cache must be writable", Situation.INTERNAL) from error
        self.table = table
        unheard = await self._fleet.announce_releases(table.make_routes())
        for model, versions in before.items():
            left = after.get(model, set())
            if versions - left:
                await self._let_go(model, versions - left, left)
        return {"unheard_fronts": unheard} if unheard else {}

    async def _let_go(self, model: ModelName, gone: set[str], held: set[str]) -> None:
        """Versions that no entry names any more: they may be evicted and forgotten."""
        for version in gone:
            await self._fleet.drop_release(at_version(model, version))
        try:
            await asyncio.to_thread(self._hold, model, held, set())
        except OSError as error:  # they are kept a while longer
            log.warning("versions_not_let_go", model=model, error=str(error))

    def _hold(self, model: ModelName, versions: set[str], added: set[str]) -> None:
        """Runs on a thread. Raises OSError, and ControlError where one that is added is not on disk any more."""
        disk = self._open_disk()
        for version in added:
            disk.keep_version(model, version, time.time(), newest=False)
        lost = added - disk.hold_versions(model, versions)
        if lost:
            message = f"version {', '.join(sorted(lost))} of {model} was replaced before it could be kept on disk"
            raise ControlError(f"{message}; nothing is changed", Situation.NOT_FOUND)

    async def let_go_leftovers(self) -> None:
        """Let go what no entry names: a host that failed between the hold and the table has left it."""
        any_source = DiskTier(self._settings.disk_cache, self._settings.store)
        if not self._settings.disk_cache_bytes or not await asyncio.to_thread(any_source.has_held):
            return  # and the store is not opened, which takes a while
        async with self._changing:
            held = self.table.held_versions()
            try:
                for model in await asyncio.to_thread(lambda: self._open_disk().list_held()):
                    await asyncio.to_thread(self._hold, model, held.get(model, set()), set())
            except (OSError, ControlError) as error:  # they are kept a while longer
                log.warning("versions_not_let_go", error=str(error))

    async def _find_newest(self, model: ModelName) -> set[str]:
        """The version that a worker would load now, where nobody has the model; none where the last one proved bad."""
        if not self._settings.disk_cache_bytes:
            return set()
        newest = await asyncio.to_thread(lambda: self._open_disk().lookup(model))
        return {newest.version} if newest else set()

    async def _list_kept(self, model: ModelName) -> Sequence[KeptVersion]:
        if not self._settings.disk_cache_bytes:
            return ()
        return await asyncio.to_thread(lambda: self._open_disk().list_versions(model))

    def _find_disk(self) -> DiskTier:
        """The disk tier under the store's own name, as workers have it. Raises ControlError."""
        try:
            return DiskTier(self._settings.disk_cache, open_settings_store(self._settings).url)
        except (LoadError, InvalidStoreUrl) as error:
            raise ControlError(str(error), Situation.STORE_FAILED) from error


def _decide(change: Callable[[], ReleaseTable]) -> ReleaseTable:
    """The changed table. Raises ControlError for what cannot be."""
    try:
        return change()
    except BadRelease as error:
        raise ControlError(str(error), Situation.BAD_REQUEST) from error
