"""`fleetcast tune` searches the recipe that forecasts a price file best. It imports torch when it runs."""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich
import typer
from rich.table import Table

from server.cli import price_flags
from server.cli.architecture_flags import parse_architecture
from server.cli.command_flags import with_flags
from server.cli.terminal import one_line_errors, verbatim
from server.cli.train import QUANTILES, TrainFlags, make_training_plan
from server.shell.escaping import escape_text
from server.shell.progress import watch_progress

if TYPE_CHECKING:
    from server.offline.tuning import Candidate, Tuned, TuningPlan

#: What is tried for days of hours and quarter-hours, likely ones first: the first round may not reach the last ones.
DAILY = (
    "--architecture lear",
    "--architecture lear:3",
    "--architecture ddnn",
    "--architecture lear:3,ddnn --stack",
    "--architecture lear:3,ddnn:2 --stack",
    "--architecture lear --scaling linear",
    "--architecture lear:3 --scaling linear",
    "--architecture lear:3,ddnn:2 --stack --scaling linear",
    "--architecture lear,lear:3,ddnn:2 --stack",
    "--architecture ddnn:2",
    "--architecture lear:5",
    "--architecture lear,ddnn --stack",
    """--architecture lear:3,ddnn:2 --stack --config '{"ddnn": {"hidden": 128}}'""",
    "--architecture lear:3,ddnn:4 --stack",
    """--architecture tcn --config '{"channels": 16}'""",
)
#: What is tried for other steps.
OTHER = (
    "--architecture tcn",
    """--architecture tcn --config '{"channels": 16}'""",
    "--architecture tcn --scaling linear",
    """--architecture mlp --config '{"hidden": 64}'""",
    "--architecture mlp",
    "--architecture tcn,mlp --stack",
    "--architecture tcn:2,mlp:2 --stack",
    "--architecture tcn:3",
    """--architecture tcn --config '{"channels": 64}'""",
)


DEFAULTS = {each.name: each.default for each in fields(TrainFlags)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneFlags:
    """The flags of `fleetcast tune`."""

    csv: price_flags.PriceFile
    time: price_flags.TimeColumn
    target: Annotated[list[str], typer.Option(help="price column, or pattern such as 'NSW*' (repeatable)")]
    known_future: Annotated[
        list[str] | None,
        typer.Option(
            help="column that is known in advance, such as a load forecast (repeatable); may contain {target}"
        ),
    ] = None
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FLAGS",
            help="recipe to try, as flags of train such as '--architecture tcn:3' (repeatable); default: a list",
        ),
    ] = None
    minutes: Annotated[float, typer.Option(min=0.1, help="time to search, test included")] = 30.0
    windows: Annotated[int, typer.Option(min=1, help="days of a block of windows that a fit is judged by")] = 28
    test: Annotated[
        int, typer.Option(min=1, help="last days of the file, by which nothing is chosen; the winner is scored there")
    ] = 28
    prediction_length: Annotated[
        int, typer.Option(min=0, help="number of steps to forecast; 0: chosen by the frequency, 24 for hours")
    ] = 0
    context_length: Annotated[int, typer.Option(min=0, help="number of past steps that are read; 0: the network's")] = 0
    quantiles: Annotated[str, typer.Option(help="quantile levels to forecast")] = QUANTILES
    seed: price_flags.FitSeed = 0
    threads: price_flags.FitThreads = 1
    time_zone: Annotated[str, typer.Option(metavar="ZONE", help="IANA time zone on whose clock is forecast")] = "UTC"
    interval_ending: price_flags.IntervalEnding = False
    stamps_zone: price_flags.StampsZone = ""
    time_format: price_flags.TimeFormat = ""
    item: price_flags.Item = ""
    out: Annotated[str, typer.Option(help="store in the command that is printed; nothing is written there")] = "models"
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write the leaderboard to this page")] = None
    log: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help="results of the fits; a repeated command continues from it")
    ] = Path("tune.jsonl")


@with_flags(TuneFlags)
def tune(flags: TuneFlags) -> None:
    """Find which recipe forecasts your prices best, by successive halving; print the command that trains it.

    \b
    fleetcast tune prices.csv --time hour --target NSW1 --known-future load_NSW1 --minutes 10 --html tune.html
    fleetcast tune prices.csv --time hour --target 'P*' --minutes 30 --threads 2
    fleetcast tune prices.csv --time t --target P --candidate '--architecture lear:3' --candidate '--architecture tcn'

    Every candidate is fitted to the rows before a block of windows and scored there, by twice the pinball loss in units
    of the seasonal error. Each round drops the worse half, and the next has as many more markets and earlier blocks as
    the time allows. The last --test days choose nothing: the winner and the first candidate are fitted once to all rows
    before them and scored there. Progress goes to standard error. An ended search is continued by the same command,
    also with more --minutes or other candidates; it does not repeat a fit.
    """  # noqa: D301 -- click's mark for "do not wrap"
    from server.offline.output_lock import hold_file  # noqa: PLC0415
    from server.offline.training import choose_architecture, read_prices  # noqa: PLC0415 -- torch
    from server.offline.tuning import Tuning  # noqa: PLC0415 -- torch
    from server.offline.tuning_journal import Journal  # noqa: PLC0415

    with one_line_errors():
        given = make_training_plan(_make_train_flags(flags))
        series = read_prices(given)
        daily = choose_architecture(series[0], flags.prediction_length) == "lear"
        candidates = [_parse_candidate(each) for each in flags.candidate or (DAILY if daily else OTHER)]
        plan = _make_plan(flags, candidates, given.options)
        with (
            hold_file(flags.log),
            Journal(flags.log, plan.digest(series)) as journal,
            watch_progress("tuning, seconds") as update,
        ):
            watch = partial(_watch_budget, update, 60 * plan.minutes)
            found = Tuning(plan, series, journal, _say, watch).run()
        command = _make_command(flags, found.board[0].candidate)
        if flags.html is not None:
            from server.offline.tuning_report import render_leaderboard  # noqa: PLC0415 -- an extra

            flags.html.write_text(render_leaderboard(found, flags.csv.name, command), encoding="utf-8")
    _print_board(found)
    print(command)  # noqa: T201


def _watch_budget(update: Callable[[float, int, str], None], budget: float, spent: float, candidate: str) -> None:
    """Show how much of the time for the search is used up; it may end sooner, or a little later."""
    update(min(spent, budget), round(budget), candidate)


def _make_train_flags(flags: TuneFlags) -> TrainFlags:
    """The flags by which `train` reads the same file."""
    return TrainFlags(
        csv=flags.csv,
        time=flags.time,
        target=flags.target,
        out=flags.out,
        known_future=flags.known_future,
        prediction_length=flags.prediction_length,
        context_length=flags.context_length,
        quantiles=flags.quantiles,
        time_zone=flags.time_zone,
        interval_ending=flags.interval_ending,
        stamps_zone=flags.stamps_zone,
        time_format=flags.time_format,
        item=flags.item,
    )


def _make_plan(flags: TuneFlags, candidates: Sequence["Candidate"], options: Mapping[str, object]) -> "TuningPlan":
    from handlers.training.fit import Fitting  # noqa: PLC0415 -- torch
    from server.offline.tuning import TuningPlan  # noqa: PLC0415 -- torch

    if len({each.name for each in candidates}) < len(candidates):
        raise ValueError("--candidate: two are equal")
    return TuningPlan(
        csv=flags.csv,
        candidates=candidates,
        minutes=flags.minutes,
        windows=flags.windows,
        test=flags.test,
        fitting=Fitting(seed=flags.seed, threads=flags.threads),
        prediction_length=flags.prediction_length,
        context_length=flags.context_length,
        options={name: value for name, value in options.items() if name not in ("scaling", "time_zone")},
    )


def _parse_candidate(text: str) -> "Candidate":
    """Parse flags of `train`. Raises ValueError."""
    from server.offline.tuning import Candidate  # noqa: PLC0415 -- torch

    words = shlex.split(text)
    found = {"--architecture": "", "--config": "{}", "--members": "1", "--scaling": "asinh", "--stack": ""}
    left = iter(words)
    for word in left:
        if word not in found:
            raise ValueError(f"--candidate {text!r}: {word!r} is none of {', '.join(found)}")
        found[word] = "yes" if word == "--stack" else next(left, "")
    if not found["--architecture"]:
        raise ValueError(f"--candidate {text!r}: it names no --architecture")
    if not found["--members"].isdecimal() or found["--scaling"] not in ("asinh", "linear"):
        raise ValueError(f"--candidate {text!r}: expected a number of --members, and --scaling asinh or linear")
    stack = bool(found["--stack"])
    parsed = parse_architecture(found["--architecture"], found["--config"], int(found["--members"]), stack=stack)
    return Candidate(tuple(words), *parsed, found["--scaling"])


def _make_command(flags: TuneFlags, winner: "Candidate") -> str:
    """The command that trains the winner on all rows, for a shell."""
    words = ["fleetcast", "train", str(flags.csv), "--time", flags.time]
    words += [word for each in flags.target for word in ("--target", each)]
    words += [word for each in flags.known_future or () for word in ("--known-future", each)]
    return shlex.join([*words, *_list_changed(flags), *winner.flags, "--out", flags.out])


def _list_changed(flags: TuneFlags) -> Iterator[str]:
    """The flags that both commands have and that are not the defaults."""
    for name in ("prediction_length", "context_length", "quantiles", "time_zone", "stamps_zone", "time_format", "item"):
        value, default = getattr(flags, name), DEFAULTS[name]
        if value != default:
            yield from (f"--{name.replace('_', '-')}", str(value))
    if flags.interval_ending:
        yield "--interval-ending"
    if flags.seed:
        yield from ("--seed", str(flags.seed))


def _say(text: str) -> None:
    print(escape_text(text), file=sys.stderr, flush=True)  # noqa: T201


def _print_board(found: "Tuned") -> None:
    from server.offline.tuning_report import COLUMNS, list_rows  # noqa: PLC0415 -- torch

    table = Table("candidate", *COLUMNS)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cells in list_rows(found):
        table.add_row(verbatim(name), *cells)
    rich.print(table)
    for name, why in found.failed.items():
        _say(f"note: {name}: {why}")
