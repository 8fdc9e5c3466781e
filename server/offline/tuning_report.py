"""Renders the leaderboard of a search as one self-contained HTML file. Needs jinja2, of the extra `load`."""

from collections.abc import Iterator
from math import isfinite

from server.offline.evaluation_report import HERE, hash_for_csp, load_template
from server.offline.tuning import Standing, Tuned

COLUMNS = ("round", "fits", "score", "rMAE", "seconds a fit", "test score", "test rMAE")


def render_leaderboard(found: Tuned, csv: str, command: str) -> str:
    """Render the page; `command` trains the winner. Raises ModuleNotFoundError that says what to install."""
    style = (HERE / "backtest.css").read_text(encoding="utf-8")
    html: str = load_template("tuning.html").render(
        style=style,
        style_hash=hash_for_csp(style),
        found=found,
        csv=csv,
        command=command,
        winner=found.board[0].candidate.name,
        rows=list(list_rows(found)),
        columns=COLUMNS,
    )
    return html


def list_rows(found: Tuned) -> Iterator[tuple[str, list[str]]]:
    """List the candidates from best to worst with the cells of `COLUMNS`."""
    for each in found.board:
        yield each.candidate.name, _format_cells(each)


def _format_cells(each: Standing) -> list[str]:
    scores = [_format(value) for value in (each.score, each.rmae)]
    tests = [_format(value) for value in (each.test, each.test_rmae)]
    return [str(each.round), str(each.units), *scores, f"{each.seconds:.2f}", *tests]


def _format(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isfinite(value) else "failed"
