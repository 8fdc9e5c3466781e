"""The generated pages of docs/reference are what the program says now."""

from pathlib import Path

import pytest

from loadtest.cli import app as load_app
from server.cli.main import COMMANDS, app
from server.cli.reference.errors import ADVICE
from server.cli.reference.pages import render_pages
from server.errors import Situation
from server.routes.inference import PROTOCOLS

FOLDER = Path(__file__).parents[4] / "docs" / "reference"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """The pages as they would be written now."""
    return render_pages({"fleetcast": app, "fleetcast-load": load_app})


def test_the_committed_pages_are_current(pages: dict[str, str]) -> None:
    """`make docs` would change nothing, and no page is left that it does not write."""
    stale = [name for name, text in pages.items() if (FOLDER / name).read_text() != text]
    assert not stale, "run `make docs`"
    assert {page.name for page in FOLDER.glob("*.md")} == pages.keys()


def test_settings_of_this_machine_change_no_page(
    pages: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statuses are those of the defaults, whatever variables and file say where the pages are written."""
    (tmp_path / "fleetcast.toml").write_text("overload_status = 429\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEETCAST_OVERLOAD_STATUS", "429")
    monkeypatch.setenv("COLUMNS", "40")
    assert render_pages({"fleetcast": app, "fleetcast-load": load_app}) == pages


def test_every_error_has_its_advice(pages: dict[str, str]) -> None:
    """Each situation but OK has a cause, a remedy, and a status in every protocol."""
    assert set(ADVICE) == set(Situation) - {Situation.OK}
    lines = pages["errors.md"].splitlines()
    for kind in ADVICE:
        rows = [line for line in lines if line.startswith(f"| `{kind.name.lower()}` |")]
        statuses = [line for line in rows if line.count("|") > 5]
        assert len(statuses) >= 1, kind
        assert statuses[0].count("|") == len(PROTOCOLS) + 2  # less the probes, with the kind, gRPC and the borders
    assert "| `deadline` | 424 (504) |" in pages["errors.md"]


def test_every_command_and_flag_is_there(pages: dict[str, str]) -> None:
    """Each command has a section, and a flag of one its row; examples stay lines of their own."""
    for name in COMMANDS:
        assert f"\n## fleetcast {name}\n" in pages["commands.md"]
    assert "| `--known-future " in pages["commands.md"]
    assert "```text\nfleetcast serve --store ./models\n" in pages["commands.md"]
    assert "\n## fleetcast-load demo first-run\n" in pages["fleetcast-load.md"]


def test_every_route_is_there(pages: dict[str, str]) -> None:
    """Each path of each protocol of the inference listener."""
    for protocol in PROTOCOLS.values():
        for route in protocol.routes:
            assert f" {route.path}`" in pages["routes.md"]
