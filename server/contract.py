"""What clients, the load tester, the planner, the SDK and the documentation may rely on. Pure; standard library only.

Everything here is public: changing a value changes the wire, the metrics, the access log or a default, and needs a line
in CHANGELOG.md. The server takes its own values from here, so nothing is stated twice.
"""

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Literal

MIB: Final = 2**20

# --- requests and answers ---------------------------------------------------------------------------------------------

#: Header names. HTTP compares them without regard to case; `raw_header` gives the spelling that ASGI uses.
HEADER_TARGET_MODEL: Final = "X-Amzn-SageMaker-Target-Model"
HEADER_INFERENCE_COMPONENT: Final = "X-Amzn-SageMaker-Inference-Component"  #: names the model where no target does
HEADER_CUSTOM_ATTRIBUTES: Final = "X-Amzn-SageMaker-Custom-Attributes"
HEADER_VARIANT: Final = "X-Amzn-Invoked-Production-Variant"
HEADER_ERROR_TYPE: Final = "X-Amzn-ErrorType"
HEADER_RETRY_AFTER_MS: Final = "X-Amz-Retry-After"  #: milliseconds, as botocore reads it
HEADER_REQUEST_ID: Final = "X-Request-Id"
HEADER_TIMEOUT_MS: Final = "X-Request-Timeout-Ms"
HEADER_CACHE: Final = "X-Fleetcast-Cache"  #: one of CACHE_RESULTS; of a call for many models `hit=44, miss=1`
HEADER_MODEL_VERSION: Final = "X-Fleetcast-Model-Version"  #: the store's ETag or version
HEADER_QUALITY: Final = "X-Fleetcast-Quality"  #: codes of doubtful histories with their predictions, `missing=2`
HEADER_WARNING: Final = "X-Fleetcast-Warning"  #: what else an answer is warned of, likewise: `narrow-levels=1`
#: In ms: `queue`, from arrival at the front and without the load; `load`, whose `desc` is the tier; `inference`.
HEADER_SERVER_TIMING: Final = "Server-Timing"

JSON: Final = "application/json"
NPY: Final = "application/x-npy"

#: Between front and worker, of tensors in the Open Inference Protocol (`handlers.codecs.open_inference`).
OPEN_INFERENCE_INFER: Final = "application/vnd.fleetcast.infer"
OPEN_INFERENCE_DESCRIBE: Final = "application/vnd.fleetcast.describe"

INVOCATIONS_PATH: Final = "/invocations"  #: one model, named by HEADER_TARGET_MODEL
MODEL_NAME_PARAMETER: Final = b"model_name"  #: of the query of that path, as archived model servers have it
FORECASTS_PATH: Final = "/v1/forecasts"  #: many models in one call
ACTUALS_PATH: Final = "/v1/actuals"  #: takes observed prices of many models
PREDICTIONS_PATH: Final = "/predictions"  #: with the model in the path, as TorchServe and Multi Model Server have it
OPEN_INFERENCE_MODELS_PATH: Final = "/v2/models"  #: with the model in the path
CONTAINER_MODELS_PATH: Final = "/models"  #: of a SageMaker container; with a model in the path and `/invoke`
PING_PATH: Final = "/ping"  #: 200 while the process lives
READY_PATH: Final = "/ready"  #: 200 while a worker takes all requests, else 503; its body says the state of each
METRICS_PATH: Final = "/metrics"  #: on the metrics listener

MODELS_PATH: Final = "/fleet/models"  #: on the management listener, as the three below
PROCESSES_PATH: Final = "/fleet/processes"
OPENAPI_PATH: Final = "/openapi.json"  #: on the management listener, as the page below
DOCS_PATH: Final = "/docs"
ACCURACY_PATH: Final = "/fleet/accuracy"  #: what observed prices say of forecasts, as JSON
ACCURACY_PAGE_PATH: Final = "/accuracy"  #: the same as a page
TARGETS_PATH: Final = "/targets"  #: of the metrics listener: where Prometheus finds the nodes of a cluster
EVENTS_PATH: Final = "/fleet/events"  #: takes a store's notifications of changed archives (POST)
ModelVerb = Literal["load", "unload", "pin", "unpin", "reload", "release"]

CACHE_RESULTS: Final = ("hit", "miss", "coalesced")  #: ready on arrival; started a load; joined one
TIERS: Final = ("device", "host", "disk", "store")  #: where a model lies, from the fastest to the slowest

PREFETCH_RESULTS: Final = ("used", "late", "wasted", "refused", "failed")
EVICTION_REASONS: Final = ("budget", "memory")  #: room for a load; the device, or a process of code, was out of memory
LANES: Final = ("disk", "store")  #: in which loads wait and run
LOAD_STATES: Final = ("running", "waiting")
STEP_PARTS: Final = ("decode", "forward", "encode")
WAITING_FOR: Final = ("load", "step")
#: What histories are doubted for (docs/quality.md), and `fallback`, which then answered.
DOUBT_CODES: Final = ("filled", "missing", "empty", "short", "flat", "stale", "shifted", "range", "fallback")

#: The answer to a call for many models ends with the number of items that failed, within so many bytes: a client that
#: only counts failures reads no more than that.
FORECASTS_END: Final = b'],"failed":%d}'
FORECASTS_END_BYTES: Final = 40
_FAILED = re.compile(rb'"failed":\s*(\d+)\s*}\s*$')


def raw_header(name: str) -> bytes:
    """The header's name as ASGI has it: lower case, bytes."""
    return name.lower().encode("ascii")


def verb_path(verb: ModelVerb) -> str:
    """The path of the management API below which a POST takes a model's name, which may have slashes."""
    return f"/fleet/{verb}"


def count_failed_forecasts(end: bytes) -> int | None:
    """How many items of a call for many models failed, by its answer's last FORECASTS_END_BYTES; None: not said."""
    found = _FAILED.search(end)
    return None if found is None else int(found[1])


# --- the access log ---------------------------------------------------------------------------------------------------

REPLAY_COLUMNS: Final = ("time", "model", "bytes", "outcome")  #: what the load tester needs, and writes itself
REPLAY_HEADER: Final = ",".join(REPLAY_COLUMNS) + "\n"
ACCESS_LOG_COLUMNS: Final = (*REPLAY_COLUMNS, "trace_id")  #: the last is empty where a request was not sampled
ACCESS_LOG_HEADER: Final = ",".join(ACCESS_LOG_COLUMNS) + "\n"
#: The column `outcome`: `answered` where the cache result is not known, `refused` for any status but 200, `lost` for no
#: answer. The order is that of the numbers that processes and arrays hold.
ACCESS_LOG_OUTCOMES: Final = ("answered", *CACHE_RESULTS, "refused", "lost")
ACCESS_LOG_FILE: Final = "arrivals-{:08}.csv"  #: a part, numbered from 1; older parts end with `.csv.gz`
ACCESS_LOG_FILES: Final = "arrivals-*.csv"

# --- defaults and rules -----------------------------------------------------------------------------------------------

#: Defaults of the settings of the same names (server/settings.py), for those that other programs calculate with.
INFERENCE_PORT: Final = 8080
MANAGEMENT_PORT: Final = 8081
METRICS_PORT: Final = 8082
#: By custom, as clients of Triton and of TorchServe expect them; these listeners are off unless their ports are set.
GRPC_PORT: Final = 8001
GRPC_MANAGEMENT_PORT: Final = 7071
SLAB_BYTES: Final = 4 * MIB
GPU_RESERVE_BYTES: Final = 2048 * MIB
EVICTION_POLICY: Final = "lru"
MAX_BATCH_ROWS: Final = 512
LOADER_THREADS: Final = 4
REVALIDATE_S: Final = 60.0
MAX_BODY_BYTES: Final = 6 * MIB
MAX_FORECASTS_BYTES: Final = 64 * MIB
MAX_REQUEST_GFLOP: Final = 200.0
MAX_REQUEST_NUMBERS: Final = 2**25
MAX_SESSION_BYTES: Final = 512 * MIB
MAX_FORWARD_S: Final = 10.0
QUEUE_PER_MODEL: Final = 1024
QUEUE_PER_WORKER: Final = 8192
REQUEST_TIMEOUT_S: Final = 50.0

CACHE_SHARE: Final = 0.4  #: of the host's memory, where `model_cache_bytes` is 0 and models run on the CPU
UNHALVED_JOBS: Final = 4  #: a step takes half of the jobs that are ready, but never fewer than so many


def home_weight(model: str, worker: int) -> bytes:
    """The model's home is the worker with the highest weight (rendezvous hashing, Thaler and Ravishankar 1996)."""
    return blake2b(model.encode(), digest_size=8, salt=worker.to_bytes(8, "little")).digest()


# --- metrics ----------------------------------------------------------------------------------------------------------

METRIC_PREFIX: Final = "fleetcast_"
WORKER_LABELS: Final = ("worker", "device")  #: on every series that a worker counts


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric: `name` without the prefix, help text, and the labels beside WORKER_LABELS."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def series(self) -> str:
        """The name in the exposition; a histogram's series add `_bucket`, `_sum` and `_count` to it."""
        return f"{METRIC_PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    @property
    def sum(self) -> str:
        """The series with a histogram's sum."""
        return f"{self.series}_sum"

    @property
    def count(self) -> str:
        """The series with a histogram's number of observations."""
        return f"{self.series}_count"


CACHE_REQUESTS: Final = MetricSpec(
    "counter",
    "model_cache_requests",
    "Requests by cache result: hit, miss (started a load) or coalesced (joined a load)",
    ("result",),
)
LOADING_WAIT: Final = MetricSpec("histogram", "model_loading_wait_seconds", "Time a request waited for its model")
DOWNLOADING: Final = MetricSpec("histogram", "model_downloading_seconds", "Time of a load's store requests")
LOADING: Final = MetricSpec(
    "histogram",
    "model_loading_seconds",
    "Time from the start of a load until the model serves, by the tier it came from: host, disk or store",
    ("tier",),
)
UNLOADING: Final = MetricSpec("histogram", "model_unloading_seconds", "Time to unload a model")
LOADED_MODELS: Final = MetricSpec("gauge", "loaded_models", "Resident models")
CACHE_BYTES: Final = MetricSpec(
    "gauge", "model_cache_bytes", "Cache bytes in use, by tier: device, host or disk", ("tier",)
)
CACHE_CAPACITY: Final = MetricSpec(
    "gauge", "model_cache_capacity_bytes", "Cache capacity in bytes, by tier: device, host or disk", ("tier",)
)
EVICTIONS: Final = MetricSpec("counter", "model_evictions", "Evicted models, by tier and reason", ("tier", "reason"))
AGE_AT_EVICTION: Final = MetricSpec(
    "histogram", "model_age_at_eviction_seconds", "Time between a model's load and its eviction"
)
CACHE_SHORTFALL: Final = MetricSpec(
    "histogram",
    "model_cache_shortfall_bytes",
    "Bytes by which the cache was too small to still hold a missed model that was evicted before",
)
LOADS_UNDER_WAY: Final = MetricSpec(
    "gauge",
    "loads_under_way",
    "Loads by lane: disk (copies at hand, and building) or store (requests to it), and state: running or waiting",
    ("lane", "state"),
)
LOAD_FAILURES: Final = MetricSpec("counter", "model_load_failures", "Failed loads, by reason", ("reason",))
SWAPS: Final = MetricSpec(
    "counter", "model_swaps", "Replacements of a serving model version, by result: ok or failed", ("result",)
)
SURVIVING_RESULTS: Final = ("adopted", "damaged")
SURVIVING_ROWS: Final = MetricSpec(
    "counter",
    "surviving_rows",
    "Rows that a worker left to the next one, by result: adopted, or damaged (adopted, but to be loaded again)",
    ("result",),
)
PREFETCH: Final = MetricSpec(
    "counter",
    "prefetch",
    "Prefetched models, by result: used, late (requested while loading), wasted (evicted unused), refused (no room) or "
    "failed",
    ("result",),
)
PREFETCH_MODELS: Final = MetricSpec("gauge", "prefetch_models", "Models whose next request is predicted")
QUEUE: Final = MetricSpec(
    "histogram", "inference_queue_seconds", "Time from a request's arrival at the front to its step, without its load"
)
BATCH_ROWS: Final = MetricSpec("histogram", "inference_batch_rows", "Rows per step")
BATCH_MODELS: Final = MetricSpec("histogram", "inference_batch_models", "Models per step")
STEP_SECONDS: Final = MetricSpec(
    "counter", "step_seconds", "Time spent in steps, by part: decode, forward or encode", ("part",)
)
DOUBTFUL_HISTORIES: Final = MetricSpec(
    "counter",
    "doubtful_histories",
    "Predictions whose history is doubtful, by code: filled, missing, empty, short, flat, stale, shifted or range; "
    "fallback counts those that the archive's fallback answered",
    ("code",),
)
MODEL_REQUESTS: Final = MetricSpec(
    "counter", "model_requests", "Requests by model, for as many models as metrics_per_model allows", ("model",)
)
INFERENCE_REQUESTS: Final = MetricSpec(
    "counter", "inference_requests", "Responses by protocol and status code", ("protocol", "code")
)
INFERENCE_SECONDS: Final = MetricSpec(
    "histogram",
    "inference_request_seconds",
    "Time from receiving a request to sending its response, in the front",
    ("protocol",),
)
STORE_CHECKS: Final = MetricSpec(
    "counter",
    "store_checks",
    "Resident archives compared with the store, by result: unchanged, changed, removed or failed",
    ("result",),
)
RELEASE_REQUESTS: Final = MetricSpec(
    "counter",
    "release_requests",
    "Requests by an alias or by the name of a model that is rolled back, by version and result: ok or failed",
    ("target", "version", "result"),
)
RELEASE_SECONDS: Final = MetricSpec(
    "histogram",
    "release_request_seconds",
    "Time of the same requests in the front until the answer begins, without those that failed",
    ("target", "version"),
)
UNDER_WAY: Final = MetricSpec(
    "gauge",
    "requests_under_way",
    "Requests that fronts have sent to a worker, or hold for it, and that are not answered",
    ("worker",),
)
ASYNC_INVOCATIONS: Final = MetricSpec(
    "counter",
    "async_invocations",
    "Asynchronous invocations, by result: accepted, done (the answer is written) or failed",
    ("result",),
)
FORWARDED: Final = MetricSpec(
    "counter", "forwarded_requests", "Requests that another node of the cluster answered, counted where they came in"
)
ASYNC_UNDER_WAY: Final = MetricSpec("gauge", "async_invocations_under_way", "Asynchronous invocations that wait or run")
WORKER_UP: Final = MetricSpec("gauge", "worker_up", "1 while the worker accepts requests, else 0", WORKER_LABELS)
WORKER_RESTARTS: Final = MetricSpec("counter", "worker_restarts", "Worker restarts", WORKER_LABELS)
ACCESS_LOG_ROWS: Final = MetricSpec(
    "counter", "access_log_rows", "Access log rows, by result: written or dropped", ("result",)
)
TRACES: Final = MetricSpec(
    "counter",
    "traces",
    "Sampled traces by result: exported, failed (the collector did not take them), dropped (too many wait for it) or "
    "skipped (more than traces_per_s)",
    ("result",),
)
TRACE_RESULTS: Final = ("exported", "failed", "dropped", "skipped")
ACTUALS: Final = MetricSpec(
    "counter", "actuals", "Observed prices by result: paired, repeated or unmatched", ("result",)
)
FORECASTS_KEPT: Final = MetricSpec(
    "counter",
    "forecasts_kept",
    "Forecasts that wait for prices, by result: kept, overlapping (of one that is kept) or dropped (no room)",
    ("result",),
)
PAIRED_PRICES: Final = MetricSpec(
    "counter",
    "paired_prices",
    "Observed prices that were forecast, for as many models as actuals_metrics allows; the rest is `other`",
    ("model",),
)
BAND_HITS: Final = MetricSpec(
    "counter", "band_hits", "Of these prices, those inside the band that promises this share", ("model", "band")
)
BAND_COVERAGE: Final = MetricSpec(
    "gauge", "band_coverage", "Share of prices inside the band on the last 28 days with prices", ("model", "band")
)
PINBALL_TO_NAIVE: Final = MetricSpec(
    "gauge",
    "pinball_to_naive",
    "Pinball loss on the same days divided by that of the naive forecast; of `other` the mean of the models",
    ("model",),
)
DRIFT: Final = MetricSpec(
    "gauge",
    "forecast_drift",
    "1 for 14 days with prices after an alarm of the drift test; of `other` the sum",
    ("model",),
)
DRIFT_ALARMS: Final = MetricSpec(
    "counter",
    "forecast_drift_alarms",
    "Alarms of the drift test, of which at most one in ten years a model is false where days are alike",
    ("model",),
)

LOG_LINES_DROPPED: Final = MetricSpec(
    "counter", "log_lines_dropped", "Log lines dropped because standard error was not read"
)
WAITING_REQUESTS: Final = MetricSpec(
    "gauge",
    "waiting_requests",
    "Requests that wait in a worker, by what for: load (of their model) or step (their model is resident)",
    ("waiting_for",),
)
FAILED_MODELS: Final = MetricSpec("gauge", "failed_models", "Models whose last load failed")
STALE_MODELS: Final = MetricSpec(
    "gauge", "stale_models", "Resident models from a kept copy that the store could not confirm; its answer is awaited"
)
STORE_FAILING: Final = MetricSpec(
    "gauge",
    "store_failing_seconds",
    "Time since the store answers neither loads (with the label worker) nor the watch (without); 0 while it answers",
)
QUARANTINED: Final = MetricSpec(
    "gauge", "quarantined_models", "Models that no worker runs until an operator releases them"
)
PINNED: Final = MetricSpec("gauge", "pinned_models", "Models that an operator pinned: no eviction takes them")
BUILD_INFO: Final = MetricSpec("gauge", "build_info", "1, with the version that runs", ("version", "python"))
CERTIFICATE_EXPIRY: Final = MetricSpec(
    "gauge",
    "certificate_expiry_timestamp_seconds",
    "Unix time at which the first certificate of a file ends, by the setting that names the file",
    ("setting",),
)
PROCESS_MEMORY: Final = MetricSpec(
    "gauge", "process_resident_memory_bytes", "Resident memory by process, shared pages in each", ("process",)
)
PROCESS_START: Final = MetricSpec(
    "gauge", "process_start_time_seconds", "Unix time at which the process started", ("process",)
)
PROCESS_CPU: Final = MetricSpec("counter", "process_cpu_seconds", "Processor time of the process", ("process",))
PROCESS_OPEN_FILES: Final = MetricSpec(
    "gauge", "process_open_fds", "Open file descriptors of the process", ("process",)
)
PROCESS_MOST_FILES: Final = MetricSpec(
    "gauge", "process_max_fds", "File descriptors that the process may have open", ("process",)
)
METRICS: Final = tuple(each for each in tuple(globals().values()) if isinstance(each, MetricSpec))
