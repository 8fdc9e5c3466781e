"""The flags of `fleetcast-load run`, and what follows from them alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from loadtest import flags
from loadtest.driver.call_encodings import Encoding
from loadtest.driver.dialects import DIALECTS, BodyKind
from loadtest.driver.profiles import Shape, make_profile
from loadtest.driver.request_bodies import RequestBody
from loadtest.driver.run import RequestSource, parse_names
from loadtest.driver.summary import Slo
from loadtest.driver.trace import Trace, read_trace
from loadtest.flags import LOAD, OUTPUT, SERVER, SLO, make_flag
from loadtest.observe.server_access import OPEN, ServerAccess, open_access
from model_store.names import ModelName
from server.contract import JSON

SHAPES = "; ".join(f"{shape}: {shape.about}" for shape in Shape)
#: Fields that a profile takes under the same names, where they are given.
PROFILE_SETTINGS = (
    "rate", "zipf", "drift_s", "drift_share", "day_s", "trough", "every_s", "spread_s", "shuffled", "newcomers", "at_s",
    "speed", "start_s",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFlags:
    """One field a flag, in the order of the help."""

    profile: Annotated[Shape, make_flag(LOAD, SHAPES)] = Shape.POISSON
    rate: flags.Rate = None
    seconds: Annotated[float, make_flag(LOAD, "duration of the measured load")] = 15.0
    warmup: Annotated[
        float | None, make_flag(LOAD, "seconds of unmeasured load before; default 5, before a replay 0")
    ] = None
    zipf: flags.Zipf = None
    drift_s: flags.Drift = None
    drift_share: Annotated[float | None, make_flag(LOAD, "share of the models that exchange ranks; default 0.1")] = None
    day_s: Annotated[float | None, make_flag(LOAD, "diurnal: length of a day in seconds; default 60")] = None
    trough: Annotated[float | None, make_flag(LOAD, "diurnal: lowest rate as a share of the highest; default 0.2")] = (
        None
    )
    every_s: flags.TickInterval = None
    spread_s: flags.TickSpread = None
    shuffled: flags.Shuffled = None
    newcomers: Annotated[int | None, make_flag(LOAD, "onboarding: number of new models; default 100")] = None
    at_s: Annotated[float | None, make_flag(LOAD, "onboarding: second at which they appear; default 5")] = None
    trace: Annotated[
        Path | None, make_flag(LOAD, "replay: a trace file, or the folder of an access log", exists=True)
    ] = None
    speed: Annotated[float | None, make_flag(LOAD, "replay: speed factor; default 1")] = None
    start_s: Annotated[
        float | None, make_flag(LOAD, "replay: second of the trace to start from; default its first")
    ] = None
    ramp_to: Annotated[
        float | None, make_flag(LOAD, "raise the rate from --rate to this, until one is not sustained")
    ] = None
    ramp_factor: Annotated[float, make_flag(LOAD, "factor between successive rates of a ramp")] = 1.5
    seed: Annotated[int, make_flag(LOAD, "same seed, same schedule", min=0)] = 0
    connections: Annotated[int, make_flag(LOAD, "maximum number of connections, opened when needed", min=1)] = 512
    processes: Annotated[int | None, make_flag(LOAD, "driver processes; default as many as the rate needs", min=1)] = (
        None
    )
    store: Annotated[
        str | None, make_flag(SERVER, "folder or URL of archives; without --url a server is started for it")
    ] = None
    url: Annotated[str | None, make_flag(SERVER, "inference address of a server that runs")] = None
    metrics_url: Annotated[str | None, make_flag(SERVER, "its metrics address: hits, loads and evictions")] = None
    management_url: Annotated[str | None, make_flag(SERVER, "its management address, for --versions")] = None
    ca: flags.Ca = None
    client_cert: flags.ClientCert = None
    client_key: flags.ClientKey = None
    token_file: flags.TokenFile = None
    per_call: Annotated[int | None, make_flag(SERVER, "dialect forecasts: models per call; default all", min=1)] = None
    encoding: Annotated[
        Encoding, make_flag(SERVER, "dialect forecasts: how calls and answers are written; arrow needs pyarrow")
    ] = Encoding.JSON
    names: Annotated[
        Path | None,
        make_flag(SERVER, "file of model names, one per line, instead of the store's", exists=True, dir_okay=False),
    ] = None
    dialect: Annotated[
        str, make_flag(SERVER, "protocol of the server: " + ", ".join(DIALECTS), "--protocol", "--dialect")
    ] = "sagemaker"
    versions: Annotated[
        bool,
        make_flag(
            SERVER, "protocol torchserve: register each model, and name its version in each request", "--versions"
        ),
    ] = False
    allow_code: Annotated[
        list[str] | None,
        make_flag(SERVER, "with --store: beginnings of keys whose code may run, as of the server (repeatable)"),
    ] = None
    body: Annotated[
        BodyKind | None, make_flag(SERVER, "kind of request body; default each archive's golden sample")
    ] = None
    request: Annotated[
        Path | None, make_flag(SERVER, "file with one request body for all models", exists=True, dir_okay=False)
    ] = None
    content_type: Annotated[str, make_flag(SERVER, "content type of the body of --request")] = JSON
    models: Annotated[
        int, make_flag(SERVER, "size of the fleet that is made; of a store, maximum number of models", min=1)
    ] = 200
    resident: Annotated[int, make_flag(SERVER, "made fleet: number of models that fit in the cache", min=1)] = 50
    cache: Annotated[str | None, make_flag(SERVER, "with --store: size of the model cache, such as 256MiB")] = None
    workers: Annotated[int, make_flag(SERVER, "started server: number of worker processes", min=1)] = 1
    allow_remote: flags.AllowRemote = False
    p50_ms: Annotated[float | None, make_flag(SLO, "maximum median latency")] = None
    p99_ms: flags.MostP99 = None
    failed: Annotated[float | None, make_flag(SLO, "maximum share of failed requests")] = None
    hit_ratio: flags.LeastHitRatio = None
    out: Annotated[Path | None, make_flag(OUTPUT, "write the results as JSON")] = None
    html: Annotated[Path | None, make_flag(OUTPUT, "write a report for the browser")] = None
    trace_out: Annotated[Path | None, make_flag(OUTPUT, "write the requests and their outcomes as a trace")] = None
    keep: Annotated[bool, make_flag(OUTPUT, "save a record under loadtest/records", "--record")] = False

    def check(self) -> None:
        """Raises ValueError for flags that do not go together, before anything is made or started."""
        if self.profile is not Shape.REPLAY:
            make_profile(self.profile, self.models, self.seed, **self.profile_settings)
        if self.dialect not in DIALECTS:
            raise ValueError(f"there is no dialect {self.dialect!r}: known dialects are {', '.join(DIALECTS)}")
        if self.encoding is not Encoding.JSON and not self.many:
            raise ValueError(f"--encoding {self.encoding} is of calls for many models: --protocol forecasts")
        self.encoding.check()
        if self.is_grpc and find_spec("grpc") is None:
            raise ValueError("--protocol grpc needs grpcio: pip install 'fleetcast[grpc]'")
        if self.versions and self.dialect != "torchserve":
            raise ValueError("--versions is for the protocol torchserve, whose clients register models with versions")
        if self.allow_code and (self.store is None or self.url is not None):
            raise ValueError("--allow-code is of a server that is started for --store")
        if self.management_url is not None and (self.url is None or not self.versions):
            raise ValueError("--management-url is of the server at --url, for --versions")
        if self.many and (self.trace is not None or self.trace_out is not None):
            raise ValueError(
                "a trace has a row for each model, so --trace and --trace-out do not go with calls for many models"
            )
        if self.url is None and (self.ca or self.client_cert or self.client_key or self.token_file):
            raise ValueError("--ca, --client-cert, --client-key and --token-file are for the server at --url")

    @property
    def is_grpc(self) -> bool:
        """Whether requests are calls of gRPC."""
        return DIALECTS[self.dialect].is_grpc

    @property
    def many(self) -> bool:
        """Whether a request is a call for many models."""
        return DIALECTS[self.dialect].many

    @property
    def body_kind(self) -> BodyKind | None:
        """The kind of the requests' bodies; None for each archive's golden sample."""
        return BodyKind.DEEPAR if self.many and self.body is None else self.body

    @property
    def warmup_seconds(self) -> float:
        """A replay from its start needs no load before: the recording has it."""
        if self.warmup is not None:
            return self.warmup
        return 0.0 if self.profile is Shape.REPLAY and not self.start_s else 5.0

    @property
    def profile_settings(self) -> Mapping[str, Any]:
        """What the profile is to differ in from its defaults."""
        given = {name: getattr(self, name) for name in PROFILE_SETTINGS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def slo(self) -> Slo:
        """What must be reached."""
        return Slo(self.p50_ms, self.p99_ms, self.failed, self.hit_ratio)

    def read_recording(self) -> Trace | None:
        """The trace that is replayed. Raises ValueError, OSError."""
        return None if self.trace is None else read_trace(self.trace)

    def make_source(self, recorded: Trace | None) -> RequestSource:
        """Where requests come from. Raises ValueError, OSError."""
        body = RequestBody(self.request.read_bytes(), self.content_type) if self.request else None
        return RequestSource(self._choose_fleet(recorded), self.models, self.body_kind, body, self.seed, self.dialect)

    def open_access(self) -> ServerAccess:
        """How the server at `url` is spoken to. Raises ValueError, OSError."""
        return open_access(self.ca, self.client_cert, self.client_key, self.token_file) if self.url else OPEN

    def describe(self) -> str:
        """The load in one line."""
        given = self.profile_settings.items()
        said = ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {value:g}" for name, value in given)
        until = f" up to {self.ramp_to:g}/s" if self.ramp_to else ""
        return f"{self.profile}{until} for {self.seconds:g} s{', ' if said else ''}{said}, seed {self.seed}"

    def _choose_fleet(self, recorded: Trace | None) -> Sequence[ModelName] | None:
        if recorded is not None:
            return recorded.names
        return None if self.names is None else parse_names(self.names.read_text())
