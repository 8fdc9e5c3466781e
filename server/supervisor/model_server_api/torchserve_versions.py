"""How TorchServe's management API describes a version of a model and its workers. Pure."""

import datetime as dt
from collections.abc import Sequence
from typing import Any

from msgspec import UnsetType
from msgspec.structs import replace

from server.ipc.operations import ModelState
from server.supervisor.registrations.table import Registration

FIRST_WORKER_ID = 9000  #: TorchServe numbers its workers by their ports
MOST_WORKERS = 1000  #: between the numbers of two replicas on one worker

#: What TorchServe says of features that this server does not have.
_UNUSED = {
    "maxRetryTimeoutInSec": 300,
    "clientTimeoutInMills": 0,
    "parallelType": "",
    "parallelLevel": 0,
    "deviceType": "cpu",
    "continuousBatching": False,
    "useJobTicket": False,
    "useVenv": False,
    "stateful": False,
    "sequenceMaxIdleMSec": 0,
    "sequenceTimeoutMSec": 0,
    "maxNumSequence": 0,
    "maxSequenceJobQueueSize": 0,
}


def describe_version(
    registration: Registration, observed: Sequence[tuple[int, ModelState]], queue: int
) -> dict[str, Any]:
    """A version, with what the workers have of it. `queue`: requests that may wait for it."""
    options = registration.options
    return {
        "modelName": registration.name,
        "modelVersion": registration.version,
        "modelUrl": registration.url,
        "runtime": registration.runtime,
        "minWorkers": options.min_workers,
        "maxWorkers": options.max_workers,
        "batchSize": options.batch_size,
        "maxBatchDelay": options.max_batch_delay_ms,
        "responseTimeout": int(options.response_timeout_s),
        "startupTimeout": int(options.startup_timeout_s),
        **_UNUSED,
        "loadedAtStartup": registration.at_start,
        "workers": [
            _describe_worker(registration, index + MOST_WORKERS * replica, state)
            for index, whole in observed or _list_absent(registration)
            for replica, state in enumerate(list_processes(whole))
        ],
        "jobQueueStatus": {"remainingCapacity": queue, "pendingRequests": 0},
    }


def list_processes(state: ModelState) -> Sequence[ModelState]:
    """What a worker has of a version, one for each process of a code archive that has several."""
    if isinstance(state.processes, UnsetType):
        return [state]
    return [replace(state, pid=each.pid, bytes=each.bytes) for each in state.processes]


def _list_absent(registration: Registration) -> Sequence[tuple[int, ModelState]]:
    """What is said of a version whose archive no worker holds now: it is loaded by the next request."""
    return [(0, ModelState(registration.key))] if registration.options.min_workers else []


def _describe_worker(registration: Registration, index: int, state: ModelState) -> dict[str, Any]:
    """As TorchServe describes a process. One whose model is loading, or evicted, is `UNLOADING` there too."""
    started = dt.datetime.fromtimestamp(registration.loaded_at, tz=dt.UTC)
    return {
        "id": str(FIRST_WORKER_ID + index),
        "startTime": started.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "status": "READY" if state.state == "ready" and not registration.is_loading else "UNLOADING",
        "memoryUsage": state.bytes if isinstance(state.bytes, int) else 0,
        "pid": state.pid if isinstance(state.pid, int) else -1,
        "gpu": False,
        "gpuUsage": "N/A",
    }
