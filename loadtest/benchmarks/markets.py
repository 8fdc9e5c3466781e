"""Accuracy of real prices through a running server: every day of a test period is requested with boto3 and scored.

fleetcast-load bench markets --data prices.csv.gz --time hour --target NSW1 --target VIC1 --test-from 2024-01-01

Trains on the rows before the test period (`fleetcast train`), serves the archives, asks each model for consecutive
forecasts, and compares them with the naive forecast and with the reference network called in this process. Saves a
record.
"""

import json
import math
import subprocess
import sys
import tempfile
import time as clock
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import boto3
import numpy as np
import rich
import torch
import typer
from rich.progress import track
from rich.table import Table

from handlers.training.fit import ask_network, compute_pinball, make_reference_network
from handlers.training.input_recipe import LEVELS, compute_naive_lag
from handlers.training.time_series import Float64, Series, read_csv
from loadtest import record
from loadtest.observe.local_server import run_local_server
from model_store.archives.archive import open_archive, read_tensors
from model_store.archives.manifest import ForecastSpec
from model_store.names import ModelName, parse_model_name
from model_store.stores.object_store import Source, open_source
from server.contract import HEADER_CACHE, JSON

RATIO_LIMIT = 0.7
COVERAGE_LIMITS = (0.6, 0.9)  #: limits of the coverage of the interval between the outer levels
SAME = 1e-4  #: tolerance relative to price and scale, since kernels differ in the last bits
KEYS = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}

Ask = Callable[[ModelName, dict[str, Any]], dict[str, Any]]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class Score:
    """The scores of one market over the test period; losses are in the unit of its prices."""

    days: int
    pinball: float  #: mean over levels and steps
    naive: float  #: the same for the value at the same time of the last known day
    ratio: float
    coverage: float  #: share of steps within the outer levels, these included
    difference: float  #: largest |served - in process| / (|in process| + scale)
    finite: bool
    is_sorted: bool

    @property
    def failures(self) -> list[str]:
        """List in words what is insufficient."""
        low, high = COVERAGE_LIMITS
        found = {
            "a quantile is not finite": not self.finite,
            "quantiles are not sorted": not self.is_sorted,
            f"pinball is more than {RATIO_LIMIT:g} of naive": not self.ratio <= RATIO_LIMIT,
            f"coverage is not within {low:g} and {high:g}": not low <= self.coverage <= high,
            "the served numbers are not those of the network": not self.difference <= SAME,
        }
        return [text for text, true in found.items() if true]


class ScoringClient:
    """A boto3 client of the server, with the cache results of its answers."""

    def __init__(self, url: str) -> None:
        self._runtime = boto3.client("sagemaker-runtime", endpoint_url=url, **KEYS)
        self.cache: Counter[str] = Counter()
        self.milliseconds: list[float] = []

    def __repr__(self) -> str:
        return f"<ScoringClient {dict(self.cache)}>"

    def ask(self, model: ModelName, request: dict[str, Any]) -> dict[str, Any]:
        """Send a DeepAR request and return its answer."""
        body, started = json.dumps(request), clock.perf_counter()
        reply = self._runtime.invoke_endpoint(EndpointName="fleetcast", TargetModel=model, ContentType=JSON, Body=body)
        answer: dict[str, Any] = json.loads(reply["Body"].read())
        self.milliseconds.append((clock.perf_counter() - started) * 1e3)
        self.cache[reply["ResponseMetadata"]["HTTPHeaders"][HEADER_CACHE.lower()]] += 1
        return answer


@app.command()
def main(
    *,
    data: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="price file (.csv or .csv.gz)")],
    time: Annotated[str, typer.Option(help="column of its time stamps")],
    target: Annotated[list[str], typer.Option(help="price column (repeatable)")],
    test_from: Annotated[datetime, typer.Option(help="date at which the test period begins; training ends before it")],
    store: Annotated[str, typer.Option(help="store of archives {target}.mar; default: they are trained")] = "",
    url: Annotated[str, typer.Option(help="address of a server of that store; default: one is started")] = "",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train, serve, request and score. The exit code is 1 if a market is insufficient."""
    if url and not store:
        raise typer.BadParameter("--url needs --store, the store that the server has")
    before, results = record.describe_machine(), dict[str, Any](data=data.name, test_from=f"{test_from:%Y-%m-%d}")
    series = read_csv(data, time, target)
    with ExitStack() as stack:
        if not store:
            store = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleetcast-markets-"))
            started = clock.perf_counter()
            train_models(data, time, target, test_from, store, seed)
            results["train_s"] = round(clock.perf_counter() - started, 1)
        client = ScoringClient(url or stack.enter_context(run_local_server(store)).inference)
        source = open_source(store)
        scores = {each.name: evaluate_market(each, test_from, source, client.ask) for each in series}
    results |= {
        "markets": {name: asdict(score) for name, score in scores.items()},
        "cache": dict(client.cache),
    }
    results["request_ms"] = record.summarise_spread(client.milliseconds)
    rich.print(
        _make_score_table(scores),
        f"cache: {dict(client.cache)}, median {results['request_ms']['median']:.1f} ms a request",
    )
    rich.print(f"record: {record.save_record('markets', seed, before, results)}")
    failures = [f"{name}: {failure}" for name, score in scores.items() for failure in score.failures]
    if failures:
        raise SystemExit("\n".join(failures))


def train_models(data: Path, time: str, targets: Sequence[str], until: datetime, store: str, seed: int) -> None:
    """`fleetcast train` as a user runs it. Raises CalledProcessError; its messages are on stderr."""
    command = [sys.executable, "-P", "-m", "server.cli.main", "train", str(data), "--time", time, "--out", store]
    command += ["--quantiles", ",".join(map(str, LEVELS))]  # records before the nine default levels have these
    command += ["--train-until", until.isoformat(), "--seed", str(seed), "--architecture", "tcn", "--keep-worse"]
    for target in targets:
        command += ["--target", target]
    subprocess.run(command, check=True)


def evaluate_market(series: Series, test_from: datetime, source: Source, asked: Ask) -> Score:
    """Score a forecast from every `prediction_length`-th step from `test_from` on that has all actual values.

    Raises LoadError of model_store for the archive `{name}.mar`, and what `ScoringClient.ask` raises.
    """
    name = parse_model_name(f"{series.name}.mar")
    fetched = source.get(name)
    assert fetched is not None, "only a conditional GET is answered `not modified`"
    archive = open_archive(fetched.data, name)
    if archive.spec is None or archive.spec.forecast is None:
        raise ValueError(f"{name} is not an archive that can be asked for forecasts")
    spec, forecast = archive.spec, archive.spec.forecast
    network = make_reference_network(spec.architecture, spec.config, read_tensors(archive))
    horizon = forecast.prediction_length
    first = max(series.first_at(test_from), forecast.history_length)
    starts = range(first, len(series.values) - horizon + 1, horizon)
    served, local = [], []
    for start in track(starts, series.name, transient=True):
        request = make_request_for(series, start, forecast)
        served.append(_parse_quantiles(asked(name, request), forecast))
        local.append(_parse_quantiles(ask_network(network, forecast, request), forecast))
    steps = np.array(starts)[:, None] + np.arange(horizon)
    lag = compute_naive_lag(round(series.step.total_seconds()), horizon)
    naive = series.values[steps - lag][..., None]
    return score_market(series.values[steps], np.stack(served), np.stack(local), naive, forecast)


def make_request_for(series: Series, start: int, forecast: ForecastSpec) -> dict[str, Any]:
    """Make the request whose forecast begins at step `start`; it contains no value of that step or later."""
    instance = series.instance(start - forecast.history_length, start, forecast.prediction_length)
    levels = [str(level) for level in forecast.quantile_levels]
    return {"instances": [instance], "configuration": {"output_types": ["quantiles"], "quantiles": levels}}


def score_market(y: Float64, served: Float64, local: Float64, naive: Float64, forecast: ForecastSpec) -> Score:
    """Score values [days, P] against quantiles [days, P, levels] (served, and made here) and naive [days, P, 1]."""
    known = ~np.isnan(y)

    def loss(quantiles: Float64) -> float:
        levels = torch.tensor(forecast.quantile_levels, dtype=torch.float64)
        return float(compute_pinball(torch.from_numpy(y), torch.from_numpy(quantiles), levels).sum()) / int(known.sum())

    inside = (served[..., 0] <= y) & (y <= served[..., -1])
    difference = np.abs(served - local) / (np.abs(local) + forecast.scaler.scale)
    return Score(
        days=len(y),
        pinball=loss(served),
        naive=loss(naive),
        ratio=loss(served) / (loss(naive) or math.nan),
        coverage=float(inside[known].mean()),
        difference=float(difference.max()),
        finite=bool(np.isfinite(served).all()),
        is_sorted=bool((np.diff(served, axis=-1) >= 0).all()),
    )


def _parse_quantiles(answer: dict[str, Any], forecast: ForecastSpec) -> Float64:
    """Parse an answer into quantiles [prediction, levels]."""
    quantiles = answer["predictions"][0]["quantiles"]
    return np.array([quantiles[str(level)] for level in forecast.quantile_levels], np.float64).T


def _make_score_table(scores: dict[str, Score]) -> Table:
    table = Table("market", "days", "pinball", "naive", "ratio", "coverage", "largest difference", "")
    for name, each in scores.items():
        verdict = "; ".join(each.failures) or "ok"
        numbers = (f"{each.pinball:.2f}", f"{each.naive:.2f}", f"{each.ratio:.3f}", f"{each.coverage:.1%}")
        table.add_row(name, str(each.days), *numbers, f"{each.difference:.1e}", verdict)
    return table
