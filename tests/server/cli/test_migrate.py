"""`fleetcast migrate`: what it prints where, and what it says of files that are none."""

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli.main import app
from server.offline.migration.properties import MAX_BYTES


def migrate(file: Path, *flags: str, **variables: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, ["migrate", str(file), *flags], env=variables)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file of either server."""
    file = tmp_path / "config.properties"
    file.write_text("model_store=$$STORE$$\njob_queue_size=5\nenable_envvars_config=true\nasync_logging=true\n")
    return file


def test_the_settings_are_printed_and_the_counts_beside_them(config: Path) -> None:
    """Standard output is the file alone; the environment of the command counts, as it does for the old server."""
    found = migrate(config, STORE="models", TS_JOB_QUEUE_SIZE="7", MMS_JOB_QUEUE_SIZE="9")
    assert found.exit_code == 0
    settings = tomllib.loads(found.stdout)
    assert (settings["store"], settings["queue_per_model"]) == ("models", 7)
    assert "model_server_api" not in settings
    assert found.stderr == "TorchServe: 6 settings, 1 to do by hand, 1 so without a setting, 1 ignored\n"
    other = tomllib.loads(
        migrate(config, "--from", "mms", "--store", "s3://b", STORE="x", MMS_JOB_QUEUE_SIZE="9").stdout
    )
    assert (other["store"], other["queue_per_model"], other["model_server_api"]) == ("s3://b", 9, "mms")


def test_flags_are_a_command_to_copy(config: Path) -> None:
    """One line on standard output; what became of each key is on standard error."""
    found = migrate(config, "--flags", STORE="my models")
    assert found.stdout.startswith("fleetcast serve --store 'my models' --queue-per-model 5 ")
    assert found.stdout.count("\n") == 1
    assert "async_logging=true (line 4): no request waits for the log" in found.stderr


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"a=\\u00", "line 1: \\\\u00 is no character"),
        (b"#" * (MAX_BYTES + 1), "more than 1048576 bytes"),
        (None, "does not exist"),
    ],
)
def test_what_is_no_configuration_is_one_line(tmp_path: Path, raw: bytes | None, said: str) -> None:
    """It names the file, and there is no output that could be taken for settings."""
    file = tmp_path / "config.properties"
    if raw is not None:
        file.write_bytes(raw)
    found = migrate(file)
    assert (found.exit_code, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert "config.properties" in found.stderr
    assert said.replace("\\\\", "\\") in found.stderr
