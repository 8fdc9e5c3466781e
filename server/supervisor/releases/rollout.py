"""How a table of releases comes to workers and fronts: workers load what it names, fronts follow it.

Runs on the supervisor's event loop.
"""

import asyncio
from collections.abc import Sequence

from model_store.names import ModelName
from server.errors import Situation
from server.ipc.control import ControlError
from server.ipc.operations import ListModels, LoadModel, PinModel, ReleaseArm, SetReleases, UnpinModel
from server.supervisor.children import Child
from server.supervisor.pins import PinnedModels
from server.supervisor.workers import LIST_S, Workers


class ReleaseRollout:
    """See `service.ReleasedFleet`."""

    def __init__(self, workers: Workers, fronts: Sequence[Child], pins: PinnedModels) -> None:
        self._workers, self._fronts, self._pins = workers, fronts, pins

    def __repr__(self) -> str:
        """For example `<ReleaseRollout to <Workers 3 of 3 up>, 1 fronts>`."""
        return f"<ReleaseRollout to {self._workers!r}, {len(self._fronts)} fronts>"

    async def serving_versions(self, model: ModelName) -> set[str]:
        """The versions that workers serve now."""
        listed, _ = await self._workers.ask_all(ListModels(prefix=model, after="", limit=1), LIST_S)
        rows = [state for _, states in listed for state in states if state.model == model and state.state == "ready"]
        return {row.version for row in rows if isinstance(row.version, str)}

    async def prove_release(self, model: ModelName, key: ModelName) -> None:
        """Load the model, or one of its versions, at its home, and keep it there where the model is pinned.

        Raises ControlError.
        """
        operation = PinModel(key) if model in self._pins else LoadModel(key)
        await self._workers.ask(self._workers.home(key), operation)

    async def drop_release(self, key: ModelName) -> None:
        """The version may be evicted, unless an operator has pinned it as well."""
        if key not in self._pins:
            await self._workers.ask_all(UnpinModel(key), LIST_S)

    async def announce_releases(self, routes: dict[str, list[ReleaseArm]]) -> list[int]:
        """Have all fronts follow this table from now on. Those that have not said so in time.

        One that is starting gets it then, and one that is slow as soon as its loop turns.
        """
        ready = [front for front in self._fronts if front.ready.is_set()]
        answers = await asyncio.gather(*(_tell_front(front, routes) for front in ready))
        return [front.index for front, heard in zip(ready, answers, strict=True) if not heard]


async def _tell_front(front: Child, routes: dict[str, list[ReleaseArm]]) -> bool:
    """Whether the front follows the table, or gets it when it is back."""
    try:
        await front.ask(SetReleases(routes), LIST_S)
    except ControlError as error:
        return error.situation != Situation.DEADLINE
    return True
