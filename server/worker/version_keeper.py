"""Notes the versions that this worker serves, so that the disk tier keeps them. On a thread of its own."""

from concurrent.futures import ThreadPoolExecutor

import structlog

from model_store.names import ModelName, split_version
from model_store.stores.model_store import ModelStore
from server.worker.host_cache import TIER
from server.worker.model_loader import LoadedModel

MOST_WAITING = 1024  #: versions that wait for the disk; beyond it none is noted

log = structlog.get_logger()


class VersionKeeper:
    """See the module. `note` runs on the step thread."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="versions")
        self._noted = self._kept = 0  # each is written by one thread

    def __repr__(self) -> str:
        """For example `<VersionKeeper 2 waiting>`."""
        return f"<VersionKeeper {self._noted - self._kept} waiting>"

    def note(self, built: LoadedModel) -> None:
        """The model was built and proved, and serves now. What came from host memory was noted before."""
        if built.tier != TIER and self._noted - self._kept < MOST_WAITING:
            self._noted += 1
            self._thread.submit(self._keep, built.model, built.version)

    def _keep(self, model: ModelName, version: str) -> None:
        name, asked = split_version(model)
        try:
            self._store.keep_version(name, version, newest=not asked)
        except Exception as error:  # a disk that fails costs a rollback, not the model
            log.warning("version_not_kept", model=name, version=version, error=repr(error))
        finally:
            self._kept += 1
