"""What becomes of each key of TorchServe and Multi Model Server here. Pure.

`RULES` is the table; keys that need more than a sentence have a function below it. Keys that neither server knows are
for `translation`.
"""

from collections.abc import Callable, Mapping

from server.offline.migration.addresses import MANAGEMENT_PORT, METRICS_PORT, make_address_rule, set_certificate
from server.offline.migration.configuration import Configuration
from server.offline.migration.model_servers import MMS
from server.offline.migration.models import MOST_WORKERS, set_loaded_models, set_model_defaults
from server.offline.migration.outcome import Outcome, Rule, always, become, hold, ignore, leave
from server.offline.migration.timeouts import parse_whole_number, set_timeouts

REQUEST_BYTES = 6_553_500  #: of both servers, where `max_request_size` is not given
MAX_INFLIGHT_BYTES = 256 * 2**20  #: our default

_JVM = always(ignore("there is no Java virtual machine here"))
_NETTY = always(ignore("there is no Netty here: `fronts` is the number of HTTP processes, 1 unless you set it"))
_CORS = always(ignore("no CORS headers are sent: let a proxy in front of the server add them"))
_GRPC_AGE = always(ignore("connections are kept for as long as their clients want"))
_SEQUENCES = always(ignore("there are no sequences of requests: each request is answered by itself"))
_WORKER_PORTS = always(ignore("a handler's process has no port: the worker that forked it holds its only channel"))
_LAUNCHER = always(
    ignore("the server itself divides the cores: `workers` and `threads` (`fleetcast serve --help`) change that")
)
_SNAPSHOT_STORE = always(ignore("no snapshots are written: the settings file and the store are the whole state"))
_TELEMETRY = always(ignore("the server counts and measures by itself; see `/metrics` on the metrics listener"))
_MARK = always(ignore("the server wrote it into its snapshot for itself"))


def _set_store(config: Configuration) -> Outcome:
    store = config.get("model_store")
    if not store:
        return leave("it is empty: add `store`, the folder or URL of the archives")
    return become({"store": store})


def _set_request_bytes(config: Configuration) -> Outcome:
    size = parse_whole_number(config.get("max_request_size"), least=1)
    settings = {"max_body_bytes": size}
    if size > MAX_INFLIGHT_BYTES:
        settings["max_inflight_bytes"] = 2 * size
    return become(settings)


def _set_queue(config: Configuration) -> Outcome:
    size = parse_whole_number(config.get("job_queue_size"), least=1)
    return become({"queue_per_model": size}, "a full queue is answered with 503 and a Retry-After")


def _set_device(config: Configuration) -> Outcome:
    gpus = parse_whole_number(config.get("number_of_gpu"), least=0)
    if gpus == 0:
        return become({"device": "cpu"})
    devices = ",".join(map(str, range(gpus)))
    return leave(f"there is a worker for each GPU that it sees: start it with CUDA_VISIBLE_DEVICES={devices}")


def _set_workers(config: Configuration) -> Outcome:
    count = min(parse_whole_number(config.get("default_workers_per_model"), least=0), MOST_WORKERS)
    if config.server is not MMS:
        if config.get("load_models") or config.get("model_snapshot"):
            return become({}, "of models that are registered at the start: it is in register_models")
        return ignore(
            "an archive with code has one process, which answers requests that wait as one batch where its "
            "model-config.yaml says batchSize, until a client scales it; models without code need no process at all"
        )
    why = "of models that are registered: processes of archives with code, up to code_replicas, where memory allows"
    return become({"default_workers_per_model": count}, why)


def _set_requirements(config: Configuration) -> Outcome:
    if not config.is_true("install_py_dep_per_model"):
        return hold("nothing is installed for an archive")
    return become(
        {"code_requirements": "install"},
        "from wheels alone, at each load; faster: pip install the packages beside the server, and pack without them",
    )


def _explain_decoding(config: Configuration) -> Outcome:
    if config.get("decode_input_request", "true").lower() == "true":
        return hold("JSON comes to a handler as its value, text as str")
    return leave("JSON and text are always decoded for a handler: change one that expects bytes")


def _explain_tokens(config: Configuration) -> Outcome:
    if config.is_true("disable_token_authorization"):
        return hold("no tokens are asked unless you set `tokens`")
    return leave(
        "TorchServe asks tokens of its key_file.json. Here: `fleetcast token NAME --scope invoke >> tokens.toml` and "
        'tokens = "tokens.toml"; clients send `Authorization: Bearer` as before'
    )


def _explain_metrics(config: Configuration) -> Outcome:
    if config.get("metrics_mode", "log").lower() == "prometheus":
        return hold("`/metrics` on the metrics listener, with our names and, of registered models, TorchServe's")
    return ignore("metrics are not logged: `/metrics` on the metrics listener has them for Prometheus")


def _set_metrics_file(config: Configuration) -> Outcome:
    file = config.get("metrics_config")
    if not file:
        return hold("handlers' metrics need no file")
    return become(
        {"code_metrics": file}, "its `model_metrics` are for get_metric of handlers; `ts_metrics` are not read"
    )


def _explain_metrics_api(config: Configuration) -> Outcome:
    if config.get("enable_metrics_api", "true").lower() == "true":
        return hold("`/metrics` is on the metrics listener")
    return ignore("the metrics listener is always there, on the loopback address")


def _explain_urls(config: Configuration) -> Outcome:
    del config
    return ignore("archives come from the one `store` and from no URL that a request names")


def _explain_handler(config: Configuration) -> Outcome:
    handler = config.get("default_service_handler")
    if not handler:
        return hold("each archive names its own handler")
    return leave("an archive that names no handler is not run: pack it with --handler")


def _set_envelope(config: Configuration) -> Outcome:
    if not config.get("service_envelope"):
        return hold("requests are not unwrapped")
    return become({"code_envelope": config.get("service_envelope")}, "it needs pip install 'fleetcast[torchserve]'")


def _explain_envvars(config: Configuration) -> Outcome:
    if not config.is_true("enable_envvars_config"):
        return hold("the old server's variables are not read")
    return become(
        {},
        "the variables set where this command ran are in the settings. Here each setting has a variable of its own: "
        "FLEETCAST_ and its name",
    )


def _set_grpc_host(config: Configuration) -> Outcome:
    host = config.get("grpc_inference_address")
    return become({"grpc_host": host}) if host else hold("gRPC is at the loopback address")


def _set_grpc_port(key: str, setting: str) -> Rule:
    return lambda config: become(
        {setting: parse_whole_number(config.get(key), least=0, most=65535)}, "it needs pip install 'fleetcast[grpc]'"
    )


RULES: Mapping[str, Rule] = {
    "inference_address": make_address_rule("inference", {"http": 80, "https": 443}),
    "management_address": make_address_rule("management", MANAGEMENT_PORT),
    "metrics_address": make_address_rule("metrics", METRICS_PORT),
    "certificate_file": set_certificate,
    "private_key_file": set_certificate,
    "keystore": set_certificate,
    "keystore_pass": set_certificate,
    "keystore_type": set_certificate,
    "model_store": _set_store,
    "load_models": set_loaded_models,
    "models": set_model_defaults,
    "model_snapshot": set_model_defaults,
    "default_response_timeout": set_timeouts,
    "default_response_timeout_seconds": set_timeouts,
    "max_request_size": _set_request_bytes,
    "job_queue_size": _set_queue,
    "number_of_gpu": _set_device,
    "max_response_size": always(ignore("an answer of code has at most 64 MiB; other answers follow from the request")),
    "default_workers_per_model": _set_workers,
    "install_py_dep_per_model": _set_requirements,
    "decode_input_request": _explain_decoding,
    "disable_token_authorization": _explain_tokens,
    "token_expiration_min": always(ignore("tokens have no age: delete a token's lines in the file to revoke it")),
    "metrics_mode": _explain_metrics,
    "enable_metrics_api": _explain_metrics_api,
    "metrics_format": always(hold("Prometheus's")),
    "metrics_config": _set_metrics_file,
    "model_metrics_auto_detect": always(hold("`/metrics` shows what handlers measure, declared or not")),
    "metric_time_interval": always(ignore("metrics are as of the moment in which they are read")),
    "disable_system_metrics": _TELEMETRY,
    "system_metrics_cmd": _TELEMETRY,
    "allowed_urls": _explain_urls,
    "use_env_allowed_urls": _explain_urls,
    "default_service_handler": _explain_handler,
    "service_envelope": _set_envelope,
    "enable_envvars_config": _explain_envvars,
    "blacklist_env_vars": always(
        hold("the code of an archive sees no variables but those of paths, language and zone")
    ),
    "async_logging": always(hold("no request waits for the log")),
    "preload_model": always(hold("each archive's process is forked from one that has imported torch")),
    "unregister_model_timeout": always(
        hold("a process that is unloaded is ended at once when its last answer has left")
    ),
    "default_startup_timeout": always(ignore("the code of an archive has `code_timeout_s` to load, as for an answer")),
    "limit_max_image_pixels": always(ignore("what a handler of images accepts is for its code to say")),
    "enable_model_api": always(
        hold("the management listener loads and unloads models; `tokens` or the loopback address protect it")
    ),
    "grpc_inference_address": _set_grpc_host,
    "grpc_management_address": always(ignore("management by gRPC is at the management listener's address")),
    "grpc_inference_port": _set_grpc_port("grpc_inference_port", "grpc_port"),
    "grpc_management_port": _set_grpc_port("grpc_management_port", "grpc_management_port"),
    "enable_grpc_ssl": always(ignore("TLS is of all listeners: gRPC has it where the addresses begin with https://")),
    "grpc_inference_max_connection_age_ms": _GRPC_AGE,
    "grpc_management_max_connection_age_ms": _GRPC_AGE,
    "grpc_inference_max_connection_age_grace_ms": _GRPC_AGE,
    "grpc_management_max_connection_age_grace_ms": _GRPC_AGE,
    "ts_open_inference_protocol": always(hold("the Open Inference Protocol is served at /v2")),
    "cors_allowed_origin": _CORS,
    "cors_allowed_methods": _CORS,
    "cors_allowed_headers": _CORS,
    "number_of_netty_threads": _NETTY,
    "netty_client_threads": _NETTY,
    "vmargs": _JVM,
    "prefer_direct_buffer": _JVM,
    "use_native_io": _JVM,
    "io_ratio": _JVM,
    "cpu_launcher_enable": _LAUNCHER,
    "cpu_launcher_args": _LAUNCHER,
    "ipex_enable": _LAUNCHER,
    "ipex_gpu_enable": _LAUNCHER,
    "initial_worker_port": _WORKER_PORTS,
    "initial_distribution_port": _WORKER_PORTS,
    "ts_header_key_sequence_id": _SEQUENCES,
    "ts_header_key_sequence_start": _SEQUENCES,
    "ts_header_key_sequence_end": _SEQUENCES,
    "workflow_store": always(ignore("there are no workflows: let a client, or one handler, call the models in turn")),
    "cpp_log_config": always(ignore("there is no C++ backend; `log_level` and `log_format` are our log's")),
    "snapshot_store": _SNAPSHOT_STORE,
    "model_server_home": always(ignore("the server is where its package is installed")),
    "python": always(ignore("archives run in the Python of the server: install their packages there")),
    "debug": always(ignore('it was the old server\'s own; log_level = "debug" is ours')),
    "version": _MARK,
    "tsConfigFile": _MARK,
}


def _default_timeout(config: Configuration) -> Outcome | None:
    given = ("default_response_timeout", "default_response_timeout_seconds")
    return None if any(key in config.entries for key in given) else set_timeouts(config)


def _default_request_bytes(config: Configuration) -> Outcome | None:
    return None if "max_request_size" in config.entries else become({"max_body_bytes": REQUEST_BYTES})


def _default_code(config: Configuration) -> Outcome | None:
    return become(
        {"allow_code": ["*"]},
        f"{config.server} runs the code of every archive. Here you say whose: instead of '*' give the beginnings of "
        "the keys of archives that you trust",
    )


def _default_protocol(config: Configuration) -> Outcome | None:
    return become({"model_server_api": "mms"}) if config.server is MMS else None


def _default_store(config: Configuration) -> Outcome | None:
    if "model_store" in config.entries:
        return None
    return leave("no model_store is given: add `store`, the folder or URL of the archives, or give --store")


def _default_grpc(config: Configuration) -> Outcome | None:
    if "grpc_inference_port" not in config.server.keys or "grpc_inference_port" in config.entries:
        return None
    return ignore("gRPC is off without a port: grpc_port = 7070 and grpc_management_port = 7071 are theirs")


def _default_tokens(config: Configuration) -> Outcome | None:
    has_tokens = "disable_token_authorization" in config.server.keys
    return _explain_tokens(config) if has_tokens and "disable_token_authorization" not in config.entries else None


#: What the old server does without a key, where it is not what we do: the words for it, and the rule.
DEFAULTS: Mapping[str, Callable[[Configuration], Outcome | None]] = {
    "its store": _default_store,
    "its protocol": _default_protocol,
    "its code": _default_code,
    "its tokens": _default_tokens,
    "its gRPC listeners": _default_grpc,
    "its default time-out of 120 s": _default_timeout,
    f"its default max_request_size of {REQUEST_BYTES}": _default_request_bytes,
}
