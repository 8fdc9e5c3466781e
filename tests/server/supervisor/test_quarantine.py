"""The quarantine of the server: which models enter it by deaths of workers, and which leave it."""

from pathlib import Path

from model_store.names import ModelName
from server.supervisor.quarantine import WINDOW_S, ServerQuarantine, read_running
from server.worker.quarantine import Running


def died(folder: Path, *models: str) -> Path:
    """The file of a worker that died while it ran these models, and after it had run another."""
    path = folder / "0.1.run"
    running = Running(str(path))
    with running.noting(ModelName("before.mar")):
        pass
    for model in models:
        running.begin(ModelName(model))
    return path


def test_two_deaths_are_needed(tmp_path: Path) -> None:
    """The model that ran both times is refused, those that ran once or had ended are not; a release forgets deaths."""
    quarantine = ServerQuarantine()
    assert not quarantine.note_death(died(tmp_path, "a.mar", "b.mar"))
    assert quarantine.note_death(died(tmp_path, "a.mar"))
    assert quarantine.reasons == {"a.mar": "2 workers died while it ran"}
    assert quarantine.release("a.mar")
    assert not quarantine.release("a.mar")
    assert not quarantine.note_death(died(tmp_path, "a.mar"))


def test_deaths_long_ago_do_not_count(tmp_path: Path) -> None:
    """Two deaths that are more than an hour apart are chance."""
    now = [0.0]
    quarantine = ServerQuarantine(lambda: now[0])
    quarantine.note_death(died(tmp_path, "a.mar"))
    now[0] = WINDOW_S + 1
    assert not quarantine.note_death(died(tmp_path, "a.mar"))


def test_no_file_is_no_model(tmp_path: Path) -> None:
    """A worker that never started left no file; a file is read once."""
    assert read_running(tmp_path / "none.run") == []
    path = died(tmp_path, "a.mar")
    assert read_running(path) == ["a.mar"]
    assert not path.exists()
