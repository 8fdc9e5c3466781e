"""What operators ask of the whole fleet: load, unload, pin, reload, list. The workers that it concerns are asked.

Runs on the supervisor's event loop; `server.supervisor.management_api` calls it.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
import structlog

from model_store.names import ModelName
from server.ipc.control import ControlError
from server.ipc.operations import (
    KnownModel,
    ListModels,
    LoadModel,
    ModelUsage,
    PinModel,
    ReloadModel,
    SetQuarantine,
    UnloadModel,
    UnpinModel,
)
from server.supervisor.children import Child
from server.supervisor.pins import PinnedModels
from server.supervisor.quarantine import ServerQuarantine
from server.supervisor.releases.service import ReleaseService
from server.supervisor.store_watch.watch import StoreWatch
from server.supervisor.workers import LIST_S, Workers

log = structlog.get_logger()

#: What clients are told of a model that a worker holds in this state; the first that is found counts.
_SHOWN_STATES = {"ready": "ready", "loading": "loading", "retiring": "unloading"}


class ModelPage(NamedTuple):
    """Rows by model, whether more follow, and the workers that did not answer: what they hold is not in the rows."""

    rows: list[dict[str, Any]]
    more: bool
    unheard: list[int]


class FleetOperations:
    """See the module."""

    def __init__(
        self,
        workers: Workers,
        pins: PinnedModels,
        releases: ReleaseService,
        quarantine: ServerQuarantine,
        watch: StoreWatch,
    ) -> None:
        self._workers, self._pins, self._releases = workers, pins, releases
        self._quarantine, self._watch = quarantine, watch

    def __repr__(self) -> str:
        """For example `<FleetOperations on <Workers 3 of 3 up>>`."""
        return f"<FleetOperations on {self._workers!r}>"

    async def load(self, model: ModelName) -> dict[str, Any]:
        """Load the model, or what its name stands for, at home. Raises ControlError with the load's situation."""
        wanted = (self._releases.list_held(model) or [model])[0]
        return {"model": model, "version": await self._workers.ask(self._workers.home(wanted), LoadModel(wanted))}

    async def unload(self, model: ModelName) -> dict[str, Any]:
        """Unload the model everywhere; returns when its memory is free.

        A pinned model stays pinned: its next load is not evicted.
        """
        unloaded_from, silent = set[int](), set[int]()
        for held in (model, *self._releases.list_held(model)):
            gone, unheard = await self._workers.ask_all(UnloadModel(held))
            unloaded_from.update(index for index, was_there in gone if was_there)
            silent.update(unheard)
        return {"model": model, "unloaded_from": sorted(unloaded_from), **_name_unheard(sorted(silent))}

    async def pin(self, model: ModelName) -> dict[str, Any]:
        """Load the model at home and keep it there, also after the worker's death.

        Raises ControlError with the load's situation, or where too many are pinned.
        """
        self._pins.require_room(model)
        version = ""
        for wanted in (model, *self._releases.list_held(model)):
            version = await self._workers.ask(self._workers.home(wanted), PinModel(wanted))
        self._pins.add(model)
        return {"model": model, "version": version, "pinned": True}

    async def unpin(self, model: ModelName) -> dict[str, Any]:
        """Let every worker evict the model again."""
        self._pins.discard(model)
        _, unheard = await self._workers.ask_all(UnpinModel(model))
        for held in self._releases.list_held(model):
            if held not in self._pins:
                await self._workers.ask_all(UnpinModel(held), LIST_S)
        return {"model": model, "pinned": False, **_name_unheard(unheard)}

    async def replay_pins(self, worker: Child) -> None:
        """Pins survive a worker's death: the home of a pinned model loads it again."""
        held = [key for model in self._pins for key in self._releases.list_held(model)]
        for model in sorted([*self._pins, *held]):
            if self._workers.home(model) is worker:
                try:
                    await self._workers.ask(worker, PinModel(model))
                except ControlError as error:
                    log.error("pin_failed", model=model, worker=worker.index, error=str(error))  # noqa: TRY400

    async def release(self, model: ModelName) -> dict[str, Any]:
        """Let a model that is in quarantine run again."""
        released = self._quarantine.release(model)
        self._watch.release(model)
        _, unheard = await self._workers.ask_all(SetQuarantine(self._quarantine.reasons))
        return {"model": model, "released": released, **_name_unheard(unheard)}

    async def reload(self, model: ModelName) -> dict[str, Any]:
        """Every holder (without one, the home) asks the store, loads a changed archive beside the old one and swaps."""
        listed, unheard = await self._workers.ask_all(ListModels(prefix=model, after="", limit=1), LIST_S)
        holders = [self._workers[index] for index, states in listed if any(state.model == model for state in states)]
        answers = await asyncio.gather(
            *(self._workers.ask(worker, ReloadModel(model)) for worker in holders or [self._workers.home(model)])
        )
        return {"model": model, "version": answers[0], "holders": len(answers), **_name_unheard(unheard)}

    async def list_known(self, prefix: str, after: str, limit: int) -> list[KnownModel]:
        """As `list_models`, as clients see them: without names for which the store has no archive."""
        page = await self.list_models(prefix, after, limit)
        return [make_known(row) for row in page.rows if not is_missing(row)]

    def tell_changed(self, models: Iterable[ModelName]) -> None:
        """The store says that these archives have changed: their holders reload them. Raises TooManyEvents."""
        self._watch.tell(models)

    async def list_models(self, prefix: str = "", after: str = "", limit: int = 1, *, whole: bool = False) -> ModelPage:
        """Models resident, loading, failed, pinned or in quarantine, with their holders.

        The first `limit` by name, of those that have this prefix and come after a name; `whole`: with all that a
        request must know.
        """
        merged: dict[str, dict[str, Any]] = {}

        def entry(model: str) -> dict[str, Any]:
            return merged.setdefault(model, {"model": model, "pinned": model in self._pins, "holders": []})

        answers, unheard = await self._workers.ask_all(ListModels(prefix, after, limit + 1, whole), LIST_S)
        for index, states in answers:
            for row in map(msgspec.to_builtins, states):
                entry(row.pop("model"))["holders"].append({"worker": index, **row})
        for model in self._pins:
            if model > after and model.startswith(prefix):
                entry(model)
        for model, reason in self._quarantine.reasons.items():
            if model > after and model.startswith(prefix):
                entry(model).update({"state": "quarantined", "reason": reason})
        return ModelPage([merged[model] for model in sorted(merged)[:limit]], len(merged) > limit, unheard)


def is_missing(row: dict[str, Any]) -> bool:
    """Whether the row tells only of loads that found no archive."""
    holders = row["holders"]
    return bool(holders) and all(holder.get("reason") == "not_found" for holder in holders)


def make_known(row: dict[str, Any]) -> KnownModel:
    """A model's row as clients see it: ready where one holder is, with what all of them counted."""
    holders = row["holders"]
    states = {holder["state"] for holder in holders}
    state = next((shown for held, shown in _SHOWN_STATES.items() if held in states), "unavailable")
    reason = row.get("reason") or next((holder["error"] for holder in holders if "error" in holder), "")
    if row.get("state") == "quarantined":
        state = "unavailable"
    usages = [holder["usage"] for holder in holders if "usage" in holder]
    counted = {name: sum(usage[name] for usage in usages) for name in ModelUsage.__struct_fields__}
    counted["last_ms"] = max((usage["last_ms"] for usage in usages), default=0)
    return KnownModel(row["model"], state, "" if state == "ready" else reason, ModelUsage(**counted))


def _name_unheard(workers: list[int]) -> dict[str, list[int]]:
    """What an answer says of workers that did not answer in time; nothing where all did."""
    return {"unheard_workers": workers} if workers else {}
