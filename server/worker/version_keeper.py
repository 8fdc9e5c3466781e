"""Notes the versions that this worker serves, so that the disk tier keeps them. On a thread of its own.

Each note is a file, which a load must not wait for and a burst of loads has no processor time for: so where several
wait, they do so until no model has been loaded for a moment. A few are written at once, for a rollback may follow a
deployment within a moment. A worker that ends before loses them, and with them a rollback to a version
that had just begun to serve.
"""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import structlog

from model_store.names import ModelName, split_version
from model_store.stores.model_store import ModelStore
from server.worker.host_cache import TIER
from server.worker.model_loader import LoadedModel
from server.worker.thread_priority import yield_to_others

MOST_WAITING = 8192  #: versions that wait for the disk; beyond it none is noted
FEW = 4  #: versions that are no burst
HURRY_FROM = MOST_WAITING // 2  #: so many are noted at once
LULL_S = 0.25  #: seconds without a load after which notes are written
LONGEST_S = 5.0  #: for which a note waits at most

log = structlog.get_logger()


class VersionKeeper:
    """See the module. `note` runs on the step thread."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="versions", initializer=yield_to_others)
        self._waiting = deque[tuple[ModelName, str]]()  # models and their versions
        self._noted_at = 0.0
        self._hurry = Event()
        self._is_begun = False  # whether the thread will come by what is noted now

    def __repr__(self) -> str:
        """For example `<VersionKeeper 2 waiting>`."""
        return f"<VersionKeeper {len(self._waiting)} waiting>"

    def note(self, built: LoadedModel) -> None:
        """The model was built and proved, and serves now. What came from host memory was noted before."""
        if built.tier == TIER or len(self._waiting) >= MOST_WAITING:
            return
        self._waiting.append((built.model, built.version))
        self._noted_at = time.monotonic()
        if len(self._waiting) >= HURRY_FROM:
            self._hurry.set()
        if not self._is_begun:
            self._is_begun = True
            self._thread.submit(self._keep_all)

    def _keep_all(self) -> None:
        """Keep all that waits, of a burst after a lull. INVARIANT: what is noted from then on begins another round."""
        latest = time.monotonic() + LONGEST_S
        while len(self._waiting) > FEW and (until := min(self._noted_at + LULL_S, latest)) > (now := time.monotonic()):
            if self._hurry.wait(until - now):
                break
        self._hurry.clear()
        self._is_begun = False
        while self._waiting:
            self._keep(*self._waiting.popleft())

    def _keep(self, model: ModelName, version: str) -> None:
        name, asked = split_version(model)
        try:
            self._store.keep_version(name, version, newest=not asked)
        except Exception as error:  # a disk that fails costs a rollback, not the model
            log.warning("version_not_kept", model=name, version=version, error=repr(error))
