"""What became of a load: every request's times and answer as arrays, and whether the run says anything. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import orjson

from loadtest.profiles import Float64, Int64, Schedule

CACHE = ("", "hit", "miss", "coalesced")  #: what X-Fleetcast-Cache said; "": nothing
NO_ANSWER, LOST = 0, -1  #: stand for a status: none came in time; the connection was refused or lost

BUSY = "the driver was too busy; ask less, or give it a core of its own"
NO_CONNECTION = "no more connections could be had, and all were waiting for answers; ask less, or allow more"

MAX_LAG_S, MAX_LAG_OF_P50, MAX_UNSENT = 0.005, 0.2, 0.001


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What became of a schedule's requests; times [n] in seconds from its start, NaN where it did not happen.

    `woken`: the driver turned to the request; `sent`: it had a connection and wrote it; `done`: the answer was whole.
    `status` [n] is HTTP's, NO_ANSWER or LOST; `cache` [n] indexes CACHE. `exhausted`: all connections allowed
    were open and taken at some time. `checked` answers were looked into; `unsound`: what was wrong with them.
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
    unsound: Sequence[str]

    @property
    def latency(self) -> Float64:
        """[n] seconds from the intended time; what was not answered has waited until the end."""
        return np.where(np.isnan(self.done), self.ended, self.done) - self.schedule.at

    @property
    def lag(self) -> Float64:
        """[n] seconds from the intended time until the request was on its way; what never was, until the end."""
        return np.where(np.isnan(self.sent), self.ended, self.sent) - self.schedule.at

    def invalid(self) -> list[str]:
        """Why the run says nothing about the server; empty for a valid run."""
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


def unsound(body: bytes) -> str | None:
    """What is wrong with a JSON answer: it must have predictions, with numbers that are all finite."""
    try:
        answer = orjson.loads(body)  # refuses NaN and Infinity
    except ValueError as error:
        return f"not JSON: {error}"
    values = list(_leaves(answer.get("predictions", []))) if isinstance(answer, dict) else []
    numbers = [value for value in values if not isinstance(value, str)]
    if not numbers:
        return f"no predictions in {body[:80]!r}"
    bad = [value for value in numbers if isinstance(value, bool) or not isinstance(value, int | float)]
    return f"{bad[0]!r} where a number should be" if bad else None


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value
