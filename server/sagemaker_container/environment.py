"""What SageMaker tells a container by its environment, as settings. Pure.

Flags, the variables of Fleetcast and its file win over these; see `server.settings`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.contract import MIB
from server.sagemaker_container.batch_transform import MAX_PAYLOAD_MIB

BASE_FOLDER = "/opt/ml"  #: unless SAGEMAKER_BASE_DIR names another, as for SageMaker's own toolkits
CODE_FOLDER, PROGRAM = "code", "inference.py"
MULTI_MODEL, SINGLE_MODEL = "multi-model", "single-model"
ONLY_MODEL = "model"  #: what the archive of a single-model container is called
_LOG_LEVELS = {"10": "debug", "20": "info", "30": "warning", "40": "error", "50": "error"}
_SECONDS = {"SAGEMAKER_MODEL_SERVER_TIMEOUT": ("request_timeout_s", "code_timeout_s")}


def read_sagemaker_environment(
    variables: Mapping[str, str], chosen: Mapping[str, Any], *, has_model: bool
) -> dict[str, Any]:
    """The settings that SageMaker's variables ask for; empty outside a container of SageMaker's.

    `chosen`: what is set already. `has_model`: whether the folder of `find_model_folder` is there. It is a container of
    SageMaker's where `container` says so, or where no store is chosen and SageMaker shows itself.
    """
    container = chosen.get("container") or _find_container(variables, chosen, has_model=has_model)
    if container not in (MULTI_MODEL, SINGLE_MODEL):
        return {}
    model = find_model_folder(variables)
    folder = model.with_name("models") if container == MULTI_MODEL else model
    found: dict[str, Any] = {
        "container": container,
        "store": str(folder),
        "disk_cache_bytes": 0,  # the store is a folder of this host
        "revalidate_s": 0.001,  # which is looked at for each load: what has this name may be another model by then
        "default_workers_per_model": 1,
        "watch_store": "off",  # SageMaker says what is loaded and when
        **_choose_ports(variables),
    }
    if container == SINGLE_MODEL:
        found["pin"] = [ONLY_MODEL]  # so that it is loaded at the start
    payload = variables.get("SAGEMAKER_MAX_PAYLOAD_IN_MB", "")
    if payload.isdigit():
        found["max_body_bytes"] = (int(payload) or MAX_PAYLOAD_MIB) * MIB
    for name, settings in _SECONDS.items():
        if variables.get(name, "").isdigit() and int(variables[name]):
            found |= dict.fromkeys(settings, float(variables[name]))
    if program := _find_program(variables, model):
        found["code_program"] = program
    level = _LOG_LEVELS.get(variables.get("SAGEMAKER_CONTAINER_LOG_LEVEL", ""))
    return found | ({"log_level": level} if level else {})


def find_model_folder(variables: Mapping[str, str]) -> Path:
    """Where SageMaker unpacks the one model of a container. Several have a folder `models` beside it."""
    return Path(variables.get("SAGEMAKER_BASE_DIR") or BASE_FOLDER) / "model"


def _find_program(variables: Mapping[str, str], model: Path) -> str:
    """The script, by its path in the archive or in its folder `code`; empty: the usual one.

    A folder of the model's is where the script lies (SAGEMAKER_SUBMIT_DIRECTORY), which is `code` unless another is
    named. A URL there names an archive of the script that SageMaker's toolkits download, and this server does not.
    """
    program = variables.get("SAGEMAKER_PROGRAM", "")
    if not program.endswith(".py"):  # it is a module of a toolkit's own
        program = ""
    submitted = Path(variables.get("SAGEMAKER_SUBMIT_DIRECTORY", ""))
    if not submitted.is_relative_to(model) or submitted.name == CODE_FOLDER:
        return program
    folder = submitted.relative_to(model)
    return str(folder / (program or PROGRAM)) if folder.parts else program


def _find_container(variables: Mapping[str, str], chosen: Mapping[str, Any], *, has_model: bool) -> str:
    if "store" in chosen:
        return ""
    if variables.get("SAGEMAKER_MULTI_MODEL", "").lower() == "true":
        return MULTI_MODEL
    return SINGLE_MODEL if has_model else ""


def _choose_ports(variables: Mapping[str, str]) -> dict[str, int]:
    """The one port that SageMaker names. Management and metrics then take two that it leaves free, or any."""
    port = variables.get("SAGEMAKER_BIND_TO_PORT", "")
    if not port.isdigit():
        return {}
    first, _, last = variables.get("SAGEMAKER_SAFE_PORT_RANGE", "").partition("-")
    free = range(int(first), int(last) + 1) if first.isdigit() and last.isdigit() else range(0)
    others = [each for each in free[:3] if each != int(port)]
    management, metrics = others[:2] if len(others) > 1 else (0, 0)
    return {"inference_port": int(port), "management_port": management, "metrics_port": metrics}
