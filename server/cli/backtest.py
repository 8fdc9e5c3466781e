"""`fleetcast backtest` scores what archives would have forecast for a price file. It imports torch when it runs."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich
import typer
from rich.table import Table

from model_store.names import parse_model_name
from server.cli import price_flags
from server.cli.command_flags import with_flags, write_command
from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, one_line_errors, parse_moment, verbatim
from server.cli.train import match_markets
from server.offline.measures import COMPARED, HEADINGS, MEASURES, POINTS, format_score, list_comparison
from server.shell.escaping import escape_text
from server.shell.progress import show_progress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from server.offline.fleet_evaluation import Backtest

WINDOWS = 28
SCENARIOS = 100  #: of a window with --scenarios, see `server.offline.scenario_scores`
SHOWN = 3  #: most markets that a note names


@dataclass(frozen=True, slots=True, kw_only=True)
class BacktestFlags:
    """The flags of `fleetcast backtest`."""

    csv: price_flags.PriceFile
    time: price_flags.TimeColumn
    target: price_flags.ArchivedTargets = None
    models: Annotated[
        str, typer.Option(metavar="STORE", help="folder or store URL of the archives; default: the store of `serve`")
    ] = ""
    name_template: price_flags.NameTemplate = price_flags.NAME_TEMPLATE
    url: Annotated[str, typer.Option(help="inference address of a server that forecasts instead of this process")] = ""
    since: Annotated[
        str, typer.Option("--from", metavar="DATE", help="date of the first step that may be forecast")
    ] = ""
    until: Annotated[str, typer.Option(metavar="DATE", help="date before which all forecast steps lie")] = ""
    every: Annotated[int, typer.Option(min=0, help="steps between two forecasts; 0: the length of a forecast")] = 0
    windows: Annotated[
        int | None,
        typer.Option(min=0, help=f"number of last windows to score, 0: all; default: {WINDOWS}, or all with --from"),
    ] = None
    scenarios: Annotated[
        str,
        typer.Option(
            metavar="CORRELATION", help="archive of `fleetcast correlate` in the store, whose joint scenarios to score"
        ),
    ] = ""
    interval_ending: price_flags.IntervalEnding = False
    stamps_zone: price_flags.StampsZone = ""
    time_format: price_flags.TimeFormat = ""
    item: price_flags.Item = ""
    against: Annotated[
        str,
        typer.Option(
            metavar="COLUMN",
            help="column that forecasts the same price, such as an operator's, to score beside; may contain {target}",
        ),
    ] = ""
    online: Annotated[
        bool,
        typer.Option("--online", help="also replay the windows with adaptive bands, as `serve --actuals` has them"),
    ] = False
    refit: Annotated[
        int,
        typer.Option(
            metavar="DAYS",
            min=0,
            help="fit each archive's recipe anew so often to the rows before, as `retrain` does; 0: score the archives",
        ),
    ] = 0
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write a report with charts to this file")] = None
    as_json: Annotated[bool, typer.Option("--json", help="print the scores as JSON")] = False


@with_flags(BacktestFlags)
def backtest(flags: BacktestFlags) -> None:
    """Score archives on a price file with rolling windows: each forecast uses only what was known at its start.

    \b
    fleetcast backtest prices.csv --time hour --models ./models --html report.html
    fleetcast backtest prices.csv --time hour --models s3://models --url http://127.0.0.1:8080 --from 2024-01-01
    fleetcast backtest de.csv.gz --time hour --target price --models ./models --name-template de.mar --json

    Covariates known ahead are the columns that the archive names. pinball and CRPS are in the unit of the prices; wQL,
    WAPE, MASE and rMAE have none. rMAE divides the error by that of a naive forecast: the value a week before on
    Saturday, Sunday and Monday, else a day before (for daily prices always a week); below 1 is better than naive.
    Papers print rMAE (week), whose naive forecast is always the value a week before. MAE, RMSE, MAPE and sMAPE are of
    the median; MAPE leaves out prices of 0. There is no mean of prices in different units.
    With --scenarios, joint scenarios are drawn for each window as a server draws them, and the share of windows is told
    whose mean price lies outside all 100 of them: 2 % would be right. With --online the share is also told of
    scenarios from the moved levels, which is what a server draws that gets prices.
    --against scores the median beside a column: MAE, RMSE, the share of the column's MAE that is saved, and the test of
    Diebold and Mariano. With --online a second table has the coverage of each band as it is and as it would be if a
    server got each price in time, and the change of the pinball loss. Score prices that the archives were not trained
    on: `fleetcast train --train-until`. With --refit DAYS the archives only give their recipes: what forecasts is
    fitted to the rows before, anew every so many days, as a fleet that is retrained. Of an archive with several
    products, --target is the archive's own name, its products are columns of the file, and each has a row. The exit
    code is 1 when some markets could not be scored.
    """  # noqa: D301 -- click's mark for "do not wrap"
    with one_line_errors():
        found = _score_markets(flags)
        if flags.html is not None:
            from server.offline.evaluation_report import render_page  # noqa: PLC0415 -- an extra

            flags.html.write_text(render_page(found, write_command("backtest", flags)), encoding="utf-8")
    if flags.as_json:
        print(found.json(MEASURES).decode())  # noqa: T201
    else:
        _print_scores(found)
    for note, markets in found.notes().items():
        more = f" and {len(markets) - SHOWN} more" if len(markets) > SHOWN else ""
        print(escape_text(f"note: {', '.join(markets[:SHOWN])}{more}: {note}"), file=sys.stderr)  # noqa: T201
    for name, why in found.failed.items():
        print(escape_text(f"error: {name}: {why}"), file=sys.stderr)  # noqa: T201
    if found.failed:
        raise typer.Exit(BAD)


def _score_markets(flags: BacktestFlags) -> "Backtest":
    """Score what the flags mean. Raises LoadError, ValueError, OSError."""
    from server.offline.fleet_evaluation import backtest_fleet  # noqa: PLC0415 -- torch
    from server.offline.rolling_windows import InProcess, Rolling, ThroughServer  # noqa: PLC0415
    from server.offline.scenario_scores import fetch_correlation  # noqa: PLC0415

    if flags.online and flags.url:
        raise ValueError("--online replays in this process: leave out --url")
    if flags.refit and flags.url:
        raise ValueError("--refit forecasts in this process: leave out --url")
    settings = settings_from({"store": flags.models} if flags.models else {})
    first, last = parse_moment("--from", flags.since), parse_moment("--until", flags.until)
    most = flags.windows if flags.windows is not None else 0 if first else WINDOWS
    answers = ThroughServer(flags.url) if flags.url else InProcess()
    names = match_markets(flags.csv, flags.time, flags.target or (), settings, flags.name_template)
    rules = price_flags.make_file_rules(flags.interval_ending, flags.stamps_zone, flags.time_format, flags.item)
    rolling = Rolling(flags.every, most, first, last)
    correlation = fetch_correlation(parse_model_name(flags.scenarios), settings) if flags.scenarios else None
    with show_progress("scoring") as told:
        asked = (flags.csv, flags.time, names, settings, answers, rolling, told, rules, flags.against)
        return backtest_fleet(*asked, correlation=correlation, online=flags.online, refit_days=flags.refit)


def _print_scores(found: "Backtest") -> None:
    """Print the table of scores, what a calibration has changed, and the comparison with a column."""
    rich.print(_make_score_table(found, MEASURES, HEADINGS))
    rich.print(_make_score_table(found, tuple(POINTS), POINTS, title="of the median"))
    if any(each.online is not None for each in found.markets):
        rich.print(_make_online_table(found))
    for each in found.markets:
        if each.uncalibrated is not None:
            after, before = (format_score("coverage", one) for one in (each.scores.coverage, each.uncalibrated))
            print(escape_text(f"{each.target}: {after} covered, {before} before its calibration"))  # noqa: T201
        if each.outside_scenarios is not None:
            outside = f"{format_score('coverage', each.outside_scenarios)} of the windows have a mean"
            said = f"{outside} outside all {SCENARIOS} joint scenarios; 2.0% would be right"
            print(escape_text(f"{each.target}: {said}"))  # noqa: T201
        if each.online is not None and each.online.outside_scenarios is not None:
            outside = format_score("coverage", each.online.outside_scenarios)
            said = f"{outside} with adaptive bands, whose levels a server draws scenarios from"
            print(escape_text(f"{each.target}: {said}"))  # noqa: T201
    compared = [(each.target, each.against) for each in found.markets if each.against is not None]
    if compared:
        names = ", ".join(dict.fromkeys(other.column for _, other in compared))
        table = Table("market", *COMPARED, "n", title=verbatim(f"beside {names:.60}"))
        for column in table.columns[1:]:
            column.justify = "right"
        for target, other in compared:
            table.add_row(verbatim(target), *list_comparison(other), str(other.observed))
        rich.print(table)


def _make_score_table(
    found: "Backtest", measures: "Sequence[str]", headings: "Mapping[str, str]", title: str | None = None
) -> Table:
    """A table with a row for each market, and one for their mean, which prices in different units do not have."""
    promised = {each.scores.nominal for each in found.markets}
    interval = f"in {promised.pop():.0%}" if len(promised) == 1 else headings.get("coverage", "")
    heads = [interval if name == "coverage" else headings[name] for name in measures]
    table = Table("market", *heads, "n", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for each in found.markets:
        cells = [format_score(name, getattr(each.scores, name)) for name in measures]
        table.add_row(verbatim(each.target), *cells, str(each.windows))
    if len(found.markets) > 1:
        table.add_section()
        table.add_row("mean", *(format_score(name, found.mean(name)) for name in measures), "")
    return table


def _make_online_table(found: "Backtest") -> Table:
    """A table of the coverage of each band, fixed and adaptive, and of the pinball loss."""
    scored = [(each.target, each.online) for each in found.markets if each.online is not None]
    promised = sorted({band.nominal for _, online in scored for band in online.bands})
    table = Table("adaptive bands", *(f"in {each:.0%}" for each in promised), "pinball", "change", "drift alarms")
    for column in table.columns[1:]:
        column.justify = "right"
    for target, online in scored:
        bands = {band.nominal: f"{100 * band.fixed:.1f} > {100 * band.adaptive:.1f}" for band in online.bands}
        change = online.pinball_adaptive / online.pinball_fixed - 1 if online.pinball_fixed else 0.0
        table.add_row(
            verbatim(target),
            *(bands.get(each, "-") for each in promised),
            f"{online.pinball_fixed:.3f} > {online.pinball_adaptive:.3f}",
            f"{change:+.1%}",
            str(online.drift_alarms),
        )
    return table
