"""The sources of a setting, and that children get exactly the settings of the parent."""

import json
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from pydantic_settings import SettingsError

from server.settings import MIB, TOML_FILE, Settings
from tests.server.contributing import copied_tree, read_steps, run_in


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(**flags: object) -> Settings:
    """The settings with these flags, and whatever variables and file say."""
    return Settings.model_validate(flags)


def test_flags_win_over_variables_over_the_file_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source is asked in its turn, setting by setting."""
    Path(TOML_FILE).write_text('store = "s3://file"\nworkers = 1\nfronts = 2\nthreads = 3\n')
    monkeypatch.setenv("FLEETCAST_FRONTS", "5")
    monkeypatch.setenv("FLEETCAST_THREADS", "6")
    settings = read(threads=7)
    assert (settings.store, settings.workers, settings.fronts, settings.threads) == ("s3://file", 1, 5, 7)
    assert settings.inference_port == 8080


def test_sizes_take_units_and_lists_and_keys_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """What variables look like for the settings that are no plain words."""
    monkeypatch.setenv("FLEETCAST_SLAB_BYTES", "8MiB")
    monkeypatch.setenv("FLEETCAST_PIN", '["au/NSW1.mar"]')
    monkeypatch.setenv("FLEETCAST_ACCESS_KEYS", '{"AKIA": "secret"}')
    settings = read(store="x")
    assert (settings.slab_bytes, settings.pin) == (8 * MIB, ["au/NSW1.mar"])
    assert settings.access_keys == {"AKIA": SecretStr("secret")}


@pytest.mark.parametrize(
    ("store", "output"),
    [
        ("s3://fleet", "s3://fleet/async"),
        ("s3://fleet/models", "s3://fleet/models/"),
        ("s3://fleet/models/au", "s3://fleet/models"),
        ("s3a://fleet/models", "s3://fleet"),
        ("models", "gs://bucket/async"),
        ("models", "s3://user:word@bucket"),
        ("models", "s3://bucket?x"),
        ("models", "s3://"),
    ],
)
def test_asynchronous_answers_are_never_written_where_archives_lie(store: str, output: str) -> None:
    """Clients name what is written, so the two places hold nothing of each other; a neighbour in the bucket is fine."""
    with pytest.raises(ValidationError, match="async_output"):
        read(store=store, async_output=output)
    assert read(store="s3://fleet/models", async_output="s3://fleet/models-async/").async_output.endswith("async")
    assert read(store="models", async_output="s3://bucket").async_output == "s3://bucket"


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by `repr`, `str` or a dump of the settings, nor by the errors of flags and variables that are no settings."""
    settings = read(store="x", access_keys={"AKIA": "hidden-secret"})
    for shown in (repr(settings), str(settings), repr(settings.model_dump()), settings.model_dump_json()):
        assert "AKIA" in shown
        assert "hidden-secret" not in shown
    with pytest.raises(ValidationError) as refused:
        read(store="x", access_keys={"AKIA": ["hidden-secret"]})
    assert "hidden-secret" not in str(refused.value)
    for wrong in ('{"AKIA": "hidden-secret"', '{"AKIA": ["hidden-secret"]}', "AKIA=hidden-secret"):
        monkeypatch.setenv("FLEETCAST_ACCESS_KEYS", wrong)
        with pytest.raises((ValidationError, SettingsError)) as failed:
            read(store="x")
        assert "hidden-secret" not in str(failed.value)


@pytest.mark.parametrize(
    "values",
    [{}, {"store": "x", "slab_bytes": 1000}, {"store": "x", "inference_port": 70000}, {"store": "x", "workrs": 2}],
)
def test_wrong_settings_are_refused(values: dict[str, object]) -> None:
    """No store, numbers out of range, and names that do not exist."""
    with pytest.raises(ValidationError):
        read(**values)


def test_a_wrong_name_in_the_file_is_refused() -> None:
    """A misspelt key does not silently leave the default in place."""
    Path(TOML_FILE).write_text('store = "x"\nworkrs = 2\n')
    with pytest.raises(ValidationError, match="workrs"):
        read()


def test_settings_do_not_change() -> None:
    """One process, one configuration."""
    settings = read(store="x")
    with pytest.raises(ValidationError):
        settings.workers = 3


def test_a_child_has_its_parents_settings_whatever_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through JSON and back every value is equal, though the child's variables and file say otherwise."""
    settings = read(store="s3://a/b", model_cache_bytes="1GiB", pin=["a.mar"], access_keys={"k": "s"})
    values = json.loads(json.dumps(settings.to_wire()))
    monkeypatch.setenv("FLEETCAST_STORE", "s3://other")
    monkeypatch.setenv("FLEETCAST_WORKERS", "9")
    Path(TOML_FILE).write_text("fronts = 9\n")
    child = Settings.from_wire(values)
    assert child.model_dump() == settings.model_dump()
    assert {name: type(value) for name, value in child} == {name: type(value) for name, value in settings}


@pytest.mark.slow
def test_a_new_setting_is_one_field(tmp_path: Path) -> None:
    """CONTRIBUTING's page to the letter: the field alone gives flag, variable, file key, help and row of reference."""
    tree = copied_tree(tmp_path / "tree")
    (field,) = read_steps("A new setting")
    source = tree / "server" / "settings.py"
    source.write_text(source.read_text().replace("    @field_validator", f"{field}\n    @field_validator", 1))
    run_in(tree, "docs/write_reference.py")
    row = "| `--idle-timeout-s` | 75.0 | maximum time that a client connection may be idle |"
    assert row in (tree / "docs/reference/settings.md").read_text()
    assert "--idle-timeout-s SECONDS" in run_in(tree, "-m", "server.cli.main", "serve", "--help")
    read_it = (
        "from server.cli.setting_flags import settings_from as read; print(read({'store': 'x', **%s}).idle_timeout_s)"
    )
    assert run_in(tree, "-c", read_it % {}) == "75.0\n"
    (tree / TOML_FILE).write_text("idle_timeout_s = 1\n")
    assert run_in(tree, "-c", read_it % {}) == "1.0\n"
    assert run_in(tree, "-c", read_it % {}, FLEETCAST_IDLE_TIMEOUT_S="2") == "2.0\n"
    assert run_in(tree, "-c", read_it % {"idle_timeout_s": "3"}, FLEETCAST_IDLE_TIMEOUT_S="2") == "3.0\n"
