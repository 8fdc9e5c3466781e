"""Fleets to test with: forecaster archives with seeded random weights under names like those of real markets.

python -m loadtest.fleet FOLDER|URL --models 200 --seed 0

The forecasts mean nothing; everything else is as in a real fleet: DeepAR JSON in, calendar and lags, a scaler of each
market's own, a golden sample computed by the architecture's reference network.
"""

import datetime as dt
import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import boto3
import rich
import torch
import typer
from rich.progress import track

from handlers.base import Family, Float32
from handlers.codecs import JSON, FamilyCodec
from handlers.forecasters import build, random_tensors
from handlers.series import Series
from handlers.training import Fitted, Progress
from loadtest.synthetic import fit_fleet, make_markets
from model_store.manifest import Channel, Forecast, GoldenSample, Scaler
from model_store.names import ModelName
from model_store.packing import pack_forecaster
from model_store.sources import open_source

CONTEXT, PREDICTION, LAG = 168, 24, 144
TRAINED = 90 * 24  #: hours of a synthetic market that its model is fitted on
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
CALENDAR = ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "year_sin", "year_cos")
CONFIG: Mapping[str, int | float | str | bool | list[int]] = {
    "features": 2 + len(CALENDAR),
    "context_length": CONTEXT,
    "prediction_length": PREDICTION,
    "quantiles": len(LEVELS),
}
START = "2026-01-01 00:00:00"
SEEDS_APART = 1_000_000  #: more than a fleet has models, so that fleets of different seeds share no weights

#: Market -> its zones and products: 5 x 9 + 30 x 4 + 10 x 4 = 205 names, with a real market's skew between markets.
MARKETS: Mapping[str, tuple[str, str]] = {
    "au": (
        "nsw1 qld1 sa1 tas1 vic1",
        "energy raise6sec raise60sec raise5min raisereg lower6sec lower60sec lower5min lowerreg",
    ),
    "eu": (
        "at be bg ch cz de-lu dk1 dk2 ee es fi fr gb gr hr hu it-nord it-sud lt lv nl no1 no2 pl pt ro se3 se4 si sk",
        "day-ahead intraday imbalance load",
    ),
    "us": (
        "caiso-np15 caiso-sp15 ercot-houston ercot-north ercot-west isone-hub miso-indiana nyiso-j pjm-west spp-south",
        "day-ahead real-time load reserve",
    ),
}
UNITS = {"au": "AUD/MWh", "eu": "EUR/MWh", "us": "USD/MWh"}

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def fleet_names(models: int) -> list[ModelName]:
    """The first `models` names, such as `au/nsw1/energy.mar`; beyond 205 each again with a number."""
    plain = [
        f"{market}/{zone}/{product}"
        for market, (zones, products) in MARKETS.items()
        for zone in zones.split()
        for product in products.split()
    ]
    rounds = itertools.chain(("",), (f"-{i}" for i in itertools.count(2)))
    names = (ModelName(f"{name}{suffix}.mar") for suffix in rounds for name in plain)
    return list(itertools.islice(names, models))


def make_fleet(where: str, models: int = 200, seed: int = 0, architecture: str = "tcn") -> list[ModelName]:
    """Write a fleet into a folder (made where it is missing) or a store URL, over what is there. Its names.

    Raises model_store's LoadError and InvalidStoreUrl for the store, ArchiveInvalid for an unknown architecture.
    """
    family = build(architecture, CONFIG)
    if "://" not in where:
        Path(where).mkdir(parents=True, exist_ok=True)
    source, names = open_source(where), fleet_names(models)
    for i, name in enumerate(track(names, f"writing {models} archives", transient=True)):
        source.put(name, make_archive(family, architecture, name, seed * SEEDS_APART + i))
    return names


def make_trained_fleet(where: str, models: int = 200, seed: int = 0, progress: Progress | None = None) -> list[Fitted]:
    """Fit forecasters of as many synthetic markets together and write them; in the order of `fleet_names`."""
    if "://" not in where:
        Path(where).mkdir(parents=True, exist_ok=True)
    source = open_source(where)
    known = [market.before(market.start + TRAINED * market.step) for market in synthetic_markets(models, seed)]
    fitted = fit_fleet(known, progress=progress)
    for name, each in zip(fleet_names(models), fitted, strict=True):
        packed = pack_forecaster(
            each.tensors,
            architecture=each.architecture,
            config=each.config,
            model_name=name.removesuffix(".mar").replace("/", "-"),
            forecast=each.forecast,
            golden=each.golden,
            description=f"fitted to the synthetic market {each.name} of seed {seed}",
        )
        source.put(name, packed)
    return fitted


def make_request_of(market: Series) -> tuple[dict[str, Any], list[float]]:
    """What to ask the model of a synthetic market, and the day that really came: no model was fitted on it."""
    instance = market.instance(TRAINED - 2 * CONTEXT, TRAINED, PREDICTION)
    return {"instances": [instance]}, market.values[TRAINED : TRAINED + PREDICTION].tolist()


def synthetic_markets(models: int, seed: int) -> list[Series]:
    """The markets of a trained fleet, with a day more than their models are fitted on."""
    return make_markets(models, seed, TRAINED + PREDICTION)


def make_archive(family: Family, architecture: str, name: str, seed: int) -> bytes:
    """One forecaster of the fleet; the same bytes for the same arguments."""
    tensors = random_tensors(family, seed)
    forecast = make_forecast(UNITS.get(name.partition("/")[0], "EUR/MWh"), seed)
    return pack_forecaster(
        tensors,
        architecture=architecture,
        config=CONFIG,
        model_name=name.removesuffix(".mar").replace("/", "-"),
        forecast=forecast,
        golden=_golden(family, tensors, forecast, seed),
        description=f"random weights, seed {seed}: for load tests, not for forecasts",
    )


def make_forecast(unit: str, seed: int) -> Forecast:
    """Hourly prices, a week in and a day out: the target, its value six days earlier, and the calendar ahead."""
    rng = random.Random(seed)
    calendar = (Channel(source="calendar", feature=feature, shift=PREDICTION) for feature in CALENDAR)  # type: ignore[arg-type]
    return Forecast(
        frequency="1h",
        context_length=CONTEXT,
        prediction_length=PREDICTION,
        quantile_levels=LEVELS,
        inputs=(Channel(source="target"), Channel(source="target", lag=LAG), *calendar),
        unit=unit,
        scaler=Scaler(kind="asinh", center=round(rng.uniform(40, 90), 2), scale=round(rng.uniform(15, 40), 2)),
        tail="clamp",
    )


def make_request(seed: int, *, steps: int = CONTEXT + LAG, **configuration: Any) -> dict[str, Any]:
    """A DeepAR request: `steps` hours of prices with a daily and a weekly shape, noise and a few spikes."""
    rng = random.Random(seed)
    daily = (0, -4, -7, -8, -6, -1, 8, 16, 14, 6, -2, -9, -12, -12, -8, 2, 14, 28, 30, 22, 13, 7, 4, 2)
    target = []
    for hour in range(steps):
        weekend = (hour // 24 + dt.date.fromisoformat(START[:10]).weekday()) % 7 >= 5  # noqa: PLR2004 -- Saturday
        spike = rng.expovariate(1 / 120) if rng.random() < 0.01 else 0.0  # noqa: PLR2004 -- one hour in a hundred
        target.append(round(60 + daily[hour % 24] * (0.5 if weekend else 1.0) + rng.gauss(0, 5) + spike, 2))
    request: dict[str, Any] = {"instances": [{"start": START, "target": target}]}
    return request | ({"configuration": configuration} if configuration else {})


def _golden(family: Family, tensors: Mapping[str, Float32], forecast: Forecast, seed: int) -> GoldenSample:
    """A request and its answer by the reference network, which shares no code with the batched forward."""
    request = make_request(seed, output_types=["mean", "quantiles"], quantiles=["0.1", "0.5", "0.9"])
    call = FamilyCodec(family, forecast).decode(json.dumps(request).encode(), JSON, JSON)
    network = family.reference()
    network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    with torch.inference_mode():
        answer, _ = call.encode(network(torch.from_numpy(call.rows)).numpy())
    return GoldenSample(request=request, response=json.loads(answer))


@app.command()
def main(
    where: Annotated[str, typer.Argument(metavar="FOLDER|URL", help="where to write: a folder or s3://bucket/prefix")],
    *,
    models: Annotated[int, typer.Option(min=1, max=SEEDS_APART)] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    architecture: str = "tcn",
    create_bucket: Annotated[bool, typer.Option(help="make the bucket of an s3:// URL first")] = False,
) -> None:
    """Write a fleet of forecaster archives with random weights."""
    if create_bucket:
        boto3.client("s3").create_bucket(Bucket=urlsplit(where).netloc)
    names = make_fleet(where, models, seed, architecture)
    rich.print(f"{len(names)} archives in {where}, from {names[0]} to {names[-1]}")


if __name__ == "__main__":
    app()
