"""What the workers serve, for the watch of the store. Runs on the supervisor's event loop."""

import contextlib

from model_store.names import ModelName, split_version
from server.ipc.control import ControlError
from server.ipc.operations import ListVersions, ReloadModel
from server.supervisor.workers import LIST_S, Workers

VERSIONS_PAGE = 500  #: models of one worker whose versions are asked for at a time


class ResidentVersions:
    """See `watch.Fleet`."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._unlisted = 0  # workers that the last list lacks

    def __repr__(self) -> str:
        """For example `<ResidentVersions of <Workers 3 of 3 up>>`."""
        return f"<ResidentVersions of {self._workers!r}>"

    async def list_versions(self) -> dict[ModelName, dict[int, str]]:
        """The version that each worker serves, by model; nothing of workers that do not answer."""
        found: dict[ModelName, dict[int, str]] = {}
        self._unlisted = len(self._workers)
        for worker in self._workers:
            after = ""
            with contextlib.suppress(ControlError):
                while worker.ready.is_set() and not worker.is_silent:
                    page = await self._workers.ask(worker, ListVersions(after, VERSIONS_PAGE), LIST_S)
                    if not page:
                        self._unlisted -= 1
                        break
                    for model, version in page.items():
                        name, held = split_version(ModelName(model))
                        if not held:  # else it follows nothing
                            found.setdefault(name, {})[worker.index] = version
                    after = max(page)
        return found

    def has_listed_all(self) -> bool:
        """Whether the last `list_versions` has what all workers serve."""
        return self._unlisted == 0

    async def reload_at(self, worker: int, model: ModelName) -> str:
        """Have a holder ask the store. The version that serves then. Raises ControlError."""
        return await self._workers.ask(self._workers[worker], ReloadModel(model))
