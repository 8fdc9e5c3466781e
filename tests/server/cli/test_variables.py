"""Variables `FLEETCAST_...`: mistyped ones are refused and explained, and our own files have none."""

import re
import subprocess
from pathlib import Path

import pytest

from server.cli.setting_flags import settings_from
from server.cli.variables import OTHERS, explain_unknown_variables
from server.settings import Settings

ROOT = Path(__file__).parents[3]
SETTINGS = ["store", "inference_port", "management_port", "metrics_port", "workers"]


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("FLEETCAST_STROE", "there is no variable FLEETCAST_STROE; did you mean FLEETCAST_STORE?"),
        ("FLEETCAST_WORKER", "there is no variable FLEETCAST_WORKER; did you mean FLEETCAST_WORKERS?"),
        ("fleetcast_stroe", "there is no variable fleetcast_stroe; did you mean FLEETCAST_STORE?"),
        ("FLEETCAST_TOKN", "there is no variable FLEETCAST_TOKN; did you mean FLEETCAST_TOKEN?"),
        ("FLEETCAST_ZZZ", "there is no variable FLEETCAST_ZZZ"),
    ],
)
def test_a_mistyped_variable_is_explained(variable: str, said: str) -> None:
    """It is named as it was written, with the name that it resembles."""
    assert list(explain_unknown_variables({variable: "x", "FLEETCAST_STORE": "y", "PATH": "/"}, SETTINGS)) == [said]


def test_a_port_by_hand_is_not_a_port_by_kubernetes() -> None:
    """FLEETCAST_PORT=9000 was typed, and has three meanings; an address was set by Kubernetes after a service."""
    (said,) = explain_unknown_variables({"FLEETCAST_PORT": "9000"}, SETTINGS)
    assert "FLEETCAST_INFERENCE_PORT or FLEETCAST_MANAGEMENT_PORT or FLEETCAST_METRICS_PORT?" in said
    links = {
        "FLEETCAST_PORT": "tcp://10.0.0.7:8080",
        "FLEETCAST_SERVICE_HOST": "10.0.0.7",
        "FLEETCAST_SERVICE_PORT": "8080",
        "FLEETCAST_SERVICE_PORT_HTTP": "8080",
        "FLEETCAST_PORT_8080_TCP": "tcp://10.0.0.7:8080",
        "FLEETCAST_PORT_8080_TCP_ADDR": "10.0.0.7",
        "FLEETCAST_PORT_8080_TCP_PORT": "8080",
        "FLEETCAST_PORT_8080_TCP_PROTO": "tcp",
        "FLEETCAST_HEADLESS_SERVICE_HOST": "10.0.0.8",
    }
    assert list(explain_unknown_variables(links, SETTINGS)) == []


def test_settings_refuse_a_mistyped_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every command that reads settings does, whatever its flags say; a token and the tests' variables are none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEETCAST_TOKEN", "secret")
    monkeypatch.setenv("FLEETCAST_WORKERS", "2")
    assert settings_from({"store": "x"}).workers == 2
    monkeypatch.setenv("FLEETCAST_MODEL_CACHE_BYTE", "64MiB")
    with pytest.raises(
        ValueError, match="FLEETCAST_MODEL_CACHE_BYTE; did you mean FLEETCAST_MODEL_CACHE_BYTES"
    ) as found:
        settings_from({"store": "x"})
    assert "secret" not in str(found.value)


def test_a_setting_that_kubernetes_has_overwritten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A service `fleetcast-metrics` sets the variable of a setting: the error says what to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEETCAST_METRICS_PORT", "tcp://10.0.0.7:8082")
    with pytest.raises(ValueError, match=r"--metrics-port .*enableServiceLinks: false"):
        settings_from({"store": "x"})


def test_a_mistyped_key_of_the_file_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a flag and a variable are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleetcast.toml").write_text('store = "x"\nworkrs = 2\n')
    with pytest.raises(ValueError, match="there is no setting 'workrs'; did you mean workers"):
        settings_from({})


def test_our_own_files_name_variables_that_exist() -> None:
    """Makefile, images, manifests, units and pages: what they tell people to set is read by somebody."""
    listed = subprocess.run(
        ["git", "ls-files", "Makefile", "README.md", "CONTRIBUTING.md", "docker", "docs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    known = {f"FLEETCAST_{name.upper()}" for name in [*Settings.model_fields, *OTHERS]}
    examples = {"FLEETCAST_PORT", "FLEETCAST_IDLE_TIMEOUT_S"}  # what Kubernetes sets; a setting that is not there yet
    for file in listed.stdout.split():
        text = (ROOT / file).read_text(errors="ignore")
        assert set(re.findall(r"\bFLEETCAST_[A-Z0-9_]*[A-Z0-9]\b", text)) - known - examples == set(), file
