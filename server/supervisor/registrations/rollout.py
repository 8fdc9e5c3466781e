"""How registrations come to workers and fronts. Runs on the supervisor's event loop."""

import asyncio
from collections.abc import Sequence

from model_store.names import ModelName
from server.ipc.control import ControlError
from server.ipc.operations import (
    ArchiveFacts,
    AwaitReplicas,
    Batching,
    DescribeByCode,
    ListModels,
    LoadModel,
    ModelState,
    ReadArchive,
    RegisteredModel,
    SetBatching,
    SetRegistrations,
    SetReplicas,
    UnloadModel,
)
from server.supervisor.children import Child
from server.supervisor.pins import PinnedModels
from server.supervisor.workers import LIST_S, Workers


class RegistrationRollout:
    """See `service.RegisteredFleet`."""

    def __init__(self, workers: Workers, fronts: Sequence[Child], pins: PinnedModels) -> None:
        self._workers, self._fronts, self._pins = workers, fronts, pins

    def __repr__(self) -> str:
        """For example `<RegistrationRollout to <Workers 3 of 3 up>, 1 fronts>`."""
        return f"<RegistrationRollout to {self._workers!r}, {len(self._fronts)} fronts>"

    async def read_archive(self, key: ModelName) -> ArchiveFacts:
        """What the archive says of itself. Raises ControlError."""
        return await self._workers.ask(self._workers.home(key), ReadArchive(key))

    async def load_registered(self, key: ModelName) -> None:
        """Load it at its home. Raises ControlError."""
        await self._workers.ask(self._workers.home(key), LoadModel(key))

    async def describe_by_code(self, key: ModelName, headers: list[tuple[str, str]]) -> bytes:
        """What its code says of itself. Raises ControlError."""
        return await self._workers.ask(self._workers.home(key), DescribeByCode(key, headers))

    async def set_batching(self, key: ModelName, batching: Batching | None) -> None:
        """Have it batched so from its next load on; None: as it says itself."""
        self._workers.tell(SetBatching({key: batching}, whole=False))

    async def set_replicas(self, key: ModelName, count: int) -> None:
        """Have so many processes of it on each worker that has it loaded."""
        self._workers.tell(SetReplicas({key: count}, whole=False))

    async def await_replicas(self, key: ModelName) -> int:
        """How many processes its home has, once none is being started. Raises ControlError."""
        return await self._workers.ask(self._workers.home(key), AwaitReplicas(key))

    async def unload_registered(self, key: ModelName) -> None:
        """Unload it everywhere, unless it is pinned: its memory is free then. Raises ControlError."""
        if key not in self._pins:
            await self._workers.ask_all(UnloadModel(key))

    async def observe_registered(self, key: ModelName) -> Sequence[tuple[int, ModelState]]:
        """What each worker that answers in time has of it."""
        listed, _ = await self._workers.ask_all(ListModels(prefix=key, after="", limit=1), LIST_S)
        return [(index, state) for index, states in listed for state in states if state.model == key]

    async def announce_registrations(self, models: dict[str, RegisteredModel | None]) -> None:
        """Have all fronts follow this. One that is slow gets it as soon as its loop turns, in the order of changes."""
        ready = [front for front in self._fronts if front.ready.is_set()]
        await asyncio.gather(*(_tell_front(front, models) for front in ready))


async def _tell_front(front: Child, models: dict[str, RegisteredModel | None]) -> None:
    try:
        await front.ask(SetRegistrations(models, whole=False), LIST_S)
    except ControlError:
        return  # it gets all of them when it is back, or has this one in its queue
