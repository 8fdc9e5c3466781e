"""What one archive reaches in day-ahead markets when it is fitted anew again and again, beside the project's goals.

fleetcast-load bench goals --data FOLDER --refit 28

For each market of Lago et al. 2021 the commands of a user are run: `train` on the rows before the test period, then
`backtest --refit --online --scenarios --against` over it, and `retrain` beside a fresh `train`. FOLDER has NP.csv.gz,
NP_reference_forecasts.csv.gz and so on, as for `bench accuracy`. `--german FILE` adds the German prices of 2015 to 2020
of Marcjasz et al. 2023 ("Distributional neural networks for electricity price forecasting"; Datasets/DE.csv of
github.com/gmarcjasz/distributionalnn), whose test period is 2019-06-27 to 2020-12-31. The record is written after each
market, and has all markets that runs of the same commit and options have finished: markets can be run one by one, and
an interrupted run goes on. A goal that is missed is said, and is no failure of the run.
"""

import csv
import gzip
import json
import subprocess
import sys
import tempfile
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, fsum, log
from pathlib import Path
from typing import Annotated, Any

import rich
import typer

from loadtest import flags, record
from loadtest.benchmarks.accuracy import PUBLISHED_WQL
from loadtest.benchmarks.accuracy_scores import DECILES, FEV_DAYS, RIVAL, list_last_fits, score_last_days
from loadtest.benchmarks.rolling_refits import DAYS, HOURS, KNOWN, MARKETS, TARGET, TIME, Recipe, Refits
from loadtest.report.tables import ReportTable
from loadtest.report.terminal import render_table

RMAE = {"NP": 0.505, "PJM": 0.585, "BE": 0.715, "FR": 0.635, "DE": 0.410}
OFF_BY = 0.02  #: most that the coverage of an adaptive band may miss what it promises
PROMISED = (0.5, 0.8, 0.9)
LOSS = 0.005  #: most that adaptive bands may add to the pinball loss, as a share
OUTSIDE = (0.01, 0.04)  #: share of days whose mean lies outside all 100 scenarios; 2 % would be right
FRESH = 0.003  #: most that a retrained archive may differ from a fresh fit, as a share of its MAE
WQL = 0.405  #: of Seasonal Naive's, the geometric mean of five markets
CHECKED_DAYS = 91  #: days of the comparison of `retrain` with a fresh fit

GERMAN, GERMAN_DAYS = "DE 2015-2020", 554
GERMAN_KNOWN = ("Load_DA_Forecast", "Renewables_DA_Forecast")
#: Half of our CRPS is the mean pinball loss over all levels, which the paper prints as CRPS. It has no MAE of LEAR-QRA.
GERMAN_GOALS = {"crps": 1.27, "mae": 3.48}
GERMAN_PUBLISHED = {"LEAR-QRA": 1.575, "DNN-QRA": 1.399, "DDNN": 1.299}

Row = dict[str, str]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class Case:
    """A market as one file for the commands. `rival`: its column of published forecasts, empty where there is none."""

    name: str
    rows: Sequence[Row]
    known: Sequence[str]
    days: int
    rival: str = ""

    def __repr__(self) -> str:
        return f"<Case {self.name}: {len(self.rows)} rows>"

    def stamp(self, days_before: int) -> str:
        """Return the first stamp of the last so many days."""
        return self.rows[-HOURS * days_before][TIME]


@dataclass(frozen=True, slots=True)
class Run:
    """What runs of one commit and these options have finished: a file for each market in the folder `keep`."""

    keep: Path
    architecture: str
    refit: int
    days: int

    def __repr__(self) -> str:
        return f"<Run of {self.architecture} every {self.refit} days in {self.keep}>"

    @property
    def recipe(self) -> Recipe:
        """The same archive with deciles, which fev-bench scores."""
        parts = [_read_part(each) for each in self.architecture.split(",")]
        if len(parts) > 1:
            mixed = json.dumps({"parts": parts, "stack": True})
            return Recipe(self.architecture, "mixture", config=mixed, levels=DECILES, parts=self.architecture)
        ((name, members),) = ((part.pop("architecture"), part.pop("members", 1)) for part in parts)
        return Recipe(self.architecture, name, members, levels=DECILES)

    def refits(self, data: Path) -> Refits:
        """The fits before fev-bench's windows."""
        return Refits(data, self.keep / "fits")

    def finish(self, case: Case) -> None:
        """Run a market that no run of this commit has finished."""
        path = self._path(case.name, case.days)
        if path.exists():
            return
        found = assess_case(case, self.architecture, self.refit)
        path.write_text(json.dumps(found))
        print(f"{case.name}: rMAE {found['rmae']:.3f}, MAE {found['mae']:.3f}, {found['s']} s", flush=True)

    def collect(self, data: Path) -> dict[str, Any]:
        """Collect the markets that are finished, and judge them."""
        days = dict.fromkeys(MARKETS, self.days) | {GERMAN: GERMAN_DAYS}
        paths = {name: self._path(name, of) for name, of in days.items()}
        found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
        refits, wql = self.refits(data), dict[str, float]()
        for name in MARKETS:
            fits = list_last_fits(name, self.recipe, self.refit)
            if name in found and self.days == DAYS and all(map(refits.has, fits)):
                wql[name] = score_last_days(data, refits, name, self.recipe, self.refit)
        return {
            "architecture": self.architecture,
            "refit_days": self.refit,
            "minutes": round(sum(each["s"] for each in found.values()) / 60, 1),
            "markets": found,
            "wql": wql,
            "goals": [*judge_markets(found), *judge_wql(wql)],
        }

    def _path(self, name: str, days: int) -> Path:
        mark = f"{record.find_commit()[:12]}-{self.architecture}-{self.refit}-{days}-{name}"
        return self.keep / f"{mark.replace(' ', '_').replace(':', '')}.json"


@app.command()
def main(
    *,
    data: Annotated[Path, typer.Option(exists=True, file_okay=False, help="folder of the markets' files")],
    markets: Annotated[str, typer.Option(help="markets to run, comma-separated")] = ",".join(MARKETS),
    german: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="German prices of Marcjasz et al. 2023")
    ] = None,
    architecture: Annotated[str, typer.Option(help="of the archive")] = "lear:3,ddnn,ddnn@linear",
    refit: Annotated[int, typer.Option(min=1, help="days between two fits")] = 28,
    days: Annotated[int, typer.Option(min=2, help="last days to score; 728 are the papers'")] = DAYS,
    keep: Annotated[Path, typer.Option(help="folder of the markets that are done, and of finished fits")] = Path(
        ".fleetcast/goals"
    ),
    save: flags.SaveRecord = True,
) -> None:
    """Fit, forecast and score, and say which goals are reached and which are missed by how much."""
    before = record.describe_machine()
    names = [name for name in MARKETS if name in markets.split(",")]
    if not names and german is None:
        raise typer.BadParameter(f"--markets: expected some of {', '.join(MARKETS)}, not {markets!r}")
    keep.mkdir(parents=True, exist_ok=True)
    run = Run(keep, architecture, refit, days)
    for name in names:
        run.finish(read_case(data, name, days))
        if days == DAYS:
            score_last_days(data, run.refits(data), name, run.recipe, refit)
        if save:
            record.save_record("goals", 0, before, run.collect(data))
    if german:
        run.finish(read_german(german))
    results = run.collect(data)
    for table in build_tables(results):
        rich.print(render_table(table))
    if save:
        print(f"record: {record.save_record('goals', 0, before, results)}")


def read_case(data: Path, name: str, days: int) -> Case:
    """Read a market with the published forecasts of its rival as one more column. Raises OSError, KeyError."""
    rows = _read_rows(data / f"{name}.csv.gz")
    published = {row[TIME]: row[RIVAL] for row in _read_rows(data / f"{name}_reference_forecasts.csv.gz")}
    return Case(name, [{**row, RIVAL: published.get(row[TIME], "")} for row in rows], KNOWN, days, RIVAL)


def read_german(path: Path) -> Case:
    """Read the German prices. Fuel prices are left out, which that day's auction does not know yet. Raises KeyError."""
    columns = {TIME: "", TARGET: "Price", **dict(zip(GERMAN_KNOWN, GERMAN_KNOWN, strict=True))}
    rows = [{ours: row[theirs] for ours, theirs in columns.items()} for row in _read_rows(path)]
    return Case(GERMAN, rows, GERMAN_KNOWN, GERMAN_DAYS)


def assess_case(case: Case, architecture: str, refit: int) -> dict[str, Any]:
    """Run the commands for one market, and collect their scores."""
    with tempfile.TemporaryDirectory(prefix="fleetcast-goals-") as folder:
        work = Path(folder)
        whole, past = work / "prices.csv", work / "past.csv"
        _write_rows(whole, case.rows)
        _write_rows(past, case.rows[: -HOURS * case.days])
        old, new, test = work / "old", work / "new", case.stamp(case.days)
        since = case.stamp(case.days + case.days // 2)
        started = clock.monotonic()
        _train(case, whole, old, architecture, since)
        _train(case, whole, new, architecture, test)
        of_past = [str(past), "--time", TIME, "--target", TARGET]
        _run("correlate", *of_past, "--store", str(old), "--since", since, "--out", str(new / "joint.mar"))
        more = ["--against", case.rival] if case.rival else []
        asked = ["--online", "--scenarios", "joint.mar", "--refit", str(refit), *more]
        scored = _backtest(whole, new, test, *asked)
        _run("retrain", *of_past, "--store", str(old), "--log", str(work / "log.jsonl"), "--margin", "100")
        end = ["--until", case.stamp(case.days - CHECKED_DAYS)] if case.days > CHECKED_DAYS else []
        again, fresh = (_backtest(whole, store, test, *end)["scores"]["mae"] for store in (old, new))
    return {**_summarise(scored), "retrained_mae": again, "fresh_mae": fresh, "s": round(clock.monotonic() - started)}


def judge_markets(found: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """List each goal of each market with what was reached, and whether that is enough."""
    for name, each in found.items():
        if name in RMAE:
            yield _judge(f"{name}: rMAE", each["rmae"], at_most=RMAE[name])
        if name == GERMAN:
            yield _judge(f"{name}: CRPS as the paper has it", each["crps"] / 2, at_most=GERMAN_GOALS["crps"])
            yield _judge(f"{name}: MAE", each["mae"], at_most=GERMAN_GOALS["mae"])
        for band in each["bands"]:
            if band["nominal"] in PROMISED:
                off = abs(band["adaptive"] - band["nominal"])
                yield _judge(f"{name}: band of {band['nominal']:.0%} is off by", off, at_most=OFF_BY)
        change = each["pinball_adaptive"] / each["pinball"] - 1
        yield _judge(f"{name}: adaptive bands add to the pinball loss", change, at_most=LOSS)
        low, high = OUTSIDE
        outside = each["outside_scenarios"]
        yield _judge(f"{name}: days outside all scenarios", outside, at_least=low, at_most=high)
        differs = abs(each["retrained_mae"] / each["fresh_mae"] - 1)
        yield _judge(f"{name}: retrain differs from a fresh fit by", differs, at_most=FRESH)


def judge_wql(wql: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Judge the geometric mean of the WQL beside that of Seasonal Naive, where all five markets are there."""
    if set(wql) == set(MARKETS):
        yield _judge("fev-bench's five: WQL beside Seasonal Naive", compute_relative_wql(wql), at_most=WQL)


def compute_relative_wql(wql: Mapping[str, float]) -> float:
    """Return the geometric mean over markets of the WQL beside Seasonal Naive's."""
    naive = PUBLISHED_WQL["Seasonal Naive"]
    return exp(fsum(log(each / naive[name]) for name, each in wql.items()) / len(wql))


def build_tables(results: Mapping[str, Any]) -> Iterator[ReportTable]:
    """Make tables of the scores by market, and of the goals."""
    found = results["markets"]
    says = f"{results['architecture']} --stack, fitted anew every {results['refit_days']} days"
    points = {"rmae": "rMAE", "rmae_weekly": "rMAE (week)", "mae": "MAE", "rmse": "RMSE", "crps": "CRPS"}
    rows = [
        [name, *(f"{each[key]:.3f}" for key in points), f"{each['p_rival']:.2g}" if "p_rival" in each else "-"]
        for name, each in found.items()
    ]
    yield ReportTable("One archive", ["market", *points.values(), f"p, {RIVAL}"], rows, says)
    bands = [band["nominal"] for band in next(iter(found.values()))["bands"] if band["nominal"] in PROMISED]
    rows = [
        [
            name,
            *(f"{100 * band['fixed']:.1f} > {100 * band['adaptive']:.1f}" for band in each["bands"]
              if band["nominal"] in PROMISED),
            f"{each['pinball']:.3f} > {each['pinball_adaptive']:.3f}",
            f"{each['outside_scenarios']:.1%}",
        ]
        for name, each in found.items()
    ]  # fmt: skip
    head = ["market", *(f"in {each:.0%}" for each in bands), "pinball", "days outside"]
    yield ReportTable("Its bands, without and with adaptive offsets", head, rows, says)
    if GERMAN in found:
        ours = [["one archive", f"{found[GERMAN]['crps'] / 2:.3f}"]]
        theirs = [[f"{model}, published", f"{crps:.3f}"] for model, crps in GERMAN_PUBLISHED.items()]
        yield ReportTable("German prices, CRPS as the paper has it", ["", "CRPS"], ours + theirs)
    if results["wql"]:
        cells = [[name, f"{each:.4f}"] for name, each in results["wql"].items()]
        says = f"fev-bench's windows, the last {FEV_DAYS} days, fitted anew at the same interval"
        beside = [["beside Seasonal Naive", f"{compute_relative_wql(results['wql']):.3f}"]]
        yield ReportTable("WQL", ["market", results["architecture"]], cells + beside, says)
    goals = [[each["goal"], f"{each['reached']:.4f}", each["wanted"], "reached" if each["good"] else "missed"]
             for each in results["goals"]]  # fmt: skip
    yield ReportTable("Goals", ["", "reached", "wanted", ""], goals)


def _judge(goal: str, reached: float, *, at_most: float, at_least: float | None = None) -> dict[str, Any]:
    wanted = f"at most {at_most:g}" if at_least is None else f"{at_least:g} to {at_most:g}"
    good = reached <= at_most and (at_least is None or reached >= at_least)
    return {"goal": goal, "reached": reached, "wanted": wanted, "good": good}


def _summarise(scored: Mapping[str, Any]) -> dict[str, Any]:
    """Choose what the record keeps of a backtest's market."""
    scores, online, against = scored["scores"], scored["online"], scored["against"]
    kept = {key: scores[key] for key in ("rmae", "rmae_weekly", "mae", "rmse", "smape", "pinball", "crps")}
    kept |= {"bands": online["bands"], "pinball_adaptive": online["pinball_adaptive"]}
    kept |= {"outside_scenarios": online["outside_scenarios"], "outside_fixed": scored["outside_scenarios"]}
    kept |= {"windows": scored["windows"]}
    kept |= {"first": scored["first"], "last": scored["last"]}
    return kept | ({"p_rival": against["p_value"], "rival_mae": against["other_mae"]} if against else {})


def _read_part(text: str) -> dict[str, Any]:
    """Read `lear:3` or `ddnn@linear` as the config that `--architecture` makes of it."""
    named, _, scaling = text.partition("@")
    name, _, count = named.partition(":")
    found: dict[str, Any] = {"architecture": name}
    return found | ({"scaling": scaling} if scaling else {}) | ({"members": int(count)} if count else {})


def _train(case: Case, prices: Path, store: Path, architecture: str, until: str) -> None:
    known = [part for column in case.known for part in ("--known-future", column)]
    stack = ["--stack"] if "," in architecture else []
    of = [str(prices), "--time", TIME, "--target", TARGET, *known, "--architecture", architecture, *stack]
    _run("train", *of, "--train-until", until, "--out", str(store), "--keep-worse")


def _backtest(prices: Path, store: Path, since: str, *more: str) -> dict[str, Any]:
    of = [str(prices), "--time", TIME, "--target", TARGET, "--models", str(store), "--from", since]
    (market,) = json.loads(_run("backtest", *of, *more, "--json"))["markets"]
    found: dict[str, Any] = market
    return found


def _run(*command: str) -> str:
    """Run a command of `fleetcast` and return what it printed. Its words of progress go to our standard error."""
    words = [sys.executable, "-P", "-m", "server.cli.main", *command]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def _read_rows(path: Path) -> list[Row]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    return list(csv.DictReader(text.splitlines()))


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
