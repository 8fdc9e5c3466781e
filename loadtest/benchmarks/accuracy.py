"""Accuracy of the forecasters on five day-ahead markets, fitted once or repeatedly, beside published forecasts.

fleetcast-load bench accuracy --data FOLDER --minutes 25

The markets and the test period (the last two years) are those of Lago et al. 2021 ("Forecasting day-ahead electricity
prices"); their daily forecasts are scored in the same run. The last 20 days are the windows of fev-bench. FOLDER has
NP.csv.gz (datetime_local, price, exog1, exog2), NP_reference_forecasts.csv.gz and so on. Fits are saved, so a run that
was interrupted continues; the record lists what did not fit into the given minutes.
"""

import json
import subprocess
import sys
import tempfile
import time as clock
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import TimeoutError as NotYet
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import rich
import torch
import typer

from loadtest import flags, record
from loadtest.benchmarks.accuracy_scores import (
    FEV,
    FEV_DAYS,
    LEAR,
    LINEAR,
    MORE_WINDOWS,
    RECIPES,
    TCN,
    WINDOWS,
    assess_market,
)
from loadtest.benchmarks.rolling_refits import (
    DAYS,
    KNOWN,
    MARKETS,
    TARGET,
    TIME,
    Recipe,
    Refits,
    Task,
    find_period_start,
    read_market,
    schedule_refits,
)
from loadtest.report.accuracy import build_tables, render_accuracy_page
from loadtest.report.terminal import render_table

ONCE = {"NP": 0.63, "PJM": 0.63, "BE": 0.82, "FR": 0.75, "DE": 0.50}  #: upper bound of the rMAE of a single fit
SCORING_S = 20  #: seconds of the given minutes that are kept for scoring
SAID_S = 15  #: seconds between two lines of progress
SAME = 1e-3  #: tolerance of the MAE between our commands and a fit here, because quantiles are sent as JSON

# WQL by the benchmark's own results, github.com/autogluon/fev at 1bc95fd, benchmarks/fev_bench/results; 30 models
# are there: the best by the mean of the five markets, all that are the best of one, and two well-known ones.
PUBLISHED_WQL = {
    "PatchTST": {"NP": 0.0288, "PJM": 0.0641, "BE": 0.0982, "FR": 0.0501, "DE": 0.2030},
    "TiRex-2": {"NP": 0.0277, "PJM": 0.0655, "BE": 0.0958, "FR": 0.0523, "DE": 0.2188},
    "Chronos-2": {"NP": 0.0297, "PJM": 0.0668, "BE": 0.0902, "FR": 0.0548, "DE": 0.2407},
    "TabPFN-TS-3": {"NP": 0.0287, "PJM": 0.0666, "BE": 0.0925, "FR": 0.0550, "DE": 0.2507},
    "TabPFN-TS": {"NP": 0.0301, "PJM": 0.0748, "BE": 0.0955, "FR": 0.0489, "DE": 0.2519},
    "TS-ICL": {"NP": 0.0363, "PJM": 0.0683, "BE": 0.0855, "FR": 0.0556, "DE": 0.2784},
    "TFT": {"NP": 0.0316, "PJM": 0.0602, "BE": 0.1075, "FR": 0.0591, "DE": 0.2384},
    "DeepAR": {"NP": 0.0371, "PJM": 0.0619, "BE": 0.1099, "FR": 0.0608, "DE": 0.2674},
    "Seasonal Naive": {"NP": 0.0692, "PJM": 0.0908, "BE": 0.2013, "FR": 0.1818, "DE": 0.5919},
}


class Stage(NamedTuple):
    """Fits of one recipe in every market, from test day `first` on."""

    recipe: Recipe
    every: int
    first: int = 0

    def __str__(self) -> str:
        often = "once" if self.every == DAYS else f"every {self.every} days"
        return f"{self.recipe.name} {often}" + (f" in the last {DAYS - self.first} days" if self.first else "")


#: The most valuable stages come first, because the last ones may not fit into the given minutes.
STAGES = (
    *(Stage(each, DAYS) for each in RECIPES),
    *(Stage(each, DAYS, DAYS - FEV_DAYS) for each in FEV),
    *(Stage(each, every) for every in (364, 91) for each in RECIPES),
    *(Stage(each, every) for every in (28, 7) for each in (LEAR, WINDOWS, MORE_WINDOWS, LINEAR)),
    *(Stage(each, 1, DAYS - FEV_DAYS) for each in FEV[:2]),
    Stage(TCN, 28),
    Stage(WINDOWS, 1),
)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    *,
    data: Annotated[Path, typer.Option(exists=True, file_okay=False, help="folder of the markets' files")],
    markets: Annotated[str, typer.Option(help="markets to run, comma-separated")] = ",".join(MARKETS),
    minutes: Annotated[float, typer.Option(min=0.5, help="time limit; remaining fits are left out")] = 25.0,
    processes: Annotated[int, typer.Option(min=1, max=256, help="number of fits at a time, each on one core")] = 2,
    keep: Annotated[Path, typer.Option(help="folder of finished fits")] = Path(".fleetcast/accuracy"),
    html: Annotated[Path, typer.Option(help="write the curves and tables to this page")] = Path(
        ".fleetcast/accuracy.html"
    ),
    save: flags.SaveRecord = True,
) -> None:
    """Fit, forecast, score, and compare with published results. The exit code is 1 if a market misses a bound."""
    started, before = clock.monotonic(), record.describe_machine()
    names = [name for name in MARKETS if name in markets.split(",")]
    if not names:
        raise typer.BadParameter(f"--markets: expected some of {', '.join(MARKETS)}, not {markets!r}")
    refits = Refits(data, keep)
    checked = run_commands(data, names, processes)
    until = started + 60 * minutes - SCORING_S
    tasks = list(dict.fromkeys(task for stage in STAGES for task in _stage_tasks(stage, names)))
    fits = run_tasks(refits, [task for task in tasks if not refits.has(task)], processes, until)
    found = {name: assess_market(data, refits, name) for name in names}
    results = {
        "test_days": DAYS,
        "minutes": round((clock.monotonic() - started) / 60, 2),
        "processes": processes,
        "fits": sum(map(refits.has, tasks)),
        "fits_of_this_run": fits,
        "commands": {each.name: ["fleetcast", "train", "...", *each.flags] for each in RECIPES},
        "commands_mae": checked,
        "not_reached": [
            f"{stage}: {missing}" for stage in STAGES if (missing := _describe_missing(refits, stage, names))
        ],
        "published_wql": PUBLISHED_WQL,
        "once_below": {name: ONCE[name] for name in names},
        "markets": found,
    }
    _show_results(results)
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(render_accuracy_page(record.make_record("accuracy", 0, before, results)), encoding="utf-8")
    print(f"page: {html}" + (f", record: {record.save_record('accuracy', 0, before, results)}" if save else ""))
    if wrong := list_failures(found, checked):
        raise SystemExit("\n".join(wrong))


def run_tasks(refits: Refits, tasks: Sequence[Task], processes: int, until: float) -> int:
    """Run the tasks in order until the time `until`, when running fits are dropped. Returns how many were done."""
    done, spent, said = 0, defaultdict[str, float](float), clock.monotonic()
    with get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool, suppress(StopIteration, NotYet):
        results = pool.imap_unordered(partial(_do_task, refits), tasks)
        while True:
            task, seconds = results.next(max(0.0, until - clock.monotonic()))
            done += 1
            spent[task.recipe.name] += seconds
            if clock.monotonic() - said > SAID_S or done == len(tasks):
                said = clock.monotonic()
                cost = ", ".join(f"{name} {total:.0f} s" for name, total in spent.items())
                last = f"{task.market} {task.recipe.name} day {task.day}"
                print(
                    f"{done} of {len(tasks)} fits, {(until - said) / 60:.1f} minutes left, {last}; {cost}", flush=True
                )
    return done


def run_commands(data: Path, names: Sequence[str], processes: int) -> dict[str, float]:
    """Return the MAE of the test period by `fleetcast train` and `fleetcast backtest`, which fits here must match."""

    def one(name: str) -> float:
        series, csv_file = read_market(data, name), str(data / f"{name}.csv.gz")
        since = series.stamp(find_period_start(series))
        fleetcast = [sys.executable, "-P", "-m", "server.cli.main"]
        of = [csv_file, "--time", TIME, "--target", TARGET]
        known = [part for column in KNOWN for part in ("--known-future", column)]
        with tempfile.TemporaryDirectory(prefix="fleetcast-accuracy-") as store:
            train = [*fleetcast, "train", *of, *known, *LEAR.flags, "--out", store, "--train-until", since]
            subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
            ask = [*fleetcast, "backtest", *of, "--models", store, "--from", since, "--json"]
            answer = subprocess.run(ask, check=True, capture_output=True, text=True).stdout
        (scored,) = json.loads(answer)["markets"]
        actual = series.values[find_period_start(series) :]
        return float(scored["scores"]["wape"] * np.abs(actual).mean())

    with ThreadPoolExecutor(processes) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def list_failures(found: Mapping[str, Any], checked: Mapping[str, float]) -> list[str]:
    """List in words which bounds are missed, and which fits differ from the results of our commands."""
    wrong = []
    for name, each in found.items():
        once = {row["name"]: row for row in each["rows"] if row["every"] == DAYS}
        if LEAR.name not in once:
            continue
        if once[LEAR.name]["rmae"] > ONCE[name]:
            wrong.append(f"{name}: fitted once, rMAE {once[LEAR.name]['rmae']:.3f} is above {ONCE[name]}")
        if abs(once[LEAR.name]["mae"] / checked[name] - 1) > SAME:
            wrong.append(f"{name}: MAE {once[LEAR.name]['mae']:.4f}, but by train and backtest {checked[name]:.4f}")
    return wrong


def _stage_tasks(stage: Stage, names: Sequence[str]) -> Iterator[Task]:
    """List the tasks by day, not by market, so that an unfinished stage has fits of all markets."""
    for together in zip(*(schedule_refits(name, *stage) for name in names), strict=True):
        yield from together


def _do_task(refits: Refits, task: Task) -> tuple[Task, float]:
    return task, refits.done(task)


def _describe_missing(refits: Refits, stage: Stage, names: Sequence[str]) -> str:
    """Describe missing fits, for example `12 of 104 fits of NP`."""
    done = {name: [refits.has(task) for task in schedule_refits(name, *stage)] for name in names}
    return ", ".join(
        f"{each.count(False)} of {len(each)} fits of {name}" for name, each in done.items() if not all(each)
    )


def _show_results(results: Mapping[str, Any]) -> None:
    for table in build_tables(results):
        rich.print(render_table(table))
    print("\n".join(f"not reached: {each}" for each in results["not_reached"]))
