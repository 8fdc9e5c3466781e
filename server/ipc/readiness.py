"""What `/ready` says of the workers. Pure but for the pulses, which it reads; for fronts and the supervisor."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from server.ipc.pulse import PulseReader
from server.settings import Settings

State = Literal["ready", "silent", "loads_stuck", "down"]


class WorkerState(msgspec.Struct, frozen=True):
    """One worker. Only `ready` takes every request; `for_s`: how long a worker has been silent, or its loads stuck.

    `store_failing_s`: for how long the store has failed it. Such a worker is ready: what it holds it serves.
    """

    worker: int
    state: State
    for_s: float | UnsetType = UNSET
    store_failing_s: float | UnsetType = UNSET


class Readiness(msgspec.Struct, frozen=True):
    """The body of `/ready`. `ready`: some worker is; `workers`: how many are."""

    ready: bool
    workers: int
    states: list[WorkerState]

    @property
    def status(self) -> HTTPStatus:
        """The status code of the answer."""
        return HTTPStatus.OK if self.ready else HTTPStatus.SERVICE_UNAVAILABLE


def stuck_after_s(settings: Settings) -> float:
    """For how long all loader threads may be busy with the same loads: twice what the store's time-outs allow."""
    return 2 * settings.store_timeout_s * (settings.store_retries + 1)


def describe_workers(up: Mapping[int, PulseReader | None], expected: int, stuck_s: float) -> Readiness:
    """The state of `expected` workers, of which `up` are connected. `stuck_s`: see `stuck_after_s`."""
    count = max([expected, *(worker + 1 for worker in up)])
    states = [
        _describe_worker(worker, up[worker], stuck_s) if worker in up else WorkerState(worker, "down")
        for worker in range(count)
    ]
    ready = sum(each.state == "ready" for each in states)
    return Readiness(ready > 0, ready, states)


def _describe_worker(worker: int, pulse: PulseReader | None, stuck_s: float) -> WorkerState:
    if pulse is None:
        return WorkerState(worker, "ready")
    if pulse.is_silent:
        return WorkerState(worker, "silent", round(pulse.silent_s, 1))
    signs = pulse.load_signs()
    failing_s = round(signs.store_gone_s, 1) or UNSET
    if signs.stuck_s > stuck_s:
        return WorkerState(worker, "loads_stuck", round(signs.stuck_s, 1), failing_s)
    return WorkerState(worker, "ready", store_failing_s=failing_s)
