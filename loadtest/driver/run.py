"""One load run against a server: the server, the request bodies, the schedule, and the results."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import urllib3
from rich.console import Console

from loadtest.driver import summary
from loadtest.driver.call_encodings import Encoding
from loadtest.driver.dialects import DIALECTS, BodyKind
from loadtest.driver.driver_pool import DriverPool, count_drivers
from loadtest.driver.model_registration import load_into_container, register_versions
from loadtest.driver.open_loop import LoadTarget, RemoteNotAllowed, make_target, resolve_address
from loadtest.driver.profiles import Load, Profile, Schedule
from loadtest.driver.request_bodies import RequestBody, join_requests, read_request_bodies
from loadtest.driver.run_result import Run
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.observe.metrics_sampler import MetricsSampler
from loadtest.observe.processes import read_pss
from loadtest.observe.server_access import OPEN, ServerAccess
from model_store.errors import LoadError
from model_store.names import ModelName, parse_model_name
from model_store.stores.object_store import open_source
from server.contract import METRICS_PATH
from server.shell.progress import TaskList, follow_tasks

STORE = Path(".fleetcast/load")
WARMUP = 1  #: number of the part of the profile that is not measured
#: Limits of a sustained step of a ramp: answered ones of the due requests, failed ones of the sent requests.
SUSTAINED, FAILED = 0.98, 0.001
#: The errors of a run that a user can fix; their messages say how.
EXPECTED = (RemoteNotAllowed, LoadError, urllib3.exceptions.HTTPError, ValueError, OSError, RuntimeError)
SHOWN = 3


@dataclass(frozen=True, slots=True)
class ServerUnderLoad:
    """A server under load: its addresses, the request body of each model, and how to measure its memory, if known."""

    inference: str
    metrics: str | None
    questions: Mapping[ModelName, RequestBody]
    what: str
    memory: Callable[[], dict[str, int]] | None = None
    access: ServerAccess = OPEN
    management: str | None = None

    def target(
        self, dialect: str, *, allow_remote: bool, per_call: int | None = None, encoding: Encoding = Encoding.JSON
    ) -> LoadTarget:
        """Make a complete request for each model, or a call for each `per_call` models (None: all) in such a dialect.

        `encoding`: of calls and their answers.

        Raises ValueError, RemoteNotAllowed.
        """
        shown = self.access.headers
        host, spoken = urlsplit(self.inference).netloc, DIALECTS[dialect]
        if not spoken.many and per_call is not None:
            raise ValueError(f"the dialect {dialect} asks one model a request: --per-call is for the dialect forecasts")
        if spoken.many:
            items = list(self.questions.items())
            size = per_call or len(items)
            calls = [dict(items[start : start + size]) for start in range(0, len(items), size)]
            joined = [join_requests(each, encoding) for each in calls]
            requests = [spoken.request(host, "", each.body, each.content_type, shown) for each in joined]
        else:
            calls = []
            asked = self.questions.items()
            requests = [
                spoken.request(host, name, each.body, each.content_type, {**each.headers, **shown}, each.version)
                for name, each in asked
            ]
        counts = list(map(len, calls))
        return make_target(
            self.inference,
            requests,
            forecasts=counts,
            allow_remote=allow_remote,
            access=self.access,
            free_form=spoken.free_form,
            method=spoken.path if spoken.is_grpc else "",
            encoding=encoding,
        )

    def register(self, dialect: str, *, versions: bool, allow_remote: bool = False) -> "ServerUnderLoad":
        """Register the models where the dialect's clients do. Returns the server with those that can be asked then.

        `versions`: of TorchServe, each request names the version of its model. Raises ValueError, RuntimeError,
        RemoteNotAllowed.
        """
        names = list(self.questions)
        if dialect == "container":
            loaded = load_into_container(self.access, self.inference, names)
            what = f"{self.what}, {len(loaded)} of them loaded into the container"
            return replace(self, questions={name: self.questions[name] for name in loaded}, what=what)
        if not versions:
            return self
        if self.management is None:
            raise ValueError("--versions registers the models: give --management-url as well")
        resolve_address(self.management, allow_remote=allow_remote)
        found = register_versions(self.access, self.management, names)
        asked = {name: replace(each, version=found[name]) for name, each in self.questions.items()}
        return replace(self, questions=asked, what=f"{self.what}, by version")

    def watch(self) -> MetricsSampler:
        """Make the sampler of its metrics and memory for the time of the load."""
        return MetricsSampler(self.scrape if self.metrics else None, self.memory)

    def scrape(self) -> str:
        """GET the text of /metrics. Raises RuntimeError if there is none."""
        return str(self.access.request("GET", f"{(self.metrics or '').rstrip('/')}{METRICS_PATH}").data, "utf-8")


@dataclass(frozen=True, slots=True)
class RequestSource:
    """The source of the models' names and request bodies."""

    names: Sequence[ModelName] | None  #: None: the names in the store
    most: int
    body: BodyKind | None
    request: RequestBody | None  #: one body for all models instead of one for each archive
    seed: int
    dialect: str = "sagemaker"

    def of(self, store: str | None, console: Console) -> dict[ModelName, RequestBody]:
        """Make the bodies. Raises ValueError if there are none, LoadError or InvalidStoreUrl for the store."""
        names = self.names
        if names is None:
            if store is None:
                raise ValueError("the models' names are not known: give --store or --names")
            names = [listed.name for listed in itertools.islice(open_source(store).list(), self.most)]
        if self.request is not None:
            questions = dict.fromkeys(names, self.request)
        elif store is None:
            raise ValueError("without --store nobody knows what the models take: give a --request")
        else:
            questions = self._read(store, names, console)
        if not questions:
            what = "" if names else ": it has no archive (`fleetcast train`, or `fleetcast-load fleet`, makes some)"
            raise ValueError(f"no model of {store} can be asked{what}")
        return questions

    def _read(self, store: str, names: Sequence[ModelName], console: Console) -> dict[ModelName, RequestBody]:
        with follow_tasks(console) as tasks:
            task = tasks.start_task("reading archives", len(names))
            asked = read_request_bodies(
                open_source(store), names, self.body, self.seed, task.advance, DIALECTS[self.dialect]
            )
        if asked.left_out:
            console.print(f"{len(asked.left_out)} of {len(names)} archives are left out:")
            for why in itertools.islice(asked.left_out.values(), SHOWN):
                console.print(f"  {why}")
        return dict(asked.questions)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The parameters of a run that do not depend on the server."""

    load: Load
    seconds: float
    warmup: float
    connections: int
    processes: int | None  #: driver processes; None: as many as the highest rate needs
    slo: summary.Slo
    dialect: str = "sagemaker"


# --- servers --------------------------------------------------------------------------------------------------------


@contextmanager
def serve_fleet(
    models: int, resident: int, workers: int, questions: RequestSource, console: Console
) -> Iterator[ServerUnderLoad]:
    """Make a fleet with random weights once, and serve it with a cache for some of the models."""
    from handlers.forecasters import build_family  # noqa: PLC0415 -- torch, which only this way needs
    from loadtest.fleets.fleet import list_fleet_names, make_fleet  # noqa: PLC0415
    from loadtest.fleets.network_shape import CONFIG  # noqa: PLC0415

    names = list_fleet_names(models)
    if not all((STORE / name).exists() for name in names):
        make_fleet(str(STORE), models)
    row_bytes = build_family("tcn", CONFIG).row_floats * 4
    flags = ["--slab-bytes", str(row_bytes), "--model-cache-bytes", str(resident * row_bytes)]
    what = f"{models} models, room for {resident}, {_format_workers(workers)}"
    asked = replace(questions, names=names).of(str(STORE), console)
    spoken = list_dialect_flags(questions.dialect)
    with run_local_server(str(STORE), ["--workers", str(workers), *flags, *spoken]) as server:
        yield _describe_local(server, asked, what, questions.dialect)


@contextmanager
def serve_store(
    store: str, cache: str | None, workers: int, questions: RequestSource, console: Console, more: Sequence[str] = ()
) -> Iterator[ServerUnderLoad]:
    """Start a server for the archives of a store, with `more` of its flags."""
    asked = questions.of(store, console)
    room = [] if cache is None else ["--model-cache-bytes", cache]
    what = (
        f"{len(asked)} models of {store}, {cache or 'all the room there is'} for the cache, {_format_workers(workers)}"
    )
    spoken = list_dialect_flags(questions.dialect)
    with run_local_server(store, ["--workers", str(workers), *room, *spoken, *more]) as server:
        yield _describe_local(server, asked, what, questions.dialect)


def list_dialect_flags(dialect: str) -> list[str]:
    """The flags of a server that is started to be asked in this dialect."""
    return {
        "container": ["--container", "multi-model"],
        "mms": ["--model-server-api", "mms"],
        "grpc": ["--grpc-port", "0"],
    }.get(dialect, [])


def _describe_local(
    server: LocalServer, asked: Mapping[ModelName, RequestBody], what: str, dialect: str
) -> ServerUnderLoad:
    memory = partial(measure_memory, server)
    address = name_by_http(server.grpc) if DIALECTS[dialect].is_grpc else server.inference
    return ServerUnderLoad(address, server.metrics, asked, what, memory, management=server.management)


def name_by_http(url: str) -> str:
    """The address of a gRPC listener, as a server announces it (grpc://, grpcs://), in the form of the others."""
    scheme, mark, rest = url.partition("://")
    return {"grpc": "http", "grpcs": "https"}.get(scheme, scheme) + mark + rest


def _format_workers(count: int) -> str:
    return f"{count} worker{'s' * (count > 1)}"


def connect_server(
    url: str,
    metrics_url: str | None,
    store: str | None,
    questions: RequestSource,
    console: Console,
    access: ServerAccess = OPEN,
    management_url: str | None = None,
) -> ServerUnderLoad:
    """Connect to a running server. Raises ValueError for files of `access` that are wrong, or not for its addresses."""
    url = name_by_http(url)
    for address in filter(None, (url, metrics_url, management_url)):
        access.check_url(address)
    asked = questions.of(store, console)
    return ServerUnderLoad(url, metrics_url, asked, f"{len(asked)} models at {url}", None, access, management_url)


def measure_memory(server: LocalServer) -> dict[str, int]:
    """Return process -> proportional set size in bytes."""
    return {f"{each['kind']} {each['index']}": read_pss(each["pid"]) for each in server.processes()}


# --- runs -----------------------------------------------------------------------------------------------------------


def measure_run(
    subject: ServerUnderLoad, plan: RunPlan, to: LoadTarget, console: Console
) -> tuple[summary.Results, Run]:
    """Run a warm-up that is not measured, then the load. Raises ValueError for an impossible load, DriverLost."""
    schedule = plan.load.schedule(plan.seconds)
    size = plan.processes or count_drivers(schedule)
    watch = subject.watch()
    with DriverPool(to, size, connections=plan.connections) as pool, follow_tasks(console) as tasks:
        if plan.warmup:
            _drive_load(pool, plan.load.schedule(plan.warmup, WARMUP), tasks, "warm-up, seconds", lambda _: None)
        watch.look(0.0)
        run = _drive_load(pool, schedule, tasks, "load, seconds", partial(_sample_if_possible, watch))
        _sample_if_possible(watch, run.ended)
    return {**summary.summarize_run(run, watch, plan.slo, DIALECTS[plan.dialect].statuses), "processes": size}, run


def climb_rates(
    subject: ServerUnderLoad, plan: RunPlan, to: LoadTarget, rates: Sequence[float], console: Console
) -> tuple[summary.Results, Run]:
    """Run one rate after another until one is not sustained. Returns the last sustained run, else the first one.

    A step is sustained if its run is valid, nearly all requests are answered, next to none fail and the SLO is met.
    The results have a table of all steps. Raises as `measure_run` does.
    """
    load = plan.load
    if not isinstance(load, Profile):
        message = "a ramp is of rates, so the profile must be poisson, constant or diurnal"
        raise ValueError(message)  # noqa: TRY004 -- a wrong flag
    best: tuple[summary.Results, Run] | None = None
    steps = []
    for rate in rates:
        found, run = measure_run(subject, replace(plan, load=replace(load, rate=rate)), to, console)
        why = _explain_overload(found)
        latency = found["latency"]["all"]
        steps.append(
            {
                "rate": rate,
                "answered_per_s": found["answered_per_s"],
                "p50_ms": latency["p50_ms"],
                "p99_ms": latency["p99_ms"],
                "failed": sum(found["failures"].values()),
                "sustained": not why,
                "why": why,
            }
        )
        console.print(
            f"{rate:8.0f}/s asked, {found['answered_per_s']:8.0f}/s answered, p50 {latency['p50_ms']:.2f} ms, "
            f"p99 {latency['p99_ms']:.2f} ms{f': too much, {why}' if why else ''}"
        )
        best = (found, run) if best is None or not why else best
        plan = replace(plan, warmup=min(plan.warmup, 1.0))  # the models are loaded; the next rate only settles
        if why:
            break
    assert best is not None, "a ramp has at least one rate"
    return {**best[0], "steps": steps}, best[1]


def _explain_overload(found: summary.Results) -> str:
    """Explain why a step is not sustained; empty if it is."""
    due, failed = found["requests"] / found["seconds"], sum(found["failures"].values())
    if (forecasts := found["forecasts"]) is not None and forecasts["failed"] > FAILED * forecasts["asked"]:
        return f"{forecasts['failed']} forecasts failed"
    if found["invalid"]:
        return f"the run is invalid: {found['invalid'][0]}"
    if failed > FAILED * found["requests"]:
        return f"{failed} requests failed"
    checks = (found["slo"] or {"checks": []})["checks"]
    missed = ", ".join(f"{check['what']} {check['found']}" for check in checks if not check["met"])
    return missed or ("answers fell behind" if found["answered_per_s"] < SUSTAINED * due else "")


def _sample_if_possible(watch: MetricsSampler, t: float) -> None:
    """Take a sample if the server answers; if it is gone, the requests show that."""
    with suppress(urllib3.exceptions.HTTPError, OSError, RuntimeError):
        watch.look(t)


def _drive_load(pool: DriverPool, schedule: Schedule, tasks: TaskList, what: str, look: Callable[[float], None]) -> Run:
    task = tasks.start_task(what, round(schedule.seconds, 1))

    def seen(t: float) -> None:
        look(t)
        task.update(round(min(t, schedule.seconds), 1))

    return pool.drive(schedule, look=seen)


def parse_names(text: str) -> list[ModelName]:
    """Parse names, one per line; blank lines are ignored. Raises InvalidModelName."""
    return [parse_model_name(line.strip()) for line in text.splitlines() if line.strip()]
