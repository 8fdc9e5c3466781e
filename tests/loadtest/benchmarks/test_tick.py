"""`bench tick`: checkouts take turns, and the ratio is of turns."""

from io import StringIO
from pathlib import Path

import pytest
import typer
from rich.console import Console

from loadtest.benchmarks.tick import BESIDE, HERE, PARTS, ROOT, build_table, main, measure_rounds, summarise_rounds


def make_line(ms: float) -> dict[str, float]:
    """A round in which everything takes so long."""
    return {f"{part}_{kind}": ms for part in PARTS for kind in ("ms", "cpu_ms")}


def show_table(found: dict[str, list[dict[str, float]]]) -> str:
    """The table's text."""
    console = Console(file=StringIO(), width=200)
    console.print(build_table(summarise_rounds(found)))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_ratios_are_of_turns_and_shown_with_their_spread() -> None:
    """Theirs by ours; without another checkout there is none."""
    found = {
        HERE: [make_line(1.0), make_line(2.0), make_line(4.0)],
        BESIDE: [make_line(8.0), make_line(8.0), make_line(8.0)],
    }
    assert summarise_rounds(found)["ratio"]["tick_ms"] == {"median": 4.0, "min": 2.0, "max": 8.0, "runs": 3}
    assert show_table(found).count("4.00 (2.00-8.00)") == 2 * len(PARTS)
    assert "2.00 (1.00-4.00)" in show_table({HERE: found[HERE]})


@pytest.mark.slow
def test_two_checkouts_measure_in_turns() -> None:
    """Here this one beside itself: a round of each, in processes of their own."""
    found = measure_rounds({HERE: ROOT, BESIDE: ROOT}, 1)
    assert [len(lines) for lines in found.values()] == [1, 1]
    assert found[HERE][0].keys() == found[BESIDE][0].keys() == make_line(0).keys()
    assert found[HERE][0]["tick_ms"] > 0


@pytest.mark.slow
def test_a_checkout_that_cannot_be_measured_ends_the_benchmark(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the cause on standard error."""
    (tmp_path / "server").mkdir()
    (tmp_path / "server/__init__.py").write_text("raise ImportError('not of today')")
    with pytest.raises(typer.Exit):
        measure_rounds({HERE: tmp_path}, 1)
    assert "not of today" in capfd.readouterr().err


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    """Python would take the installed modules in the place of its own."""
    with pytest.raises(typer.BadParameter, match="no checkout"):
        main(beside=tmp_path)
