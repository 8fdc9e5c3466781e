"""`fleetcast calibrate` lets the bands of archives hold what they promise. It imports torch when it runs."""

import sys
from typing import TYPE_CHECKING, Annotated

import rich
import typer
from rich.table import Table

from server.cli import price_flags
from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, one_line_errors, verbatim
from server.cli.train import match_markets
from server.offline.measures import format_score
from server.shell.escaping import escape_text
from server.shell.progress import show_progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from server.offline.calibration import Calibrated


def calibrate(
    csv: price_flags.PriceFile,
    *,
    time: price_flags.TimeColumn,
    target: price_flags.ArchivedTargets = None,
    models: Annotated[
        str, typer.Option(metavar="STORE", help="folder or store URL of the archives; default: the store of `serve`")
    ] = "",
    name_template: price_flags.NameTemplate = price_flags.NAME_TEMPLATE,
    days: Annotated[
        int, typer.Option(min=28, max=3660, help="most days at the end of the file to learn from")
    ] = price_flags.CALIBRATION_DAYS,
    interval_ending: price_flags.IntervalEnding = False,
    stamps_zone: price_flags.StampsZone = "",
    time_format: price_flags.TimeFormat = "",
    item: price_flags.Item = "",
) -> None:
    """Shift the quantile levels of archives so that their bands hold the promised share of prices, and publish them.

    \b
    fleetcast calibrate prices.csv --time hour --models ./models
    fleetcast calibrate prices.csv --time hour --models s3://models --target NSW1 --days 56

    Each archive forecasts the last days of the file that it was not fitted to. Each of its levels is then shifted, for
    each hour of the day, by the quantile that past prices had relative to it, in widths of the forecast's own band. The
    offsets travel in the archive; a server applies them to every forecast. The table compares both on the days after
    the first 56, calibrated anew each week by the days before; it has no numbers where the file has fewer new days. An
    archive that was fitted to the whole file cannot be calibrated with it: use `fleetcast retrain --calibrate`. Of an
    archive with several products, --target is the archive's own name, its products are columns of the file, and each
    has its offsets. Sample paths are shifted by their rank at each step. The exit code is 1 when some markets could not
    be calibrated.
    """  # noqa: D301 -- click's mark for "do not wrap"
    from server.offline.calibration import calibrate_fleet  # noqa: PLC0415 -- torch

    with one_line_errors():
        settings = settings_from({"store": models} if models else {})
        names = match_markets(csv, time, target or (), settings, name_template)
        rules = price_flags.make_file_rules(interval_ending, stamps_zone, time_format, item)
        with show_progress("calibrating") as told:
            found, failed = calibrate_fleet(csv, time, names, settings, days, told, rules)
    if found:
        rich.print(_make_table(found))
    for note in dict.fromkeys(filter(None, (each.note for each in found.values()))):
        print(escape_text(f"note: {note}"), file=sys.stderr)  # noqa: T201
    for name, why in failed.items():
        print(escape_text(f"error: {name}: {why}"), file=sys.stderr)  # noqa: T201
    if failed:
        raise typer.Exit(BAD)


def _make_table(found: "Mapping[str, Calibrated]") -> Table:
    table = Table("market", "promised", "covered before", "after", "pinball before", "after", "days")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, each in found.items():
        before, after = each.before, each.after
        pairs = [
            format_score(measure, getattr(scores, measure) if scores else None)
            for measure in ("coverage", "pinball")
            for scores in (before, after)
        ]
        promised = format_score("coverage", before.nominal if before else None)
        table.add_row(verbatim(name), promised, *pairs, str(each.days))
    return table
