"""What limits a running server, by rules over two readings of it: each with numbers, threshold and advice. Pure.

A rule looks at what happened between the readings. It says nothing where too little happened to judge by.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from server.cli.fleet.rates import Change
from server.cli.fleet.rows import Row, count_answers

LEAST_REQUESTS = 100  #: of an interval, by which shares are judged
BUSY = 0.7  #: of a core, from which on a process has little left for bursts
FULL = 0.9  #: of a core: a front there makes clients wait
MOST = 0.5  #: a share from which on one thing is most of the whole
FEW_ROWS = 2.0  #: mean rows of a batch below which batching wins little
GOOD_HITS = 0.95  #: a share of hits with which few clients wait for loads
YOUNG_S = 60.0  #: an evicted model that was younger will be loaded again at the next tick
SLOW_STORE_S = 1.0  #: median time of a load's requests to the store
NEAR_LIMIT = 0.8  #: of descriptors, and of the disk tier's room
FAILURES = 0.01  #: a share of failed requests that is worth a look
HALF, NEARLY = 0.5, 0.95  #: of the hits that memory can win at all
LATE = 0.1  #: a share of prefetched models whose request came first


@dataclass(frozen=True)
class Finding:
    """Something that limits the server: what it is, the numbers that say so beside the threshold, and what to do."""

    name: str
    numbers: str
    advice: str


@dataclass(frozen=True)
class Observation:
    """Two readings of `GET /fleet/overview`, and the models as they were listed at both, by name."""

    change: Change
    before: Mapping[str, Row]
    now: Mapping[str, Row]

    @property
    def requests(self) -> float:
        """How many were answered, in any way."""
        return self.change.count("requests")

    def busy(self, kind: str) -> dict[str, float]:
        """The cores that each front or worker used, by its name such as `worker-0`."""
        names = [name for name in self.change.now["process_cpu_seconds"] if name.startswith(kind)]
        return {name: self.change.rate("process_cpu_seconds", name) for name in sorted(names)}


Rule = Callable[[Observation], Finding | None]


def diagnose(seen: Observation) -> Iterator[Finding]:
    """What limits the server, the worst first: what fails, then what makes clients wait, then what wastes."""
    for rule in RULES:
        finding = rule(seen)
        if finding is not None:
            yield finding


def find_failures(seen: Observation) -> Finding | None:
    """Requests that are not answered with success."""
    codes = seen.change.list_failed()
    failed = sum(codes.values())
    if seen.requests < LEAST_REQUESTS or failed / seen.requests < FAILURES:
        return None
    worst = ", ".join(
        f"{count:.0f} with {code}" for code, count in sorted(codes.items(), key=lambda each: -each[1])[:3]
    )
    return Finding(
        "requests fail",
        f"{_percent(failed / seen.requests)} of {seen.requests:.0f} requests failed ({worst}); "
        f"{_percent(FAILURES)} is much",
        "`fleetcast ls --failed` and the log say why. 503 means more requests than the server can take "
        "(docs/overload.md), 424 a model or a deadline, 4xx the clients' own requests",
    )


def find_quarantine(seen: Observation) -> Finding | None:
    """Models that no worker runs."""
    count = sum(seen.change.now["quarantined_models"].values())
    if not count:
        return None
    return Finding(
        "models are in quarantine",
        f"{count:.0f} models ended or held up a worker and are not run any more; there should be none",
        "`fleetcast ls --failed` says why; upload a mended archive, or `fleetcast release MODEL`",
    )


def find_restarts(seen: Observation) -> Finding | None:
    """Workers that were started anew."""
    count = seen.change.count("restarts")
    if not count:
        return None
    return Finding(
        "workers die",
        f"{count:.0f} workers were started anew within {seen.change.seconds:.0f} s; there should be none",
        "the log's `ended` and `killed` say how: code -9 is mostly the kernel's want of memory "
        "(lower `model_cache_bytes`)",
    )


def find_full_fronts(seen: Observation) -> Finding | None:
    """Fronts that have no processor time left."""
    fronts = seen.busy("front")
    name, most = _find_most(fronts)
    if most < FULL:
        return None
    return Finding(
        "the fronts are the limit",
        f"{name} used {_percent(most)} of a core; from {_percent(FULL)} on clients wait for it",
        f"raise `fronts` (now {len(fronts)}) where cores are free, send many models in one call "
        "(`POST /v1/forecasts`), or binary bodies (application/x-npy), and keep connections open",
    )


def find_full_workers(seen: Observation) -> Finding | None:
    """Workers that have no processor time left, and what they spend it on."""
    name, most = _find_most(seen.busy("worker"))
    parts = {part: seen.change.share("step_seconds", part) for part in ("decode", "forward", "encode")}
    if most < BUSY or math.isnan(parts["forward"]):
        return None
    part = max(parts, key=lambda each: parts[each])
    advice = {
        "decode": "send binary bodies (application/x-npy, or the binary tensors of the Open Inference Protocol) "
        "instead of JSON, and no more history than a model reads",
        "forward": "add workers on free cores, or a GPU; `fleetcast doctor` without --url says what a forward costs",
        "encode": "ask for fewer quantiles, samples and steps, or for binary answers",
    }
    return Finding(
        f"the workers are the limit, mostly to {part}",
        f"{name} used {_percent(most)} of a core ({_percent(BUSY)} is much): {_percent(parts['decode'])} of its steps "
        f"decode, {_percent(parts['forward'])} run models, {_percent(parts['encode'])} encode",
        advice[part],
    )


def find_small_batches(seen: Observation) -> Finding | None:
    """Workers that are busy with few rows at a time."""
    rows = seen.change.buckets("batch_rows")
    _, most = _find_most(seen.busy("worker"))
    if most < BUSY or rows.count < LEAST_REQUESTS or rows.mean >= FEW_ROWS:
        return None
    families = len(list_families(seen.now))
    return Finding(
        "batches are small",
        f"{rows.mean:.1f} rows a batch in the mean, though a worker is busy; {FEW_ROWS:.0f} and more is good",
        f"the resident models are of {families} families, and only models of one run together: give them one "
        "architecture and configuration; or clients ask one at a time, who could ask for many in one call",
    )


def find_small_cache(seen: Observation) -> Finding | None:
    """Models that are evicted and asked for again."""
    hits, asked = seen.change.share("cache_requests", "hit"), seen.change.count("cache_requests")
    evicted = seen.change.count("evictions", "device")
    if asked < LEAST_REQUESTS or hits >= GOOD_HITS or not evicted:
        return None
    used, room = (seen.change.now[key].get("device", 0.0) for key in ("cache_bytes", "cache_capacity_bytes"))
    return Finding(
        "the cache is too small",
        f"{_percent(hits)} of {asked:.0f} requests found their model loaded ({_percent(GOOD_HITS)} is good), and "
        f"{evicted:.0f} models were evicted; {used / 2**20:.0f} of {room / 2**20:.0f} MiB are used",
        f"raise `model_cache_bytes`{_say_what_room_buys(seen)}; with the folder of `serve --access-log`, `fleetcast "
        "doctor --access-log DIR` says it of longer times",
    )


def _say_what_room_buys(seen: Observation) -> str:
    """Which share of hits more memory would have had: for the least that wins half, and for what wins nearly all.

    Each worker counts, in buckets, by how many bytes its share of the cache was too small for a miss.
    """
    short = seen.change.buckets("shortfall_bytes")
    if not short.count:
        return ""
    hits, asked = seen.change.count("cache_requests", "hit"), seen.change.count("cache_requests")
    workers = max(1, len(seen.busy("worker")))
    won: dict[float, float] = {}  # misses that would have been hits, by the memory that this takes
    for share in (HALF, NEARLY):
        counted = zip(short.bounds, short.counts[:-1], strict=True)
        enough = next(((bound, count) for bound, count in counted if count >= share * short.count), None)
        if enough is not None:
            won[workers * enough[0]] = enough[1]
    said = " and ".join(
        f"{_percent((hits + count) / asked)} with {size / 2**20:.0f} MiB" for size, count in won.items()
    )
    return f": at least {said} more would have been hits" if said else ""


def find_thrash(seen: Observation) -> Finding | None:
    """Models that are evicted soon after their load, as when a whole market asks at each tick."""
    ages = seen.change.buckets("eviction_age_seconds")
    median = ages.quantile(0.5)
    if ages.count < LEAST_REQUESTS / 10 or not median < YOUNG_S:
        return None
    return Finding(
        "models are evicted before they are asked again",
        f"half of {ages.count:.0f} evicted models were loaded less than {median:.0f} s before; "
        f"more than {YOUNG_S:.0f} s is usual",
        "a tick asks more models than fit: raise `model_cache_bytes` or `host_cache_bytes`, or let a tick's models "
        "come in one call, so that each is loaded once",
    )


def find_slow_store(seen: Observation) -> Finding | None:
    """Requests to the store that take long."""
    taken = seen.change.buckets("download_seconds")
    median = taken.quantile(0.5)
    if not median > SLOW_STORE_S:
        return None
    return Finding(
        "the store is slow",
        f"half of {taken.count:.0f} downloads took more than {median:.1f} s; {SLOW_STORE_S:.0f} s is much",
        "look at its latency from this host and at the archives' sizes; raise `disk_cache_bytes` so that archives are "
        "fetched once, and `loader_threads` where many are fetched at a time",
    )


def find_small_disk(seen: Observation) -> Finding | None:
    """A disk tier that drops archives, which are then fetched again."""
    used, room = (seen.change.now[key].get("disk", 0.0) for key in ("cache_bytes", "cache_capacity_bytes"))
    dropped, fetched = seen.change.count("evictions", "disk"), seen.change.buckets("load_seconds", "store").count
    if not (room and dropped and fetched and used / room >= NEAR_LIMIT):
        return None
    return Finding(
        "the disk tier is too small",
        f"{_percent(used / room)} of {room / 2**30:.1f} GiB are used, {dropped:.0f} archives were dropped and "
        f"{fetched:.0f} fetched from the store meanwhile; there is room below {_percent(NEAR_LIMIT)}",
        "raise `disk_cache_bytes`, or point `disk_cache` at a larger disk",
    )


def find_many_families(seen: Observation) -> Finding | None:
    """Families that have few models each."""
    families, models = list_families(seen.now), len(seen.now)
    if len(families) < 8 or models / len(families) >= 4:  # noqa: PLR2004 -- fewer families, or some models in each
        return None
    return Finding(
        "there are many families",
        f"{models} models of {len(families)} families; with 4 or more models in each, batches and memory gain",
        "give markets one architecture, context and horizon where forecasts allow it (`fleetcast inspect` shows them)",
    )


def find_hot_model(seen: Observation) -> Finding | None:
    """One model that is most of the load."""
    answers = count_answers(seen.before, seen.now)
    whole = sum(answers.values())
    if whole < LEAST_REQUESTS or len(answers) < 2:  # noqa: PLR2004 -- of one model nothing is remarkable
        return None
    name = max(answers, key=lambda each: answers[each])
    if answers[name] / whole < MOST:
        return None
    return Finding(
        "one model is most of the load",
        f"{name} gave {_percent(answers[name] / whole)} of {whole} answers; "
        f"from {_percent(MOST)} on its worker is uneven",
        "its requests batch by themselves; if its worker is full while others are idle, let clients ask for many "
        "series in one call, or store the archive under a second name",
    )


def find_uneven_workers(seen: Observation) -> Finding | None:
    """Workers of which one is full while another is idle."""
    workers = seen.busy("worker")
    name, most = _find_most(workers)
    if len(workers) < 2 or most < BUSY or min(workers.values()) > most / 2:  # noqa: PLR2004
        return None
    idle = min(workers, key=lambda each: workers[each])
    return Finding(
        "the workers are uneven",
        f"{name} used {_percent(most)} of a core and {idle} {_percent(workers[idle])}; half as much is usual at least",
        "a model lives in one worker: a few hot ones may share it. Pin nothing by hand; more models even this out",
    )


def find_few_descriptors(seen: Observation) -> Finding | None:
    """Processes that can soon open no connection and no file."""
    most = seen.change.now["process_most_files"]
    shares = {
        name: count / most[name] for name, count in seen.change.now["process_open_files"].items() if most.get(name)
    }
    name, share = _find_most(shares)
    if share < NEAR_LIMIT:
        return None
    return Finding(
        "descriptors are nearly used up",
        f"{name} has {_percent(share)} of its {most[name]:.0f} file descriptors open; "
        f"below {_percent(NEAR_LIMIT)} is safe",
        "raise the hard limit (`ulimit -Hn`, systemd's LimitNOFILE), or close idle connections sooner (`keep_alive_s`)",
    )


def find_late_prefetch(seen: Observation) -> Finding | None:
    """Models that are prefetched too late for their tick."""
    late, whole = seen.change.count("prefetch", "late"), seen.change.count("prefetch")
    if whole < LEAST_REQUESTS / 10 or late / whole < LATE:
        return None
    return Finding(
        "models come late at the tick",
        f"{late:.0f} of {whole:.0f} prefetched models were asked for while they loaded; {_percent(LATE)} is much",
        "the clock of the clients is ahead of what the server has learnt, or loads take too long: see load times in "
        "`fleetcast top`, and `fleetcast pin` those that must not wait",
    )


RULES: Sequence[Rule] = (
    find_failures,
    find_quarantine,
    find_restarts,
    find_full_fronts,
    find_full_workers,
    find_small_batches,
    find_small_cache,
    find_thrash,
    find_slow_store,
    find_small_disk,
    find_late_prefetch,
    find_hot_model,
    find_uneven_workers,
    find_many_families,
    find_few_descriptors,
)


def list_families(rows: Mapping[str, Row]) -> set[str]:
    """The families of the resident models."""
    return {str(each["family"]) for row in rows.values() for each in row["holders"] if each.get("family")}


def _find_most(found: Mapping[str, float]) -> tuple[str, float]:
    name = max(found, key=lambda each: found[each], default="")
    return name, found.get(name, 0.0)


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"
