"""`fleetcast retrain` refits every archive of a fleet and publishes those that are no worse. It imports torch late."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import rich
import typer
from rich.table import Table

from server.cli import architecture_flags, price_flags
from server.cli.architecture_flags import parse_architecture
from server.cli.command_flags import with_flags
from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, one_line_errors, verbatim
from server.cli.train import match_markets
from server.shell.escaping import escape_text
from server.shell.progress import watch_progress

if TYPE_CHECKING:
    from server.offline.retraining import Outcome, RetrainingPlan

SHOWN = 40  #: most markets that are all listed; for a larger fleet only those with a message or not published are


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainFlags:
    """The flags of `fleetcast retrain`."""

    csv: price_flags.PriceFile
    time: price_flags.TimeColumn
    store: Annotated[str, typer.Option(help="folder or store URL of the archives; default: the store of `serve`")] = ""
    target: price_flags.ArchivedTargets = None
    name_template: price_flags.NameTemplate = price_flags.NAME_TEMPLATE
    architecture: Annotated[
        str, typer.Option(help="architecture of the new archives; default: that of the old one")
    ] = ""
    stack: architecture_flags.Stack = False
    config: Annotated[
        str, typer.Option(metavar="JSON", help="config fields of --architecture that differ from its defaults")
    ] = "{}"
    residual_to: price_flags.ResidualTo = ""
    score: price_flags.GateScore = "pinball"
    margin: price_flags.GateMargin = price_flags.GATE_MARGIN
    windows: Annotated[
        int, typer.Option(min=1, help="number of last windows that the gate compares; they are held back from the fit")
    ] = price_flags.GATE_WINDOWS
    calibrate: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="DAYS",
            help="last days that all bands are calibrated by; 0: only those that are calibrated, as before",
        ),
    ] = 0
    epochs: price_flags.Epochs = 0.0
    half_life: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="DAYS",
            help="prices so many days older count half in the fit, 0: all count alike; default: as each archive's own",
        ),
    ] = None
    seed: price_flags.FitSeed = 0
    threads: price_flags.FitThreads = 1
    interval_ending: price_flags.IntervalEnding = False
    stamps_zone: price_flags.StampsZone = ""
    time_format: price_flags.TimeFormat = ""
    item: price_flags.Item = ""
    keep_worse: Annotated[
        bool,
        typer.Option("--keep-worse", help="publish an archive too whose holdout loss is that of the naive or worse"),
    ] = False
    reload: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="management address of a server that reloads each new archive (repeatable)"),
    ] = None
    log: Annotated[
        Path,
        typer.Option(
            metavar="FILE.jsonl",
            help="record to which the result of each market is added; a repeated command continues",
        ),
    ] = Path("retrain.jsonl")


@with_flags(RetrainFlags)
def retrain(flags: RetrainFlags) -> None:
    """Fit every archive of a fleet to newer prices; publish each that is no worse than the one in the store.

    \b
    fleetcast retrain prices.csv --time hour --store s3://models --reload http://127.0.0.1:8081
    fleetcast retrain prices.csv --time hour --store ./models --margin 0 --score crps --windows 56
    fleetcast retrain prices.csv --time hour --store ./models --architecture gru --log to-gru.jsonl
    fleetcast retrain prices.csv --time hour --store ./models --calibrate 56

    Each market keeps its lengths, quantile levels and covariates, so that clients need not change; only --residual-to
    adds a covariate, the column whose error every market then learns, as in `fleetcast train`. A server that
    --reload names swaps to the new version between two steps. The gate lets the old and the new archive forecast the
    same last windows of the file, to which the new one was not fitted. With --calibrate these days are held back too;
    from the errors there each level learns how far it is off (see `fleetcast calibrate`). A market that fails, or would
    be worse, keeps its old archive, and the others continue; so does one that is no better than the naive forecast,
    which is an error unless --keep-worse is given. The same command continues a run that was killed; two runs cannot
    have the same log at a time. With other logs they can: each archive is published as a whole, and the last one stays.
    A market of which nothing has changed since it was settled (prices, archive, flags) is not fitted again. The exit
    code is 1 when some markets failed.
    """  # noqa: D301 -- click's mark for "do not wrap"
    from server.offline.checkpoint import Checkpoint  # noqa: PLC0415 -- torch, here and below
    from server.offline.output_lock import hold_file  # noqa: PLC0415
    from server.offline.retraining import Outcome, Retraining, read_last_outcomes  # noqa: PLC0415

    log = flags.log
    with one_line_errors():
        plan = _make_plan(flags)
        with (
            hold_file(log),
            Checkpoint(log, plan.digest, len(plan.names)) as journal,
            watch_progress("retraining") as update,
        ):
            total = len(plan.names)
            update(journal.done, total, "")
            retraining = Retraining(plan, lambda fitted, note: update(min(total, journal.done + fitted), total, note))
            retraining.run(journal, lambda _: update(journal.done, total, ""), read_last_outcomes(log))
            outcomes = [msgspec.json.decode(line, type=Outcome) for line in journal.in_order()]
            journal.finish(log, append=True)
    _report_outcomes(outcomes, log)
    if any(each.result == "failed" for each in outcomes):
        raise typer.Exit(BAD)


def _make_plan(flags: RetrainFlags) -> "RetrainingPlan":
    """Check the flags, and look up in the store which markets they mean. Raises ValueError, LoadError, OSError."""
    from handlers.training.fit import Fitting  # noqa: PLC0415 -- torch, here and below
    from server.offline.promotion_gate import GateTerms  # noqa: PLC0415
    from server.offline.retraining import RetrainingPlan  # noqa: PLC0415
    from server.offline.rolling_windows import Rolling  # noqa: PLC0415

    settings = settings_from({"store": flags.store} if flags.store else {})
    architecture, config = parse_architecture(flags.architecture, flags.config, stack=flags.stack)
    if config and not architecture:
        raise ValueError("--config goes with --architecture")
    return RetrainingPlan(
        csv=flags.csv,
        time=flags.time,
        names=match_markets(flags.csv, flags.time, flags.target or (), settings, flags.name_template),
        settings=settings,
        gate=GateTerms(flags.score, flags.margin, Rolling(most=flags.windows)),
        fitting=Fitting(flags.epochs, seed=flags.seed, threads=flags.threads),
        half_life=flags.half_life,
        architecture=architecture,
        config=config,
        servers=flags.reload or (),
        rules=price_flags.make_file_rules(flags.interval_ending, flags.stamps_zone, flags.time_format, flags.item),
        keep_worse=flags.keep_worse,
        residual_to=flags.residual_to,
        calibrate=flags.calibrate,
    )


def _report_outcomes(outcomes: Sequence["Outcome"], log: Path) -> None:
    """Print what became of the markets: a table, the notes of several, and a line of counts."""
    counts = Counter(each.result for each in outcomes)
    shown = [each for each in outcomes if each.result != "published" or each.message or len(outcomes) <= SHOWN]
    if shown:
        rich.print(_make_outcome_table(shown))
    for note, count in Counter(each.note for each in outcomes if each.note).items():
        print(escape_text(f"note: {count} of {len(outcomes)} markets: {note}"), file=sys.stderr)  # noqa: T201
    print(f"{', '.join(f'{count} {result}' for result, count in sorted(counts.items()))}: {log}")  # noqa: T201


def _make_outcome_table(outcomes: Sequence["Outcome"]) -> Table:
    table = Table("market", "result", "score", "before", "worse by", "")
    for each in outcomes:
        numbers = (
            _format_cell("{:.4g}", each.value),
            _format_cell("{:.4g}", each.predecessor),
            _format_cell("{:+.1f} %", each.worse_percent),
        )
        table.add_row(verbatim(each.target), each.result, *numbers, verbatim(each.message))
    return table


def _format_cell(shape: str, value: float | None) -> str:
    return "" if value is None else shape.format(value)
