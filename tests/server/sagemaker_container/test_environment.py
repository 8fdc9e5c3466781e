"""SageMaker's variables as settings."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from server.sagemaker_container.environment import read_sagemaker_environment
from server.settings import Settings

MULTI = {"SAGEMAKER_MULTI_MODEL": "true"}


def test_outside_a_container_nothing_is_said() -> None:
    """Nor where the operator has chosen a store, even if variables of SageMaker are there."""
    assert read_sagemaker_environment({"SAGEMAKER_BIND_TO_PORT": "9090"}, {}, has_model=False) == {}
    assert read_sagemaker_environment(MULTI, {"store": "s3://b"}, has_model=True) == {}
    assert read_sagemaker_environment(MULTI, {"container": "off"}, has_model=True) == {}


def test_a_container_serves_the_folder_that_sagemaker_fills() -> None:
    """Many models, or the one."""
    many = read_sagemaker_environment(MULTI, {}, has_model=True)
    assert (many["container"], many["store"]) == ("multi-model", "/opt/ml/models")
    one = read_sagemaker_environment({}, {}, has_model=True)
    assert (one["container"], one["store"], one["pin"]) == ("single-model", "/opt/ml/model", ["model"])
    elsewhere = read_sagemaker_environment({**MULTI, "SAGEMAKER_BASE_DIR": "/data"}, {}, has_model=False)
    assert elsewhere["store"] == "/data/models"
    chosen = read_sagemaker_environment({}, {"container": "multi-model", "store": "/x"}, has_model=False)
    assert chosen["container"] == "multi-model"


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        ("", (9090, 0, 0)),
        ("21000-21010", (9090, 21000, 21001)),
        ("9090-9092", (9090, 9091, 9092)),
        ("9090-9090", (9090, 0, 0)),
        ("a-b", (9090, 0, 0)),
    ],
)
def test_ports_are_those_that_sagemaker_names(ports: str, expected: tuple[int, int, int]) -> None:
    """Management and metrics take others of its range, or free ones."""
    found = read_sagemaker_environment(
        {**MULTI, "SAGEMAKER_BIND_TO_PORT": "9090", "SAGEMAKER_SAFE_PORT_RANGE": ports}, {}, has_model=False
    )
    assert (found["inference_port"], found["management_port"], found["metrics_port"]) == expected


@pytest.mark.parametrize(("payload", "size"), [("20", 20), ("0", 100), ("x", None), ("-1", None)])
def test_the_largest_body_is_the_payload(payload: str, size: int | None) -> None:
    """In MiB; 0 is as much as a batch transform sends. What is no number says nothing."""
    found = read_sagemaker_environment({**MULTI, "SAGEMAKER_MAX_PAYLOAD_IN_MB": payload}, {}, has_model=False)
    assert found.get("max_body_bytes") == (None if size is None else size * 2**20)


def test_other_variables() -> None:
    """Time-outs, the level of the log, and the script."""
    said = {
        "SAGEMAKER_MODEL_SERVER_TIMEOUT": "120",
        "SAGEMAKER_CONTAINER_LOG_LEVEL": "30",
        "SAGEMAKER_PROGRAM": "serve_me.py",
    }
    found = read_sagemaker_environment({**MULTI, **said}, {}, has_model=False)
    assert (found["request_timeout_s"], found["code_timeout_s"], found["log_level"]) == (120.0, 120.0, "warning")
    assert found["code_program"] == "serve_me.py"
    module = read_sagemaker_environment({**MULTI, "SAGEMAKER_PROGRAM": "toolkit.main"}, {}, has_model=False)
    assert "code_program" not in module


@pytest.mark.parametrize(
    ("folder", "program", "expected"),
    [
        ("/opt/ml/model/code", "serve.py", "serve.py"),
        ("/opt/ml/model/code", "", None),
        ("/opt/ml/model/src", "serve.py", "src/serve.py"),
        ("/opt/ml/model/src", "", "src/inference.py"),
        ("/opt/ml/model", "serve.py", "serve.py"),
        ("/elsewhere", "serve.py", "serve.py"),
        ("s3://bucket/sourcedir.tar.gz", "serve.py", "serve.py"),
    ],
)
def test_the_script_may_be_in_another_folder_of_the_model(folder: str, program: str, expected: str | None) -> None:
    """SAGEMAKER_SUBMIT_DIRECTORY counts where it is below the model's folder: nothing is fetched from elsewhere."""
    said = {"SAGEMAKER_SUBMIT_DIRECTORY": folder, "SAGEMAKER_PROGRAM": program}
    found = read_sagemaker_environment({**MULTI, **said}, {}, has_model=False)
    assert found.get("code_program") == expected


def test_everything_else_wins_over_sagemakers_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, variables of Fleetcast and its file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleetcast.toml").write_text("metrics_port = 7001\n")
    variables = {**MULTI, "SAGEMAKER_BIND_TO_PORT": "9090", "FLEETCAST_MANAGEMENT_PORT": "7000"}
    given: dict[str, Any] = {"log_level": "error"}
    with patch.dict(os.environ, {**variables, "SAGEMAKER_CONTAINER_LOG_LEVEL": "10"}):
        settings = Settings(**given)
    assert (settings.store, settings.container, settings.log_level) == ("/opt/ml/models", "multi-model", "error")
    assert (settings.inference_port, settings.management_port, settings.metrics_port) == (9090, 7000, 7001)
