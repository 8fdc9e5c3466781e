"""Every setting, once: its name is the flag, `FLEETCAST_` and the name in capitals the variable, and the key in
`fleetcast.toml`. Flags win over variables, variables over the file, the file over the defaults. Pure.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, Field, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

TOML_FILE = "fleetcast.toml"
MIB = 1024 * 1024

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]


def _bytes(size: int) -> ByteSize:
    return ByteSize(size)


class Settings(BaseSettings):
    """What an operator can choose. Sizes take units (`512MiB`), times are in seconds."""

    model_config = SettingsConfigDict(env_prefix="FLEETCAST_", toml_file=TOML_FILE, extra="forbid", frozen=True)

    store: str = Field(description="where the archives are: s3://bucket/prefix, gs://, az://, or a local folder")
    host: str = Field("127.0.0.1", description="address of all listeners; other than loopback only on purpose")
    inference_port: Port = Field(8080, description="port of the inference listener; 0 takes a free one")
    management_port: Port = Field(8081, description="port of the management listener (/fleet); 0 takes a free one")
    metrics_port: Port = Field(8082, description="port of the metrics listener (/metrics); 0 takes a free one")

    workers: int = Field(0, ge=0, le=256, description="worker processes; 0: one per GPU, on CPU one per core but one")
    workers_per_device: int = Field(1, ge=1, le=16, description="workers that share one GPU where `workers` is 0")
    fronts: int = Field(1, ge=1, le=64, description="HTTP front processes on the inference port")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where there are any, else the CPU")
    threads: int = Field(0, ge=0, le=256, description="compute threads of a worker; 0: its share of the cores")

    model_cache_bytes: ByteSize = Field(
        _bytes(0),
        description="memory for resident models on this host, all workers together; 0: 40 % of what is there, on GPUs "
        "what is free but `gpu_reserve_bytes`",
    )
    gpu_reserve_bytes: ByteSize = Field(
        _bytes(2048 * MIB), description="memory of each GPU that is left to forwards, CUDA itself and other programs"
    )
    host_cache_bytes: ByteSize | None = Field(
        None,
        description="page-locked host memory for models evicted from GPUs, all workers together; none: a tenth of the "
        "host's memory, at most 4 GiB, and nothing on CPU, where model_cache_bytes serves better",
    )
    precision: Literal["float32", "tf32", "bf16"] = Field(
        "float32", description="of forwards on GPUs: float32 is exact; golden samples must hold in what is chosen"
    )
    slab_bytes: ByteSize = Field(
        _bytes(4 * MIB), ge=65536, description="unit of that memory; a model's row fits in one"
    )
    eviction_policy: Literal["lru", "sieve", "s3fifo", "lfu", "due"] = Field(
        "lru",
        description="who goes when the cache is full: lru, the longest unused; due, who is expected back last by its "
        "own rhythm, for fleets that are asked by a clock; or sieve, s3fifo, lfu",
    )
    max_batch_rows: int = Field(512, ge=1, le=4096, description="rows of one forward at most")
    prefetch: Literal["on", "off"] = Field(
        "on",
        description="learn which models are asked by a clock, and load those that are not here shortly before they are",
    )
    loader_threads: int = Field(4, ge=1, le=64, description="models a worker fetches and verifies at the same time")

    disk_cache: Path = Field(
        Path("~/.cache/fleetcast"),
        validate_default=True,
        description="folder of verified archives, shared by the workers of a host",
    )
    disk_cache_bytes: ByteSize = Field(_bytes(10 * 1024 * MIB), description="its size at most; 0 switches the tier off")
    revalidate_s: Seconds = Field(60.0, description="how long a cached archive is served without asking the store")

    s3_endpoint_url: str | None = Field(
        None, description="endpoint of an S3-compatible store; else boto3's chain decides"
    )
    s3_region: str | None = Field(None, description="region; else boto3's chain decides")
    s3_profile: str | None = Field(None, description="profile of the shared AWS configuration")
    store_timeout_s: Seconds = Field(10.0, description="time-out of one store request")
    store_retries: int = Field(3, ge=0, le=20, description="retries of a failed store request, with jittered back-off")
    max_archive_bytes: ByteSize = Field(_bytes(2048 * MIB), description="an archive larger than this is refused")
    max_unpacked_bytes: ByteSize = Field(_bytes(4096 * MIB), description="... and one that unpacks to more than this")

    max_body_bytes: ByteSize = Field(_bytes(6 * MIB), description="a request body larger than this is answered 413")
    max_forecasts_bytes: ByteSize = Field(
        _bytes(64 * MIB), description="... and one that asks many models at once, and its answers together"
    )
    max_inflight_bytes: ByteSize = Field(_bytes(256 * MIB), description="request bytes a front holds at most; then 503")
    queue_per_model: int = Field(1024, ge=1, description="requests that wait for one model at most; then 503")
    queue_per_worker: int = Field(8192, ge=1, description="requests that wait in one worker at most; then 503")
    overload_status: Literal[503, 429] = Field(503, description="what a full queue is answered with")
    request_timeout_s: Seconds = Field(50.0, description="deadline of a request that names none; the longest allowed")
    client_timeout_s: Seconds = Field(30.0, description="how long a client may take to send its body or take an answer")
    keep_alive_s: int = Field(
        75, ge=1, description="how long an idle connection stays open; longer than a load balancer's 60 s in front"
    )
    access_keys: dict[str, str] = Field(
        default_factory=dict, description="access key -> secret; where given, requests must be signed (SigV4) with one"
    )
    access_region: str | None = Field(
        None, description="region that signatures must name, such as `eu-central-1`; none: any"
    )

    pin: list[str] = Field(default_factory=list, description="models loaded at start and never evicted")
    metrics_per_model: int = Field(0, ge=0, description="resident models with series of their own, per worker; 0: none")
    access_log: Path | None = Field(
        None,
        description="folder of a log of all requests (time, model, bytes, outcome), which `fleetcast-load` replays; "
        "none: no log",
    )
    access_log_bytes: ByteSize = Field(
        _bytes(256 * MIB), ge=MIB, description="its size at most: older parts are gzipped, the oldest go"
    )
    announce: Path | None = Field(None, description="file that gets the listeners' addresses as JSON once all is ready")
    drain_s: Seconds = Field(25.0, description="how long running requests may take to end after SIGTERM")
    worker_timeout_s: Seconds = Field(60.0, description="a worker silent for this long is killed and restarted")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least important level logged")
    log_format: Literal["auto", "text", "json"] = Field("auto", description="auto: text on a terminal, else JSON lines")

    @field_validator("overload_status", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.isdigit() else value  # variables come as text

    @field_validator("disk_cache", "access_log")
    @classmethod
    def _home_is_known(cls, path: Path | None) -> Path | None:
        return path and path.expanduser()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, variables, file, in that order."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def to_wire(self) -> dict[str, Any]:
        """The settings as plain values, for a child process (`from_wire` there)."""
        return self.model_dump(mode="json")

    @classmethod
    def from_wire(cls, values: dict[str, Any]) -> "Settings":
        """The parent's settings, each of its own type. The child's environment and files are not read.

        Raises ValidationError (a ValueError) for values that are no settings.
        """
        settings = cls.__new__(cls)
        BaseModel.__init__(settings, **values)  # that of BaseSettings would read them
        return settings
