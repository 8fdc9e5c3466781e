"""Judges what became of every request while faults came and went. Pure: records in, counts out; times are monotonic.

A request is judged by what may be asked of a server at that time: which versions of its model were published, and which
fronts were killed or stopped while it was under way.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

GRACE_S = 1.0  #: beyond the deadline, by when every request must be answered or refused
REFUSALS = frozenset({400, 413, 424, 429, 503})  #: statuses of typed refusals; 500 would be a fault of the server


class Verdict(StrEnum):
    """What became of a request."""

    RIGHT = "right"
    REFUSED = "refused"
    REPELLED = "repelled"  #: refused, as it must be
    WRONG = "wrong"  #: numbers of another version than the header names, or of none
    STALE = "stale"  #: right numbers of a version that had been replaced long before
    BROKEN = "broken"  #: a status that is neither an answer nor a typed refusal
    LATE = "late"  #: answered or refused, but after the deadline and the grace
    LOST = "lost"  #: no answer
    CUT = "cut"  #: no answer or a late one, because the front was killed or stopped that had the request
    DOWN = "down"  #: not connected or late, because the server had ended and was not ready again yet


#: A run with one of these has failed.
VIOLATIONS = (Verdict.WRONG, Verdict.STALE, Verdict.BROKEN, Verdict.LATE, Verdict.LOST)


@dataclass(frozen=True, slots=True)
class Record:
    """One request. `status` None: no whole answer came; `connected` False: it was not even sent.

    `agrees`: the versions of the model whose numbers the body has. `stalled_s`: how long the client itself did not run
    meanwhile, which is not held against the server. `hostile`: it must be refused, whatever happens.
    """

    model: str
    sent: float
    ended: float
    deadline_s: float
    status: int | None = None
    connected: bool = True
    version: str = ""
    agrees: frozenset[str] = frozenset()
    stalled_s: float = 0.0
    hostile: bool = False
    detail: str = ""


@dataclass(slots=True)
class Published:
    """A version of a model: in the store from `at` on, and replaced everywhere at `replaced`, if it was."""

    version: str
    at: float
    replaced: float | None = None


@dataclass(frozen=True, slots=True)
class Outage:
    """From `begin` to `end`: with `cuts` requests under way may be lost or late; with `down` no front runs, so that
    connections are refused, or wait until the next one has started.
    """

    begin: float
    end: float
    cuts: bool
    down: bool


@dataclass(frozen=True, slots=True)
class Window:
    """Faults by name, from when they began until they were healed, and until when the server was watched after it.

    `whole`: when all its processes were up again.
    """

    faults: tuple[str, ...]
    begin: float
    healed: float
    whole: float
    end: float


@dataclass(slots=True)
class History:
    """What happened beside the requests.

    `follow_s`: how long after its replacement a version may still answer. `store_broken`: spans in which the store
    could not be asked, so that any copy on disk may answer, and `follow_s` after them.
    """

    follow_s: float
    store_broken: list[tuple[float, float]] = field(default_factory=list)
    versions: dict[str, list[Published]] = field(default_factory=dict)
    outages: list[Outage] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)

    def publish(self, model: str, version: str, at: float) -> None:
        """The version is in the store, or is about to be."""
        self.versions.setdefault(model, []).append(Published(version, at))

    def replace(self, model: str, at: float) -> None:
        """The newest version is in the store, or is ordered: those before it are to go."""
        for each in self.versions[model][:-1]:
            each.replaced = each.replaced or at

    def permits(self, record: Record) -> bool:
        """Whether the version that the answer names may have answered."""
        store_broken = any(begin <= record.sent <= end + self.follow_s for begin, end in self.store_broken)
        return any(
            each.version == record.version
            and each.at <= record.ended
            and (each.replaced is None or record.sent <= each.replaced + self.follow_s or store_broken)
            for each in self.versions.get(record.model, ())
        )


def judge_request(record: Record, history: History) -> Verdict:
    """The verdict on one request."""
    outages = [each for each in history.outages if record.sent <= each.end and record.ended >= each.begin]
    may_be_cut = any(each.cuts for each in outages)
    late = record.ended - record.sent > record.deadline_s + GRACE_S + record.stalled_s
    if not record.connected:
        return Verdict.DOWN if any(each.down for each in outages) else Verdict.LOST
    if record.status is None:
        return Verdict.CUT if may_be_cut else Verdict.LOST
    if record.status == 200 and (record.hostile or record.version not in record.agrees):
        return Verdict.WRONG
    if record.status == 200 and not history.permits(record):
        return Verdict.STALE
    if record.status != 200 and record.status not in REFUSALS:
        return Verdict.BROKEN
    if late and may_be_cut:
        return Verdict.CUT
    if late:
        return Verdict.DOWN if any(each.down for each in outages) else Verdict.LATE
    if record.status == 200:
        return Verdict.RIGHT
    return Verdict.REPELLED if record.hostile else Verdict.REFUSED


@dataclass(frozen=True, slots=True)
class FaultRow:
    """What one window's faults did. `recovery_s`: after the heal, until the last request was sent that was not answered
    right, but for the last STRAYS of them; None where the end of the window had such requests.
    """

    faults: tuple[str, ...]
    begin_s: float
    held_s: float
    during: Mapping[str, int]
    after: Mapping[str, int]
    recovery_s: float | None
    whole_s: float  #: until all processes were up; not judged, since the machine has other work


@dataclass(frozen=True, slots=True)
class Report:
    """The counts of a run. `examples`: a few of the requests that violate."""

    requests: int
    counts: Mapping[str, int]
    rows: Sequence[FaultRow]
    examples: Sequence[str]
    slowest_s: float
    refusals: Mapping[str, int]  #: by status and the beginning of the message

    def violations(self, recovery_s: float | None) -> list[str]:
        """What was promised and not kept, in words. `recovery_s`: how long a recovery may take; None: not judged."""
        found = [f"{self.counts[verdict]} {verdict}" for verdict in VIOLATIONS if self.counts.get(verdict)]
        if not self.counts.get(Verdict.RIGHT):
            found.append("no request was answered right")
        for row in self.rows if recovery_s is not None else ():
            if row.recovery_s is None or row.recovery_s > (recovery_s or 0.0):
                took = "was not seen" if row.recovery_s is None else f"took {row.recovery_s:.1f} s"
                found.append(f"recovery from {' + '.join(row.faults)} at {row.begin_s:.0f} s {took}")
        return found

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        rows = [
            {
                "faults": list(row.faults),
                "begin_s": round(row.begin_s, 2),
                "held_s": round(row.held_s, 2),
                "during": dict(row.during),
                "after": dict(row.after),
                "whole_s": round(row.whole_s, 2),
                "recovery_s": None if row.recovery_s is None else round(row.recovery_s, 2),
            }
            for row in self.rows
        ]
        return {
            "requests": self.requests,
            "counts": dict(self.counts),
            "slowest_s": round(self.slowest_s, 3),
            "refusals": dict(self.refusals),
            "faults": rows,
            "examples": list(self.examples),
        }


SHOWN = 20  #: examples in a report
REASON = 120  #: characters of a refusal's message
QUIET_S = 0.5  #: at a window's end, in which a server that has recovered answers right
STRAYS = 0.01  #: of the requests after a heal: a busy machine refuses some that have a second's deadline


def count_verdicts(records: Iterable[Record], history: History, started: float) -> Report:
    """Judge all requests."""
    judged = sorted(((each, judge_request(each, history)) for each in records), key=lambda pair: pair[0].sent)
    counts = Counter(str(verdict) for _, verdict in judged)
    examples = [describe_record(each, verdict, started) for each, verdict in judged if verdict in VIOLATIONS]
    rows = [summarize_window(window, judged, started) for window in history.windows]
    slowest = max((each.ended - each.sent for each, verdict in judged if verdict is not Verdict.CUT), default=0.0)
    refusals = Counter(
        f"{each.status} {each.detail.replace(each.model, 'MODEL')[:REASON]}"
        for each, verdict in judged
        if verdict is Verdict.REFUSED
    )
    return Report(len(judged), counts, rows, examples[:SHOWN], slowest, dict(refusals.most_common(SHOWN)))


def summarize_window(window: Window, judged: Sequence[tuple[Record, Verdict]], started: float) -> FaultRow:
    """The requests of one window, and the recovery after it. Hostile requests do not count: they are always refused."""
    ours = [(each, verdict) for each, verdict in judged if window.begin <= each.sent < window.end and not each.hostile]
    during = Counter(str(verdict) for each, verdict in ours if each.sent < window.healed)
    # What ends later than the window may have met the next fault.
    after = [(each, verdict) for each, verdict in ours if each.sent >= window.healed and each.ended < window.end]
    bad = [each.sent - window.healed for each, verdict in after if verdict is not Verdict.RIGHT]
    last = max(bad[: max(0, len(bad) - int(STRAYS * len(after)))], default=0.0)
    recovered = after and last <= window.end - window.healed - QUIET_S
    return FaultRow(
        window.faults,
        window.begin - started,
        window.healed - window.begin,
        during,
        Counter(str(verdict) for _, verdict in after),
        last if recovered else None,
        window.whole - window.healed,
    )


def describe_record(record: Record, verdict: Verdict, started: float) -> str:
    """One request in a line, for the report."""
    took = record.ended - record.sent
    return (
        f"{record.sent - started:.2f} s: {verdict} {record.model} status {record.status} after {took:.2f} s "
        f"(deadline {record.deadline_s:g} s, client stalled {record.stalled_s:.2f} s), "
        f"version {record.version or '-'}, agrees with {sorted(record.agrees)}; {record.detail}"
    )
