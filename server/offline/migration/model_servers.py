"""The two servers whose files are read: their keys, and the variables that override them. Pure.

Source: the static fields and methods of `ConfigManager` in the servers of the wheels torchserve 0.12.0 and
multi-model-server 1.1.11, which name each key and its variable, and both servers' `docs/configuration.md`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class ServerName(StrEnum):
    """As the flag `--from` names it."""

    TORCHSERVE = "torchserve"
    MMS = "mms"


@dataclass(frozen=True, slots=True)
class ModelServer:
    """A server: `keys` that it reads, and variable -> key for those that variables override."""

    name: ServerName
    title: str
    keys: frozenset[str]
    variables: Mapping[str, str]

    def __str__(self) -> str:
        return self.title


#: Keys that both read, and that the variable PREFIX_KEY overrides.
_SHARED = (
    "debug", "inference_address", "management_address", "load_models", "blacklist_env_vars",
    "default_workers_per_model", "default_response_timeout", "unregister_model_timeout", "number_of_netty_threads",
    "netty_client_threads", "job_queue_size", "number_of_gpu", "async_logging", "cors_allowed_origin",
    "cors_allowed_methods", "cors_allowed_headers", "decode_input_request", "keystore", "keystore_pass",
    "keystore_type", "certificate_file", "private_key_file", "max_request_size", "max_response_size",
    "default_service_handler", "model_store", "prefer_direct_buffer",
)  # fmt: skip
_TORCHSERVE = (
    "metrics_address", "default_startup_timeout", "metrics_config", "metrics_mode", "model_metrics_auto_detect",
    "disable_system_metrics", "ipex_enable", "cpu_launcher_enable", "cpu_launcher_args", "ipex_gpu_enable",
    "limit_max_image_pixels", "service_envelope", "model_server_home", "allowed_urls", "install_py_dep_per_model",
    "enable_metrics_api", "grpc_inference_address", "grpc_management_address", "grpc_inference_port",
    "grpc_management_port", "grpc_inference_max_connection_age_ms", "grpc_management_max_connection_age_ms",
    "grpc_inference_max_connection_age_grace_ms", "grpc_management_max_connection_age_grace_ms", "enable_grpc_ssl",
    "initial_worker_port", "initial_distribution_port", "workflow_store", "cpp_log_config",
    "disable_token_authorization", "enable_model_api", "snapshot_store",
)  # fmt: skip
_MMS = ("default_response_timeout_seconds", "preload_model")
#: Keys whose variables do not follow from their names.
_TORCHSERVE_VARIABLES = {
    "TS_OPEN_INFERENCE_PROTOCOL": "ts_open_inference_protocol",
    "TS_TOKEN_EXPIRATION_TIME_MIN": "token_expiration_min",
    "TS_HEADER_KEY_SEQUENCE_ID": "ts_header_key_sequence_id",
    "TS_HEADER_KEY_SEQUENCE_START": "ts_header_key_sequence_start",
    "TS_HEADER_KEY_SEQUENCE_END": "ts_header_key_sequence_end",
}
#: Keys of the file alone.
_FILE_ONLY = ("use_native_io", "io_ratio", "metric_time_interval", "enable_envvars_config", "vmargs", "python")
_TORCHSERVE_FILE_ONLY = (
    "model_snapshot", "models", "version", "system_metrics_cmd", "use_env_allowed_urls", "tsConfigFile",
    "metrics_format",
)  # fmt: skip


def _name_variables(prefix: str, keys: Iterable[str]) -> dict[str, str]:
    return {prefix + key.upper(): key for key in keys}


_TS_VARIABLES = {**_name_variables("TS_", (*_SHARED, *_TORCHSERVE)), **_TORCHSERVE_VARIABLES}
_MMS_VARIABLES = _name_variables("MMS_", (*_SHARED, *_MMS))

TORCHSERVE = ModelServer(
    ServerName.TORCHSERVE,
    "TorchServe",
    frozenset({*_TS_VARIABLES.values(), *_FILE_ONLY, *_TORCHSERVE_FILE_ONLY}),
    _TS_VARIABLES,
)
MMS = ModelServer(
    ServerName.MMS,
    "Multi Model Server",
    frozenset({*_MMS_VARIABLES.values(), *_FILE_ONLY, "model_server_home"}),
    _MMS_VARIABLES,
)
SERVERS: Mapping[ServerName, ModelServer] = {server.name: server for server in (TORCHSERVE, MMS)}


def guess_server(keys: Iterable[str]) -> ModelServer:
    """The server that reads more of the keys; TorchServe where both read as many."""
    found = list(keys)
    torchserve, mms = (sum(key in server.keys for key in found) for server in (TORCHSERVE, MMS))
    return MMS if mms > torchserve else TORCHSERVE
