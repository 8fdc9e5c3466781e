"""The result of a load run: every request's times and status as arrays, and whether the run is valid. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from loadtest.driver.profiles import Float64, Int64, Schedule
from server.contract import CACHE_RESULTS

CACHE = ("", *CACHE_RESULTS)  #: values of the header X-Fleetcast-Cache; "" if it was absent
NO_ANSWER, LOST = 0, -1  #: in place of a status: no answer in time; connection refused or lost
OK = 200
GRPC = 1000  #: a status of gRPC that is not OK is this and its number, of which gRPC has 17
_GRPC_NAMES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip

BUSY = "the driver was too busy; ask less, or give it a core of its own"
NO_CONNECTION = "no more connections could be had, and all were waiting for answers; ask less, or allow more"

Number = TypeVar("Number", np.float64, np.int64)

MAX_LAG_S, MAX_LAG_OF_P50, MAX_UNSENT = 0.005, 0.2, 0.001


@dataclass(frozen=True, slots=True, eq=False)
class ForecastCounts:
    """The forecasts in each call for many models [n], and the failed ones among them [n]."""

    asked: Int64
    failed: Int64


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The results of a schedule's requests; times [n] are in seconds from its start, NaN for what did not happen.

    `woken` is when the driver came to the request, `sent` when it wrote it to a connection, `done` when the answer was
    complete. `status` [n] is a status of HTTP, of gRPC (see GRPC), NO_ANSWER or LOST; `cache` [n] is an index of CACHE.
    `exhausted` says that all allowed connections were in use at some time. `checked` answers were checked; `unsound`
    describes the wrong ones.
    """

    schedule: Schedule
    woken: Float64
    sent: Float64
    done: Float64
    status: Int64
    cache: Int64
    ended: float
    exhausted: bool
    checked: int
    unsound: Sequence[tuple[int, str]]
    forecasts: ForecastCounts | None = None  #: if each request is a call for many models
    said: Mapping[int, str] = field(default_factory=dict)  #: by status that is not 200, the words of one such answer

    @property
    def latency(self) -> Float64:
        """Return the latency [n] in seconds from the intended time; an unanswered request has waited until the end."""
        return np.where(np.isnan(self.done), self.ended, self.done) - self.schedule.at

    @property
    def lag(self) -> Float64:
        """Return the seconds [n] from the intended time until the request was sent, or to the end if it never was."""
        return np.where(np.isnan(self.sent), self.ended, self.sent) - self.schedule.at

    def invalid(self) -> list[str]:
        """Reasons why the run is invalid; empty for a valid run."""
        reasons = []
        unsent = int(np.isnan(self.sent).sum())
        if unsent > MAX_UNSENT * len(self.sent):
            reasons.append(f"{unsent} of {len(self.sent)} requests were never sent")
        limit = max(MAX_LAG_S, MAX_LAG_OF_P50 * float(np.median(self.latency)))
        lag = float(np.percentile(self.lag, 99))
        if lag > limit:
            woken = np.where(np.isnan(self.woken), self.ended, self.woken) - self.schedule.at
            punctual = float(np.percentile(woken, 99)) <= limit
            why = NO_CONNECTION if punctual and self.exhausted else BUSY
            reasons.append(f"1 % of the requests left {lag * 1e3:.1f} ms late or more (limit {limit * 1e3:.1f}): {why}")
        return reasons


def merge_runs(schedule: Schedule, parts: Sequence[Run]) -> Run:
    """Merge the runs of a schedule whose requests were dealt to n drivers: part k has requests k, k + n, k + 2n ..."""
    n = len(parts)
    calls = [part.forecasts for part in parts if part.forecasts is not None]
    forecasts = (
        ForecastCounts(_interleave_parts([c.asked for c in calls]), _interleave_parts([c.failed for c in calls]))
        if calls
        else None
    )
    return Run(
        schedule,
        woken=_interleave_parts([part.woken for part in parts]),
        sent=_interleave_parts([part.sent for part in parts]),
        done=_interleave_parts([part.done for part in parts]),
        status=_interleave_parts([part.status for part in parts]),
        cache=_interleave_parts([part.cache for part in parts]),
        ended=max(part.ended for part in parts),
        exhausted=any(part.exhausted for part in parts),
        checked=sum(part.checked for part in parts),
        unsound=[(i * n + k, why) for k, part in enumerate(parts) for i, why in part.unsound],
        forecasts=forecasts,
        said={status: words for part in reversed(parts) for status, words in part.said.items()},
    )


def _interleave_parts(arrays: Sequence[npt.NDArray[Number]]) -> npt.NDArray[Number]:
    """Interleave the values of the parts in the order of the schedule."""
    whole = np.empty(sum(map(len, arrays)), arrays[0].dtype)
    for k, array in enumerate(arrays):
        whole[k :: len(arrays)] = array
    return whole


def name_status(status: int) -> str:
    """The status as its protocol says it: `404`, `NOT_FOUND`."""
    return _GRPC_NAMES[status - GRPC] if status >= GRPC else str(status)
