"""Every setting of the server, defined once. Pure.

A field's name gives the flag (`--inference-port`), the environment variable (`FLEETCAST_INFERENCE_PORT`) and the key in
`fleetcast.toml` (`inference_port`); its description is the help text. Flags override variables, variables override the
file, the file overrides the defaults.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from pydantic import BaseModel, ByteSize, Field, SecretStr, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from server import contract
from server.sagemaker_container.environment import find_model_folder, read_sagemaker_environment

TOML_FILE = "fleetcast.toml"
MIB = contract.MIB

#: What a model of `register_models` may say.
_REGISTERED_BY = frozenset(
    {
        "url", "model_name", "model_version", "handler", "runtime", "initial_workers", "batch_size", "max_batch_delay",
        "response_timeout", "startup_timeout", "default_version",
    }
)  # fmt: skip

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]


def _to_byte_size(size: int) -> ByteSize:
    return ByteSize(size)


class SageMakerSource(PydanticBaseSettingsSource):
    """What the variables of a SageMaker container say, where nothing else does."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """A field's value: `__call__` has them all at once."""
        del field
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """See `server.sagemaker_container.environment`."""
        has_model = find_model_folder(os.environ).is_dir()
        return read_sagemaker_environment(os.environ, self.current_state, has_model=has_model)


class Settings(BaseSettings):
    """What an operator can configure. Sizes take units (`512MiB`), times are in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="FLEETCAST_", toml_file=TOML_FILE, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    store: str = Field(description="location of the archives: s3://bucket/prefix, gs://, az:// or a local folder")
    host: str = Field(
        "127.0.0.1", description="address of the inference listener; other hosts can connect unless it is loopback"
    )
    inference_host: str | None = Field(None, description="address of the inference listener; none: `host`")
    management_host: str | None = Field(
        None,
        description="address of the management listener; none: `host` if that is loopback, else 127.0.0.1; one that "
        "other hosts reach needs `tokens` with the scope manage, or `tls_client_ca`",
    )
    metrics_host: str | None = Field(
        None,
        description="address of the metrics listener; none: `host` if that is loopback, else 127.0.0.1; one that other "
        "hosts reach needs `tokens` with the scope metrics, or `tls_client_ca`",
    )
    inference_port: Port = Field(contract.INFERENCE_PORT, description="port of the inference listener; 0: a free port")
    management_port: Port = Field(
        contract.MANAGEMENT_PORT, description="port of the management listener (/fleet); 0: a free port"
    )
    metrics_port: Port = Field(
        contract.METRICS_PORT, description="port of the metrics listener (/metrics); 0: a free port"
    )

    grpc_port: Port | None = Field(
        None,
        description=f"port of the gRPC listener, by custom {contract.GRPC_PORT}; 0: a free port; none: no gRPC; needs "
        "`fleetcast[grpc]`",
    )
    grpc_management_port: Port | None = Field(
        None,
        description="port of TorchServe's management service over gRPC, at the management listener's address and by "
        f"custom {contract.GRPC_MANAGEMENT_PORT}; 0: a free port; none: there is none; needs `fleetcast[grpc]`",
    )
    grpc_host: str = Field(
        "127.0.0.1", description="address of the gRPC listener; other hosts can connect unless it is loopback"
    )
    container: Literal["off", "multi-model", "single-model"] = Field(
        "off",
        description="what SageMaker asks of a container, on the inference port alone: multi-model loads and unloads "
        "folders and archives below the store (`/models`); single-model answers for the store, which is one archive "
        "and may be unpacked; without a store SageMaker's variables decide",
    )

    workers: int = Field(
        0, ge=0, le=256, description="number of worker processes; 0: one per GPU, or on the CPU one per core but one"
    )
    workers_per_device: int = Field(1, ge=1, le=16, description="workers per GPU if `workers` is 0")
    fronts: int = Field(1, ge=1, le=64, description="number of HTTP front processes that share the inference port")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPUs if there are any, else the CPU")
    threads: int = Field(0, ge=0, le=256, description="compute threads per worker; 0: the worker's share of the cores")

    model_cache_bytes: ByteSize = Field(
        _to_byte_size(0),
        description="memory for resident models on this host, all workers together; 0: 40 % of the host's memory, or "
        "on GPUs an equal share of theirs less 512 MiB for CUDA and `gpu_reserve_bytes`",
    )
    keep_rows: Literal["on", "off"] = Field(
        "on",
        description="on: rows of resident models on the CPU lie in memory that outlives their worker, so that the next "
        "one takes them back without loading; off: they end with it",
    )
    spare_worker: Literal["on", "off"] = Field(
        "on",
        description="on: one process is started ahead of the death of a worker on the CPU, so that another takes its "
        "place at once; it takes about the memory of a worker without models",
    )
    gpu_reserve_bytes: ByteSize = Field(
        _to_byte_size(contract.GPU_RESERVE_BYTES),
        description="memory of a GPU that each of its workers leaves to forward passes, ONNX models and other programs",
    )
    host_cache_bytes: ByteSize | None = Field(
        None,
        description="page-locked host memory for models evicted from GPUs, all workers together; none: a tenth of the "
        "host's memory, at most 4 GiB; a worker's part is rounded down to a power of two; on the CPU nothing, because "
        "model_cache_bytes serves better there",
    )
    precision: Literal["float32", "tf32", "bf16"] = Field(
        "float32",
        description="precision of forward passes on GPUs; float32 is exact; golden samples must pass at this precision",
    )
    slab_bytes: ByteSize = Field(
        _to_byte_size(contract.SLAB_BYTES),
        ge=65536,
        description="allocation unit of the model cache; one model's row must fit in a slab",
    )
    eviction_policy: Literal["lru", "sieve", "s3fifo", "lfu", "due"] = Field(
        contract.EVICTION_POLICY,
        description="eviction policy: lru evicts the least recently used model; lfu the least frequently used; due the "
        "model whose predicted next request is furthest away, for fleets queried on a schedule; sieve and s3fifo "
        "resist scans",
    )
    max_batch_rows: int = Field(
        contract.MAX_BATCH_ROWS, ge=1, le=4096, description="maximum rows per batch (one forward pass)"
    )
    prefetch: Literal["on", "off"] = Field(
        "on",
        description="on: learn which models are requested on a schedule, and load those that are not resident shortly "
        "before their next request",
    )
    loader_threads: int = Field(
        contract.LOADER_THREADS,
        ge=1,
        le=64,
        description="models that one worker builds and verifies concurrently; it fetches as many at the same time "
        "while archives are large, and up to twice as many more while the store is slow",
    )
    store_requests: int = Field(
        0,
        ge=0,
        le=256,
        description="requests that one worker has at the store at a time while it answers within a second and archives "
        "are small (64 MiB together); 0: eight for each of `loader_threads`",
    )

    disk_cache: Path = Field(
        Path("~/.cache/fleetcast"),
        validate_default=True,
        description="folder for verified archives, shared by the workers of a host",
    )
    disk_cache_bytes: ByteSize = Field(
        _to_byte_size(10 * 1024 * MIB), description="maximum size of the disk cache; 0 disables it"
    )
    revalidate_s: Seconds = Field(
        contract.REVALIDATE_S,
        description="how long a cached archive is used before the store is asked for changes; longer only while the "
        "store is slow or out",
    )

    watch_store: Literal["on", "off"] = Field(
        "on",
        description="on: compare resident models with the store every half `revalidate_s`, and replace those that have "
        "changed",
    )

    s3_endpoint_url: str | None = Field(
        None, description="endpoint URL of an S3-compatible store; none: boto3's configuration decides"
    )
    s3_region: str | None = Field(None, description="region of the store; none: boto3's configuration decides")
    s3_profile: str | None = Field(None, description="profile of the shared AWS configuration")
    store_timeout_s: Seconds = Field(10.0, description="time-out of one store request")
    store_retries: int = Field(3, ge=0, le=20, description="retries of a failed store request, with jittered back-off")
    max_archive_bytes: ByteSize = Field(
        _to_byte_size(2048 * MIB), description="maximum size of an archive; larger archives are refused"
    )
    max_unpacked_bytes: ByteSize = Field(
        _to_byte_size(4096 * MIB), description="maximum unpacked size of an archive; larger archives are refused"
    )

    max_body_bytes: ByteSize = Field(
        _to_byte_size(contract.MAX_BODY_BYTES),
        description="maximum size of a request body; larger bodies are answered with 413",
    )
    max_forecasts_bytes: ByteSize = Field(
        _to_byte_size(contract.MAX_FORECASTS_BYTES),
        description="maximum size of the body of a request for many models, and of the response to it",
    )
    max_inflight_bytes: ByteSize = Field(
        _to_byte_size(256 * MIB),
        description="maximum bytes of request bodies and answers held by one front; above it: `overload_status`",
    )
    max_request_gflop: float = Field(
        contract.MAX_REQUEST_GFLOP,
        gt=0,
        description="maximum work of one request in thousand million floating-point operations, estimated before it "
        "runs; larger requests are answered with 400",
    )
    max_request_numbers: int = Field(
        contract.MAX_REQUEST_NUMBERS,
        ge=1,
        description="maximum numbers that the instances of one request take as inputs and answers of the network, 4 "
        "bytes each; larger requests are answered with 400",
    )
    max_session_bytes: ByteSize = Field(
        _to_byte_size(contract.MAX_SESSION_BYTES),
        ge=MIB,
        description="memory for the intermediate results of all ONNX models of one worker; a run that needs more fails",
    )
    max_forward_s: Seconds = Field(
        contract.MAX_FORWARD_S, description="maximum time of one run of an ONNX model; a longer run is ended and fails"
    )
    onnx_control_flow: Literal["refuse", "allow"] = Field(
        "refuse",
        description="ONNX models with loops (Loop, Scan, SequenceMap): their time does not follow from their size",
    )
    onnx_device: Literal["auto", "cpu", "device"] = Field(
        "auto",
        description="where ONNX models run if workers have a GPU; auto: on the CPU if it answers a row of the model "
        "within 2 ms, else on the GPU; device: on the GPU",
    )
    model_server_api: Literal["torchserve", "mms"] = Field(
        "torchserve",
        description="which server's protocol the listeners speak on paths that both have, such as `/predictions` and "
        "`/models`; mms: Multi Model Server's",
    )
    default_workers_per_model: int = Field(
        0,
        ge=0,
        le=64,
        description="workers of a model that Multi Model Server's management API registers without a number: with 0 it "
        "answers nothing until it is scaled; in a SageMaker container 1 by default",
    )
    allow_code: list[str] = Field(
        default_factory=list,
        description="beginnings of the keys of archives whose Python code may run, each archive's in a process of its "
        "own, such as `team-a/`; `*`: all keys; none: no archive's",
    )
    code_memory_bytes: ByteSize = Field(
        _to_byte_size(1024 * MIB),
        ge=16 * MIB,
        description="maximum memory of the processes of one replica of a code archive; it counts as measured in "
        "`model_cache_bytes`",
    )
    code_timeout_s: Seconds = Field(
        60.0,
        description="maximum time in which the code of an archive loads, or answers a batch; a process that takes "
        "longer is ended",
    )
    code_device: Literal["cpu", "device"] = Field(
        "cpu",
        description="where handlers run if workers have a GPU; device: each handler is given its worker's GPU as "
        "`gpu_id` 0. What it takes of the GPU's memory is not counted: leave room by `gpu_reserve_bytes`",
    )
    repository_control: Literal["off", "on"] = Field(
        "off",
        description="on: clients of the inference listener may load and unload models by the Open Inference Protocol; "
        "with `tokens` those with the scopes invoke and manage may, whatever this says, and others may not",
    )
    code_requirements: Literal["refuse", "install"] = Field(
        "refuse",
        description="archives with a requirements.txt; install: their packages are installed into a folder of the "
        "archive's own each time that it is loaded, from wheels alone, by the pip of the server's Python",
    )
    code_install_s: Seconds = Field(
        300.0, description="maximum time in which the packages of a code archive are installed"
    )
    code_program: str = Field(
        "inference.py",
        pattern=r"[A-Za-z0-9_][A-Za-z0-9_./-]*\.py",
        description="the script that archives of SageMaker's toolkits run, in their folder `code` (SAGEMAKER_PROGRAM)",
    )
    code_envelope: str = Field(
        "",
        pattern=r"([A-Za-z_][A-Za-z0-9_]*)?",
        description="TorchServe's service_envelope for archives that name none: body, json, kserve or kservev2 takes "
        "the requests' values out of their bodies before a handler gets them, and wraps its answers",
    )
    code_metrics: Path | None = Field(
        None,
        description="TorchServe's metrics.yaml: handlers find its `model_metrics` by `context.metrics.get_metric`; at "
        "most 16 KiB",
    )
    code_disk_bytes: ByteSize = Field(
        _to_byte_size(4096 * MIB),
        ge=16 * MIB,
        description="maximum size of the folder of one replica of a code archive: its files, its packages and what its "
        "code writes",
    )
    code_replicas: int = Field(
        4,
        ge=1,
        le=64,
        description="maximum number of replicas of one code archive on a worker, each a process that answers a batch "
        "at a time; clients ask for them as workers of a registered model, and more are not started",
    )
    code_processes: int = Field(
        64,
        ge=4,
        description="maximum number of processes and threads of one replica of a code archive, its own process among "
        "them",
    )
    queue_per_model: int = Field(
        contract.QUEUE_PER_MODEL, ge=1, description="maximum queued requests per model; above it: `overload_status`"
    )
    queue_per_worker: int = Field(
        contract.QUEUE_PER_WORKER, ge=1, description="maximum queued requests per worker; above it: `overload_status`"
    )
    default_model: str = Field(
        "", description="model of requests of MLflow's and Nixtla's clients that name none; empty: they are refused"
    )
    async_output: str = Field(
        "",
        description="location of the answers to SageMaker's asynchronous invocations, s3://bucket/prefix, below which "
        "their inputs lie too; apart from `store`; empty: such requests are answered with 400",
    )
    async_jobs: int = Field(
        1024,
        ge=1,
        le=10_000,
        description="maximum asynchronous invocations under way; above it: `overload_status`",
    )
    async_jobs_per_client: int = Field(
        256,
        ge=1,
        le=10_000,
        description="maximum of these of one client, by its token, key or certificate; above it: `overload_status`",
    )
    overload_status: Literal[503, 429] = Field(503, description="status code of the response when a queue is full")
    request_timeout_s: Seconds = Field(
        contract.REQUEST_TIMEOUT_S, description="default and maximum deadline of a request"
    )
    client_timeout_s: Seconds = Field(
        30.0, description="maximum time for a client to send a request body or to receive a response"
    )
    keep_alive_s: int = Field(
        75, ge=1, description="maximum idle time of a connection; longer than the 60 s of common load balancers"
    )
    tokens: Path | None = Field(
        None,
        description="TOML file of the tokens that clients must send, made by `fleetcast token`; none: none is asked",
    )
    access_keys_file: Path | None = Field(
        None,
        description='TOML file of access keys, a line KEY = "SECRET" each; if there are any, every request must be '
        "signed (SigV4) with one, or bring one of the `tokens`",
    )
    access_keys: dict[str, SecretStr] = Field(
        default_factory=dict,
        description="access keys beside those of `access_keys_file`; the flag shows the secrets to all users of the "
        "host (`ps`): prefer the file",
    )
    access_region: str | None = Field(
        None, description="region that signatures must name, such as `eu-central-1`; none: any"
    )
    tls_certificate: Path | None = Field(
        None, description="PEM file of the certificate by which all listeners speak TLS; none: plain HTTP"
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's key; none: it is in the same file")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file of the authority whose certificates all clients must show (mutual TLS); none: clients "
        "need no certificate",
    )
    allowed_hosts: list[str] = Field(
        default_factory=list,
        description="names, beside localhost and the addresses, by which clients call the management and metrics "
        "listeners (the header Host)",
    )

    register_models: list[str] = Field(
        default_factory=list,
        description="models that are registered at the start, as load_models of TorchServe does: each the query of a "
        "`POST /models`, such as `url=prices.mar&model_name=p&initial_workers=2&default_version=true`",
    )
    pin: list[str] = Field(default_factory=list, description="models that are loaded at start and never evicted")
    metrics_per_model: int = Field(
        0, ge=0, description="maximum number of models per worker that have metric series of their own; 0: none"
    )
    access_log: Path | None = Field(
        None,
        description="folder for a log of all requests (time, model, bytes, outcome), which `fleetcast-load` can "
        "replay; none: no log",
    )
    access_log_bytes: ByteSize = Field(
        _to_byte_size(256 * MIB),
        ge=MIB,
        description="maximum size of the access log; older parts are compressed, the oldest are deleted",
    )
    otlp_endpoint: str | None = Field(
        None,
        description="URL of an OpenTelemetry collector (OTLP over HTTP), such as http://localhost:4318, to which "
        "traces of sampled requests are sent: names, times and errors, no bodies; none: "
        "OTEL_EXPORTER_OTLP_ENDPOINT says, and without it nothing is traced; needs `fleetcast[otel]`",
    )
    trace_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the requests without a trace of their own that are traced; a client's `traceparent` "
        "decides for its request; none: OTEL_TRACES_SAMPLER says, and without it all are",
    )
    traces_per_s: float = Field(
        20.0,
        gt=0,
        le=10_000,
        description="maximum traces a second of one front, whatever clients and samplers ask; further requests are not "
        "traced",
    )
    actuals: Path | None = Field(
        None,
        description="folder in which the server keeps what it forecast and the prices that clients send to "
        f"`{contract.ACTUALS_PATH}`, to adapt bands and watch their coverage; none: it takes no prices",
    )
    adaptive_bands: Literal["on", "off"] = Field(
        "on", description="off: prices that are sent are scored, but change no forecast"
    )
    actuals_models: int = Field(
        1000,
        ge=1,
        le=10_000,
        description="maximum number of archives of which forecasts and prices are kept; each product of several counts",
    )
    actuals_metrics: int = Field(
        50,
        ge=0,
        le=1000,
        description="maximum number of archives, or products of several, with series of coverage and drift of their "
        "own; the rest is `other`",
    )
    node_name: str = Field(
        "",
        max_length=100,
        pattern=r"([A-Za-z0-9][A-Za-z0-9_.:/-]*)?",
        description="name of this server among the nodes of a cluster, which decides the models that it owns; a label "
        "`node` of all metrics; empty: it serves alone",
    )
    nodes_file: Path | None = Field(
        None,
        description='JSON file of the nodes that share the models, {"nodes": [{"name": ..., "address": "HOST:PORT"}]}; '
        "changes are followed, and a file that is missing changes nothing",
    )
    node_key_file: Path | None = Field(
        None, description="file of the secret, of 16 bytes or more, by which the nodes of a cluster know each other"
    )
    node_host: str = Field(
        "127.0.0.1", description="address at which other nodes reach this one; without TLS in a trusted network only"
    )
    node_port: Port = Field(0, description="port for other nodes; 0: a free port")
    announce: Path | None = Field(
        None, description="file to which the addresses of the listeners are written as JSON when the server is ready"
    )
    drain_s: Seconds = Field(
        25.0,
        description="maximum time for running requests to finish after SIGTERM; all processes are gone 4 s later",
    )
    worker_timeout_s: Seconds = Field(
        5.0,
        description="a worker whose step loop makes no turn for this long is ended and started again; after one second "
        "its requests go to other workers",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="minimum level of log messages")
    log_format: Literal["auto", "text", "json"] = Field("auto", description="auto: text on a terminal, else JSON lines")

    @field_validator("async_output")
    @classmethod
    def _is_apart_from_the_store(cls, url: str, info: ValidationInfo) -> str:
        """INVARIANT: no client writes where archives lie, whatever it names its answer."""
        if not url:
            return url
        if re.fullmatch(r"s3://[^/@?#]+(?:/[^@?#]*)?", url) is None:
            raise ValueError("it must be s3://bucket or s3://bucket/prefix, without credentials or a query")
        output, store = _split_location(url), _split_location(str(info.data.get("store", "")))
        shared = min(len(output), len(store))
        if output[:shared] == store[:shared]:
            raise ValueError("it must not be within `store`, nor hold it: clients choose what is written there")
        return url.rstrip("/")

    @field_validator("register_models")
    @classmethod
    def _are_registrations(cls, queries: list[str]) -> list[str]:
        """What each says is checked when it is registered; what it may say is checked here."""
        for query in queries:
            given = dict(parse_qsl(query, keep_blank_values=True))
            if "url" not in given:
                raise ValueError(f"{query[:80]!r} names no archive: write url=KEY, and further parameters behind &")
            if unknown := sorted(given.keys() - _REGISTERED_BY):
                known = ", ".join(sorted(_REGISTERED_BY))
                raise ValueError(f"{query[:80]!r} has no parameter {unknown[0][:80]!r}; there are {known}")
        return queries

    @field_validator("overload_status", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.isdigit() else value  # variables come as text

    @field_validator(
        "disk_cache",
        "access_log",
        "nodes_file",
        "node_key_file",
        "code_metrics",
        "actuals",
        "tokens",
        "access_keys_file",
        "tls_certificate",
        "tls_key",
        "tls_client_ca",
    )
    @classmethod
    def _home_is_known(cls, path: Path | None) -> Path | None:
        try:
            return path and path.expanduser()
        except RuntimeError as error:  # a user without an entry in /etc/passwd, and no HOME
            raise ValueError(f"{path} is in a home folder that is not known: set HOME, or give a whole path") from error

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources of settings, the one that wins first: flags, variables, file, SageMaker's variables."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls), SageMakerSource(settings_cls)

    def to_wire(self) -> dict[str, Any]:
        """The settings as plain values, secrets included, for a child process (`from_wire` there)."""
        keys = {key: secret.get_secret_value() for key, secret in self.access_keys.items()}
        return {**self.model_dump(mode="json"), "access_keys": keys}

    @classmethod
    def from_wire(cls, values: dict[str, Any]) -> "Settings":
        """The parent's settings, each of its own type. The child's environment and files are not read.

        Raises ValidationError (a ValueError) for values that are no settings.
        """
        settings = cls.__new__(cls)
        BaseModel.__init__(settings, **values)  # that of BaseSettings would read them
        return settings


def _split_location(url: str) -> list[str]:
    """The bucket of an s3:// URL and the segments of its prefix; for other stores a list that no bucket begins."""
    scheme, mark, place = url.partition("://")
    if not mark or scheme not in ("s3", "s3a"):
        return [""]
    return [segment for segment in place.split("/") if segment]


def format_bytes(size: int) -> str:
    """Bytes in the unit that people read: `6.0 MiB`; 0 is `0`."""
    return ByteSize(size).human_readable(separator=" ") if size else "0"
