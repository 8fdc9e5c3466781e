"""A market's cycle over many products: prices, quantiles, joint scenarios; timed against 20 seconds, and drawn.

`make forecast-demo` starts it. The forecasters are fitted and correlated once, by the `fleetcast` commands, in
`.fleetcast/cycle/`, and served, unless `--url` names a running server. Each turn then publishes prices, requests the
quantiles of all products in one call and joint scenarios in another.
"""

import json
import math
import shutil
import signal
import subprocess
import sys
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from csv import writer
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from handlers.training.input_recipe import choose_prediction_length
from handlers.training.time_series import Series, read_csv, read_header
from loadtest.driver.market_client import (
    JOINT,
    STAGES,
    TICK,
    Feed,
    MarketClient,
    MarketFleet,
    NotAnswered,
    Turn,
    rank_correlation,
    run_turn,
)
from loadtest.flags import Once, end_on_sigterm
from loadtest.fleets.fleet import MARKETS
from loadtest.fleets.network_shape import UNITS
from loadtest.fleets.synthetic_markets import make_coupled_markets
from loadtest.observe.local_server import run_local_server
from loadtest.report.market_cycle import CycleResults, find_extremes, format_budget_share, render_cycle_page
from model_store.archives.archive import open_archive
from model_store.errors import LoadError
from model_store.names import ModelName, parse_model_name
from server import contract

FOLDER = Path(".fleetcast/cycle")
HISTORY, TODAY, STORE, MADE = (FOLDER / name for name in ("history.csv", "today.csv", "store", "made.json"))
PAGE, QUANTILES, SCENARIOS = (FOLDER / name for name in ("cycle.html", "quantiles.json", "scenarios.json"))
TIME, JOINTLY = "time", "joint.mar"
MARKET, A_DAY, DAYS, SEED = "au", 24, 150, 0  #: the synthetic market has hourly steps of five months
EPOCHS, THREADS = 5.0, 2  #: of the fit, which takes half a minute on two cores
LEVELS = "0.02,0.1,0.25,0.5,0.75,0.9,0.98"  #: quantile levels; samples beyond the outer ones are clamped
MOST_TICKS = 24  #: intervals that are kept back, besides those of the last forecast

console = Console(highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class PriceOrigin:
    """The source of the prices; forecasters that were made from the same source are reused."""

    csv: str = ""  #: "": the synthetic market
    changed: int = 0
    time: str = TIME
    targets: tuple[str, ...] = ()
    market: tuple[object, ...] = (MARKET, A_DAY, DAYS, SEED, EPOCHS, LEVELS)

    def read(self) -> list[Series]:
        """Read the prices. Raises SeriesInvalid, OSError."""
        if self.csv:
            return read_csv(Path(self.csv), self.time, self.targets)
        zones, products = MARKETS[MARKET]
        return make_coupled_markets(zones.split(), products.split(), SEED, A_DAY * DAYS, A_DAY)

    def __str__(self) -> str:
        return Path(self.csv).name if self.csv else "a synthetic market"


@dataclass(frozen=True, slots=True)
class DemoMarket:
    """The prices of the market. The last ones are not used for fits; they are published turn by turn."""

    name: str
    series: Sequence[Series]

    @property
    def products(self) -> list[str]:
        """The products in the order of the columns."""
        return [each.name for each in self.series]

    @property
    def horizon(self) -> int:
        """The number of forecast steps."""
        return choose_prediction_length(round(self.series[0].step.total_seconds()))

    @property
    def known(self) -> int:
        """The number of steps before today."""
        return len(self.series[0].values) - MOST_TICKS - self.horizon

    @property
    def today(self) -> datetime:
        """The time of the first step that is kept back."""
        return self.series[0].start + self.known * self.series[0].step


@app.command()
def main(
    *,
    csv: Annotated[
        Path | None, typer.Option(help="your price file with one row per time step; default: a synthetic market")
    ] = None,
    time: Annotated[str, typer.Option(help="column of its time stamps")] = TIME,
    target: Annotated[list[str] | None, typer.Option(help="price column (repeatable); default: all columns")] = None,
    url: Annotated[str, typer.Option(help=f"address of a running server of {STORE}; default: one is started")] = "",
    ticks: Annotated[int, typer.Option(min=2, max=MOST_TICKS, help="number of turns; the first is cold")] = 6,
    scenarios: Annotated[int, typer.Option(min=2, max=1000, help="number of joint scenarios in a turn")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="random seed: the same seed gives the same scenarios")] = 7,
    inference_port: int = contract.INFERENCE_PORT,
    management_port: int = contract.MANAGEMENT_PORT,
    metrics_port: int = contract.METRICS_PORT,
    once: Once = False,
) -> None:
    """Show a market's cycle: new prices, forecasts of all products, joint scenarios and a page, within 20 seconds."""
    end_on_sigterm()
    ports = {"inference": inference_port, "management": management_port, "metrics": metrics_port}
    try:
        prices = _find_prices(csv, time, target)
        market = _make_market(prices)
        fleet = _make_fleet(market)
        with _open_server(url, ports) as address:
            with MarketClient(address) as client:
                turns = _play_turns(market, fleet, client, ticks, scenarios, seed)
            started = clock.perf_counter()
            drawn = _make_page(market, fleet, turns, address)
            PAGE.write_text(render_cycle_page(drawn), encoding="utf-8")
            _show_page(drawn, (clock.perf_counter() - started) * 1e3)
            _how_to(address, fleet)
            if not once and not url:
                _print_step("5", "the server runs until Ctrl-C")
                signal.pause()
    except (LoadError, ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f'no demo: {error}\nflags of `make forecast-demo` go into ARGS="..."') from None
    except KeyboardInterrupt:
        console.print("\nstopped")


def _print_step(number: str, text: str) -> None:
    console.print(f"\n[bold]{number}. {escape(text)}[/]")


# --- forecasters ----------------------------------------------------------------------------------------------------


def _find_prices(csv: Path | None, time: str, target: Sequence[str] | None) -> PriceOrigin:
    if csv is None:
        if target:
            raise ValueError("--target is a column of a --csv")
        return PriceOrigin()
    targets = tuple(target or (name for name in read_header(csv) if name and name != time))
    if not targets:
        raise ValueError(f"{csv} has no column besides {time!r}")
    return PriceOrigin(str(csv.resolve()), csv.stat().st_mtime_ns, time, targets, ())


def _make_market(prices: PriceOrigin) -> DemoMarket:
    """Make the market, with its forecasters and their correlation in the store."""
    wanted, market = json.dumps(asdict(prices)), DemoMarket(str(prices), prices.read())
    count = len(market.products)
    if MADE.exists() and MADE.read_text() == wanted:
        _print_step("1", f"the forecasters of {count} products of {market.name} are in {STORE} already")
        return market
    if market.known < market.horizon:
        raise ValueError(f"{market.name} has too few rows to learn {market.horizon} steps ahead from")
    started = clock.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    _write_prices(HISTORY, market.series, 0, market.known)
    _write_prices(TODAY, market.series, market.known, len(market.series[0].values))
    targets = [flag for name in market.products for flag in ("--target", name)]
    unit = [] if prices.csv else ["--unit", UNITS[MARKET]]
    fit = ["--out", str(STORE), "--epochs", f"{EPOCHS:g}", "--threads", str(THREADS), "--quantiles", LEVELS, *unit]
    fit += ["--architecture", "tcn", "--keep-worse"]  # the cycle is asked at any hour, and shows a whole market
    _run_fleetcast(f"fitting {count} products of {market.name} together", "train", targets, fit)
    windows = ["--store", str(STORE), "--out", str(STORE / JOINTLY), "--every", str(max(1, market.horizon // 4))]
    _run_fleetcast("learning how they move together", "correlate", targets, windows)
    MADE.write_text(wanted)
    seconds = clock.perf_counter() - started
    _print_step("1", f"fitted and correlated {count} products of {market.name} in {seconds:.0f} s, into {STORE}")
    console.print(f"   by `fleetcast train` and `fleetcast correlate` of {HISTORY}, once (make clean removes it)")
    return market


def _write_prices(path: Path, series: Sequence[Series], start: int, end: int) -> None:
    rows = np.stack([each.values[start:end] for each in series], axis=1).tolist()
    with path.open("w", newline="") as file:
        lines = writer(file, lineterminator="\n")
        lines.writerow([TIME, *(each.name for each in series)])
        for at, row in enumerate(rows, start):
            lines.writerow([series[0].stamp(at), *("" if math.isnan(price) else price for price in row)])


def _run_fleetcast(what: str, verb: str, targets: Sequence[str], flags: Sequence[str]) -> None:
    """Run a command on the history. Raises RuntimeError if it fails; its messages are on stderr."""
    command = [sys.executable, "-P", "-m", "server.cli.main", verb, str(HISTORY), "--time", TIME, *targets, *flags]
    with console.status(what):
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise RuntimeError(f"`fleetcast {verb}` ended with code {done.returncode}")


def _make_fleet(market: DemoMarket) -> MarketFleet:
    models = {product: parse_model_name(f"{product}.mar") for product in market.products}
    first = models[market.products[0]]
    spec = open_archive((STORE / first).read_bytes(), first).spec
    assert spec is not None, "`fleetcast train` writes a fleetcast.json"
    assert spec.forecast is not None, "and says in it what a request brings"
    return MarketFleet(models, ModelName(JOINTLY), spec.forecast.history_length, spec.forecast.unit)


@contextmanager
def _open_server(url: str, ports: Mapping[str, int]) -> Iterator[str]:
    """Yield the address of the user's server, or of a started one."""
    if url:
        _print_step("2", f"asking {url}, which must serve {STORE}")
        yield url
        return
    flags = [text for name, port in ports.items() for text in (f"--{name}-port", str(port))]
    with run_local_server(str(STORE), flags) as server:
        _print_step("2", f"serving {STORE}: inference {server.inference}, metrics {server.metrics}")
        yield server.inference


# --- the show -------------------------------------------------------------------------------------------------------


def _play_turns(
    market: DemoMarket, fleet: MarketFleet, client: MarketClient, ticks: int, scenarios: int, seed: int
) -> list[Turn]:
    """Run the turns, each with the next line of today's prices. Raises NotAnswered."""
    _print_step(
        "3", f"the clock turns {ticks} times: prices in, quantiles by one call, {scenarios} joint scenarios by another"
    )
    feed = Feed([each.before(market.today) for each in market.series], fleet.history)
    with TODAY.open() as file:
        lines = [line.rstrip("\n") for line in islice(file, 1, 1 + ticks)]
    try:
        turns = [run_turn(feed, line, fleet, client, scenarios, seed) for line in lines]
    except NotAnswered as why:
        raise NotAnswered(f"{why}\nthe server must serve the demo's store: fleetcast serve --store {STORE}") from None
    QUANTILES.write_bytes(turns[-1].asked.quantiles)
    SCENARIOS.write_bytes(turns[-1].asked.scenarios)
    return turns


def _make_page(market: DemoMarket, fleet: MarketFleet, turns: Sequence[Turn], address: str) -> CycleResults:
    """Make the page of the last turn, with the prices before it and the actual ones after it."""
    end, first = market.known + len(turns), market.series[0]
    return CycleResults(
        title=f"{len(market.products)} products of {market.name}",
        unit=fleet.unit,
        products=market.products,
        start=first.start + (end - market.horizon) * first.step,
        step=first.step,
        prices=np.stack([each.values[end - market.horizon : end + market.horizon] for each in market.series]),
        turns=turns,
        together=rank_correlation(turns[-1].scenarios),
        calls=_describe_calls(address),
    )


def _show_page(drawn: CycleResults, drawn_ms: float) -> None:
    first, last = drawn.turns[0], drawn.turns[-1]
    table = Table("ms", "first turn", f"turn {len(drawn.turns)}", "of 20 s", title=f"forecast from {last.start}")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in STAGES:
        ms = last.ms[stage]
        table.add_row(stage, f"{first.ms[stage]:.1f}", f"{ms:.1f}", format_budget_share(ms))
    table.add_section()
    table.add_row("together", f"{first.total_ms:.1f}", f"{last.total_ms:.1f}", format_budget_share(last.total_ms))
    table.add_row("the page drawn", "", f"{drawn_ms:.1f}", format_budget_share(drawn_ms))
    console.print(table)
    for call in (TICK, JOINT):
        console.print(f"   {call}: first {first.said[call]}\n   {' ' * len(call)}  last  {last.said[call]}")
    for word, pairs in zip(("alike", "opposed"), find_extremes(drawn.products, drawn.together, 1), strict=True):
        for one, other, value in pairs:
            console.print(
                f"   most {word} in the scenarios: {escape(f'{one} and {other}, rank correlation {value:+.2f}')}"
            )
    console.print(f"\n[bold]the page: {PAGE.resolve().as_uri()}[/]", soft_wrap=True)


def _describe_calls(address: str) -> list[tuple[str, str]]:
    """Describe the calls as commands to copy."""
    forecasts = f"curl -s {address}{contract.FORECASTS_PATH}"
    return [
        ("quantiles of all products", f"{forecasts} --data @{QUANTILES}"),
        ("joint scenarios", f"{forecasts} -H 'Accept: {contract.NPY}' \\\n  --data @{SCENARIOS} -o scenarios.npy"),
    ]


def _how_to(address: str, fleet: MarketFleet) -> None:
    """Print commands to copy."""
    _print_step("4", "go on with")
    model = next(iter(fleet.models.values()))
    python = Path(sys.executable)
    bin_ = f"{python.parent}/".removeprefix(f"{Path.cwd()}/") if python.with_name("fleetcast").exists() else ""
    calls = "\n".join(call for _, call in _describe_calls(address))
    lines = f"""
{calls}

{bin_}fleetcast inspect {STORE}/{model}
{bin_}fleetcast inspect {STORE}/{fleet.correlation}
{bin_}fleetcast-load run --url {address} --store {STORE} --dialect forecasts \\
  --profile tick --every-s 0.5 --spread-s 0

make forecast-demo ARGS="--csv prices.csv --time hour"   # your own prices, all columns
"""
    console.print(lines, markup=False)
