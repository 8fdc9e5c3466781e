"""The routes of the inference listener, a protocol each. A test proves that each dialect's `match` agrees."""

from server import contract
from server.routes.record import ANY, ARROW, BYTES, JSON, LINES, NPY, TEXT, Protocol, Route

_MODEL_HEADER = (contract.HEADER_TARGET_MODEL, "the model: its archive's key under the store")
_TIMEOUT = (contract.HEADER_TIMEOUT_MS, "deadline in milliseconds")
_BODIES = (JSON, LINES, NPY)
_MODEL_NAME = ("model_name", "the model, for clients of TorchServe and Multi Model Server")
_REFUSED = (400, 401, 403, 404, 405, 408, 413, 415)
_ASKED = ("GET", "POST", "PUT")

SAGEMAKER = Protocol(
    "sagemaker",
    "SageMaker runtime",
    "boto3 and the AWS SDKs",
    (
        Route("POST", "/endpoints/{endpoint}/invocations", "invoke", "Ask one model, by header or path",
              _BODIES, _BODIES, headers=(_MODEL_HEADER, _TIMEOUT), needed=(_MODEL_HEADER[0],), schema="model_body"),
        Route("POST", "/invocations", "invoke", "Ask one model", _BODIES, _BODIES,
              headers=(_MODEL_HEADER, _TIMEOUT), query=(_MODEL_NAME,), schema="model_body"),
    ),
    (*_REFUSED, 424, 429, 500, 503),
    "sagemaker_error",
)  # fmt: skip
FORECASTS = Protocol(
    "forecasts",
    "Forecasts of many models",
    "`fleetcast.Client`, curl",
    (
        Route("POST", contract.FORECASTS_PATH, "forecast", "Ask many models by one call", (JSON, ARROW, NPY),
              (JSON, NPY, ARROW), headers=(_TIMEOUT,), schema="forecasts_body"),
    ),
    (*_REFUSED, 424, 429, 500, 503),
    "error_object",
)  # fmt: skip
ACTUALS = Protocol(
    "actuals",
    "Observed prices",
    "`fleetcast.Client`, curl",
    (
        Route("POST", contract.ACTUALS_PATH, "record", "Send observed prices (needs `actuals`)",
              (JSON,), headers=(_TIMEOUT,), schema="actuals_body"),
    ),
    (*_REFUSED, 429, 500, 503),
    "error_object",
)  # fmt: skip

NIXTLA = Protocol(
    "nixtla",
    "Nixtla",
    "`NixtlaClient` with `base_url`",
    (
        Route("GET", "/validate_api_key", "key", "Whether the client's key is taken"),
        Route("GET", "/usage", "usage", "Zeros: nothing is counted by key"),
        Route("GET", "/v2/models", "models", "The forecasters that have answered so far"),
        Route("GET", "/model_params", "parameters", "How much history a model needs, and how far it forecasts",
              query=(("model", "the model"), ("freq", "the frequency of the series")), needed=("model",)),
        Route("POST", "/v2/forecast", "forecast", "Forecast many series of one model", (JSON,), schema="nixtla_body"),
        Route("POST", "/v2/cross_validation", "backtest", "Forecast past windows", (JSON,), schema="nixtla_body"),
        Route("POST", "/v2/anomaly_detection", "anomalies", "Values outside of an interval", (JSON,),
              schema="nixtla_body"),
        Route("POST", "/v2/online_anomaly_detection", "online_anomalies", "The same for the newest values", (JSON,),
              schema="nixtla_body"),
        Route("POST", "/v2/simulate/async", "simulate", "Sample paths of many series, as a job", (JSON,),
              statuses=(202,), schema="nixtla_body"),
        Route("POST", "/v2/forecast/async", "forecast_job", "A forecast as a job", (JSON,),
              statuses=(202,), schema="nixtla_body"),
        Route("POST", "/v2/cross_validation/async", "backtest_job", "A backtest as a job", (JSON,),
              statuses=(202,), schema="nixtla_body"),
        Route("POST", "/v2/anomaly_detection/async", "online_anomalies_job", "The newest values' anomalies as a job",
              (JSON,), statuses=(202,), schema="nixtla_body"),
        *(Route("GET", f"/v2/{task}/jobs/{{job}}", "job", "The answer of a job, for ten minutes")
          for task in ("simulate", "forecast", "cross_validation", "anomaly_detection")),
        Route("POST", "/v2/async/jobs/{job}/cancel", "cancel", "Forget a job's answer"),
    ),
    (*_REFUSED, 424, 429, 500, 501, 503),
    "error_detail",
)  # fmt: skip
MLFLOW = Protocol(
    "mlflow",
    "MLflow scoring",
    "MLflow's deployments clients, databricks-sdk; `ScoringServerClient` by `/invocations`",
    (
        Route("POST", "/serving-endpoints/{model}/invocations", "score", "Ask one model by instances, inputs or frames",
              (JSON,), (JSON,), schema="mlflow_body"),
        Route("GET", "/health", "health", "Whether the process runs"),
        Route("GET", "/version", "version", "The server's version", gives=(TEXT,)),
    ),
    (*_REFUSED, 424, 429, 500, 503, 504),
    "error_code",
)  # fmt: skip
KSERVE = Protocol(
    "kserve",
    "KServe time series",
    "people's own calls, as KServe documents them",
    (
        Route("POST", "/v1/timeseries/forecast", "forecast", "Forecast series of one model or many", (JSON,),
              schema="kserve_body"),
        Route("GET", "/v1/timeseries/models", "models", "The forecasters that have answered so far"),
    ),
    (*_REFUSED, 422, 424, 429, 500, 503, 504, 507),
    "kserve_error",
)  # fmt: skip
SAGEMAKER_STREAMS = Protocol(
    "sagemaker_streams",
    "SageMaker response streams and asynchronous invocations",
    "boto3's `invoke_endpoint_with_response_stream` and `invoke_endpoint_async`",
    (
        Route("POST", "/endpoints/{endpoint}/invocations-response-stream", "invocations-response-stream",
              "Ask one model; the answer comes in frames", _BODIES, ("application/vnd.amazon.eventstream",),
              headers=(_MODEL_HEADER, _TIMEOUT), schema="model_body"),
        Route("POST", "/endpoints/{endpoint}/async-invocations", "async-invocations",
              "Ask one model; the answer goes to a bucket (`async_output`, 400 without)", _BODIES, statuses=(202,),
              headers=(_MODEL_HEADER, ("X-Amzn-SageMaker-InputLocation", "the input in the bucket, instead of a body"),
                       ("X-Amzn-SageMaker-Inference-Id", "the client's own id"),
                       ("X-Amzn-SageMaker-RequestTTLSeconds", "longest wait for a turn, 60 to 21600 s"),
                       ("X-Amzn-SageMaker-InvocationTimeoutSeconds", "longest run, 1 to 3600 s"),
                       ("X-Amzn-SageMaker-S3OutputPathExtension", "folder of the answer"),
                       ("X-Amzn-SageMaker-Filename", "file name of the answer")), schema="model_body"),
    ),
    (*_REFUSED, 424, 429, 500, 503),
    "sagemaker_error",
)  # fmt: skip


def _list_versions(method: str, below: str, operation: str, summary: str, *, infers: bool = False) -> list[Route]:
    """A route of a model of the Open Inference Protocol, without and with a version."""
    takes, schema = ((JSON, BYTES), "v2_infer") if infers else ((), "")
    gives = (JSON, BYTES) if infers else (JSON,)
    paths = (f"/v2/models/{{model}}{below}", f"/v2/models/{{model}}/versions/{{version}}{below}")
    return [Route(method, path, operation, summary, takes, gives, schema=schema) for path in paths]


V2 = Protocol(
    "v2",
    "Open Inference Protocol (V2)",
    "tritonclient, KServe, MLServer",
    (
        Route("GET", "/v2", "server", "The server's name and extensions"),
        Route("GET", "/v2/health/live", "live", "Whether the process runs"),
        Route("GET", "/v2/health/ready", "ready", "Whether requests are served", statuses=(200, 503)),
        Route("GET", "/v2/models/stats", "all stats", "Counts and times of all models"),
        *_list_versions("GET", "", "metadata", "Names, datatypes and shapes of tensors, and what a forecast needs"),
        *_list_versions("GET", "/ready", "ready", "Whether the model is served"),
        *_list_versions("GET", "/config", "config", "The model's configuration, as Triton has it"),
        *_list_versions("GET", "/stats", "stats", "Counts and times of the model"),
        *_list_versions("POST", "/infer", "infer", "Tensors for tensors", infers=True),
        Route("POST", "/v2/repository/index", "index", "The models that the server knows", (JSON,),
              schema="any_object"),
        Route("POST", "/v2/repository/models/{model}/load", "load", "Load a model, where the operator allows it",
              (JSON,), schema="any_object"),
        Route("POST", "/v2/repository/models/{model}/unload", "unload", "Unload a model, where the operator allows it",
              (JSON,), schema="any_object"),
    ),
    (*_REFUSED, 500, 503, 504, 507),
    "error_text",
)  # fmt: skip
HEALTH = Protocol(
    "health",
    "Probes",
    "load balancers, Kubernetes, SageMaker",
    (
        Route("GET", contract.PING_PATH, "ping", "Whether the process runs"),
        Route("GET", contract.READY_PATH, "ready", "Whether requests are served, by worker", statuses=(200, 503)),
    ),
    (500,),
    "any_object",
)


def _list_predictions(path: str, operation: str, summary: str) -> list[Route]:
    """A route of one model that is asked by any method."""
    media, schema = (JSON, ANY), "model_body"
    return [
        Route(how, path, operation, summary, media if how != "GET" else (), (ANY,), schema=schema) for how in _ASKED
    ]


_PREDICT = "Ask a registered model, or an archive of the store"
TORCHSERVE = Protocol(
    "torchserve",
    "TorchServe",
    "clients of TorchServe, and of KServe's first protocol",
    (
        *_list_predictions("/predictions/{model}", "predict", _PREDICT),
        Route("OPTIONS", "/predictions/{model}", "describe_model", "The description of a registered model"),
        *_list_predictions("/explanations/{model}", "explain", "Ask a model's code for an explanation"),
        *_list_predictions("/models/{model}/invoke", "invoke", _PREDICT),
        Route("GET", "/", "live", "The sign of life that KServe's clients look for"),
        Route("GET", "/v1/models/{model}", "ready", "Whether a model is served; it is loaded for the question"),
        *_list_predictions("/v1/models/{model}:predict", "predict", _PREDICT),
        *_list_predictions("/v1/models/{model}:explain", "explain", "Ask a model's code for an explanation"),
        *_list_predictions("/{model}/predict", "invoke", _PREDICT),
        *(Route(how, "/invocations?model_name={model}", "invoke", _PREDICT, (), (ANY,), query=(_MODEL_NAME,))
          for how in _ASKED),
        Route("OPTIONS", "/", "describe", "The description of this protocol"),
        Route("GET", "/api-description", "describe", "The description of this protocol"),
    ),
    (*_REFUSED, 500, 503, 504, 507),
    "server_error",
)  # fmt: skip
MULTI_MODEL_SERVER = Protocol(
    "mms",
    "Multi Model Server",
    "clients of Multi Model Server, SageMaker's platform (`--model-server-api mms`, `--container`)",
    (
        *_list_predictions("/predictions/{model}", "predict", _PREDICT),
        Route("OPTIONS", "/predictions/{model}", "describe-model", "The description of a model"),
        *_list_predictions("/models/{model}/invoke", "predict", _PREDICT),
        *_list_predictions("/{model}/predict", "predict", _PREDICT),
        *(Route(how, "/invocations?model_name={model}", "predict", _PREDICT, (), (ANY,), query=(_MODEL_NAME,))
          for how in _ASKED),
        Route("OPTIONS", "/", "describe", "The description of this protocol"),
        Route("GET", "/api-description", "describe", "The description of this protocol"),
    ),
    (*_REFUSED, 500, 503, 504, 507),
    "server_error",
)  # fmt: skip

_ORDER = (
    SAGEMAKER, FORECASTS, ACTUALS, NIXTLA, MLFLOW, KSERVE, SAGEMAKER_STREAMS, V2, HEALTH, TORCHSERVE,
    MULTI_MODEL_SERVER,
)  # fmt: skip
#: By the names of the dialects, in the order in which `server.front.dialects` asks them.
PROTOCOLS = {each.name: each for each in _ORDER}


def choose_protocols(model_server_api: str, container: str) -> tuple[Protocol, ...]:
    """The protocols of a listener with these settings; a test proves that they are those of its dialects."""
    left_out = "torchserve" if model_server_api == "mms" or container != "off" else "mms"
    others = {left_out, "sagemaker"} if container != "off" else {left_out}
    return tuple(each for each in PROTOCOLS.values() if each.name not in others)
