"""`fleetcast backtest`: scores what archives would have forecast for a CSV file. Torch when it runs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich
import typer
from rich.table import Table

from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, one_line_errors, parse_moment, show_progress, verbatim
from server.cli.train import archive_names
from server.logs import escape_text
from server.offline.measures import HEADINGS, MEASURES, format_score

if TYPE_CHECKING:
    from server.offline.fleet_evaluation import Backtest

WINDOWS = 28


def backtest(
    csv: Annotated[Path, typer.Argument(metavar="CSV", help="file (.csv or .csv.gz) with a header, a row a time step")],
    *,
    time: Annotated[str, typer.Option(help="column of the time stamps, evenly spaced")],
    target: Annotated[
        list[str] | None, typer.Option(help="price column (repeatable); default: all that have an archive")
    ] = None,
    models: Annotated[str, typer.Option(metavar="STORE", help="of the archives; else as `serve` finds it")] = "",
    name_template: Annotated[str, typer.Option(help="an archive's name in the store")] = "{target}.mar",
    url: Annotated[str, typer.Option(help="ask this running server instead of forecasting in this process")] = "",
    since: Annotated[str, typer.Option("--from", metavar="DATE", help="forecast no step before it")] = "",
    until: Annotated[str, typer.Option(metavar="DATE", help="forecast only steps before it")] = "",
    every: Annotated[int, typer.Option(min=0, help="steps between two forecasts; 0: as many as are forecast")] = 0,
    windows: Annotated[
        int | None, typer.Option(min=0, help=f"the last so many, 0: all; default: {WINDOWS}, with --from all")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="a report with charts, in one file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs, on standard output")] = False,
) -> None:
    """Score archives on a CSV file with rolling windows: each forecast knows what was known when it starts.

    \b
    fleetcast backtest prices.csv --time hour --models ./models --html report.html
    fleetcast backtest prices.csv --time hour --models s3://models --url http://127.0.0.1:8080 --from 2024-01-01
    fleetcast backtest de.csv.gz --time hour --target price --models ./models --name-template de.mar --json

    Covariates known ahead are the columns that the archive names. pinball and CRPS are in the unit of the prices; wQL,
    WAPE, MASE and rMAE have none. rMAE compares with the value a week before on Saturday, Sunday and Monday and a day
    before else (of days a week before): below 1 is better than that. Score what the archives were not trained on:
    `fleetcast train --train-until`. Ends with 1 when some markets could not be scored.
    """  # noqa: D301 -- click's mark for "do not wrap"
    from server.offline.fleet_evaluation import backtest_fleet, match_columns  # noqa: PLC0415 -- torch
    from server.offline.rolling_windows import InProcess, Rolling, ThroughServer  # noqa: PLC0415

    with one_line_errors():
        settings = settings_from({"store": models} if models else {})
        first, last = parse_moment("--from", since), parse_moment("--until", until)
        most = windows if windows is not None else 0 if first else WINDOWS
        rolling, answers = Rolling(every, most, first, last), ThroughServer(url) if url else InProcess()
        names = archive_names(target, name_template) if target else match_columns(csv, time, settings, name_template)
        with show_progress("scoring") as told:
            found = backtest_fleet(csv, time, names, settings, answers, rolling, told)
        if html is not None:
            from server.offline.evaluation_report import render_page  # noqa: PLC0415 -- an extra

            html.write_text(render_page(found), encoding="utf-8")
    if as_json:
        print(found.json(MEASURES).decode())  # noqa: T201
    else:
        rich.print(_make_score_table(found))
    for name, why in found.failed.items():
        print(escape_text(f"error: {name}: {why}"), file=sys.stderr)  # noqa: T201
    if found.failed:
        raise typer.Exit(BAD)


def _make_score_table(found: "Backtest") -> Table:
    """A row for each market, and their mean."""
    promised = {each.scores.nominal for each in found.markets}
    interval = f"in {promised.pop():.0%}" if len(promised) == 1 else HEADINGS["coverage"]
    table = Table("market", *(HEADINGS[name] for name in MEASURES[:-1]), interval, "n")
    for column in table.columns[1:]:
        column.justify = "right"
    for each in found.markets:
        cells = [format_score(name, getattr(each.scores, name)) for name in MEASURES]
        table.add_row(verbatim(each.target), *cells, str(each.windows))
    if len(found.markets) > 1:
        table.add_section()
        table.add_row("mean", *(format_score(name, found.mean(name)) for name in MEASURES), "")
    return table
