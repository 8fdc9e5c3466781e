"""`fleetcast retrain`: refits every archive of a fleet, publishes those that are no worse. Torch when it runs."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import msgspec
import rich
import typer
from rich.table import Table

from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, one_line_errors, show_progress, verbatim
from server.cli.train import archive_names
from server.offline.measures import Score

SHOWN = 40  #: markets in a table; of a larger fleet it shows only those that were not simply published


def retrain(
    csv: Annotated[Path, typer.Argument(metavar="CSV", help="file (.csv or .csv.gz) with a header, a row a time step")],
    *,
    time: Annotated[str, typer.Option(help="column of the time stamps, evenly spaced")],
    store: Annotated[str, typer.Option(help="of the archives: folder or URL; else as `serve` finds it")] = "",
    target: Annotated[
        list[str] | None, typer.Option(help="price column (repeatable); default: all that have an archive")
    ] = None,
    name_template: Annotated[str, typer.Option(help="an archive's name in the store")] = "{target}.mar",
    architecture: Annotated[str, typer.Option(help="change to this one; default: each keeps its own")] = "",
    config: Annotated[str, typer.Option(metavar="JSON", help="what that architecture leaves open")] = "{}",
    score: Annotated[Score, typer.Option(help="the gate's, lower is better")] = "pinball",
    margin: Annotated[float, typer.Option(min=0, help="percent that a new archive may be worse")] = 2.0,
    windows: Annotated[
        int, typer.Option(min=1, help="last windows, held back from the fit, that the gate looks at")
    ] = 28,
    epochs: Annotated[float, typer.Option(min=0, help="passes at most; 0: 20, more for a short series")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same archives")] = 0,
    threads: Annotated[int, typer.Option(min=1, max=256, help="cores to use, as far as there are targets")] = 1,
    reload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="management address of a server that is told of each new archive (repeatable)"
        ),
    ] = None,
    log: Annotated[
        Path,
        typer.Option(metavar="FILE.jsonl", help="what became of each market, a line each; also where a run goes on"),
    ] = Path("retrain.jsonl"),
) -> None:
    """Fit every archive of a fleet to newer prices; publish each that is no worse than the one in the store.

    \b
    fleetcast retrain prices.csv --time hour --store s3://models --reload http://127.0.0.1:8081
    fleetcast retrain prices.csv --time hour --store ./models --margin 0 --score crps --windows 56
    fleetcast retrain prices.csv --time hour --store ./models --architecture gru --log to-gru.jsonl

    Each market keeps its lengths, quantile levels and covariates, so its clients notice nothing; a running server swaps
    to a new version between two steps when --reload names it. New and old forecast the same last windows of the file,
    which the new one has not been fitted to. A market that fails, or would be worse, keeps what it has and stops no
    other. The same command goes on where a killed run has stopped. Ends with 1 when some markets failed.
    """  # noqa: D301 -- click's mark for "do not wrap"
    from handlers.training.fit import Fitting  # noqa: PLC0415 -- torch, here and below
    from server.offline.checkpoint import Checkpoint  # noqa: PLC0415
    from server.offline.fleet_evaluation import match_columns  # noqa: PLC0415
    from server.offline.promotion_gate import GateTerms  # noqa: PLC0415
    from server.offline.retraining import Outcome, Retraining, RetrainingPlan  # noqa: PLC0415
    from server.offline.rolling_windows import Rolling  # noqa: PLC0415

    with one_line_errors():
        settings = settings_from({"store": store} if store else {})
        names = archive_names(target, name_template) if target else match_columns(csv, time, settings, name_template)
        gate, fitting = GateTerms(score, margin, Rolling(most=windows)), Fitting(epochs, seed=seed, threads=threads)
        options = _parse_config(architecture, config)
        plan = RetrainingPlan(csv, time, names, settings, gate, fitting, architecture, options, reload or ())
        with Checkpoint(log, plan.digest, len(names)) as journal, show_progress("retraining") as told:
            told(journal.done, len(names))
            Retraining(plan).run(journal, lambda count: told(count, len(names)))
            outcomes = [msgspec.json.decode(line, type=Outcome) for line in journal.in_order()]
            journal.finish(log)
    counts = Counter(each.result for each in outcomes)
    shown = [each for each in outcomes if each.result != "published" or each.message or len(outcomes) <= SHOWN]
    if shown:
        rich.print(_make_outcome_table(shown))
    print(f"{', '.join(f'{count} {result}' for result, count in sorted(counts.items()))}: {log}")  # noqa: T201
    if counts["failed"]:
        raise typer.Exit(BAD)


def _make_outcome_table(outcomes: list[Any]) -> Table:
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


def _parse_config(architecture: str, text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict) or (found and not architecture):
        raise ValueError("--config: an object such as '{\"channels\": 32}' that goes with --architecture")
    return found
