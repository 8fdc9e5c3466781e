"""Hourly prices of a few markets in a CSV file, and small archives that forecast them, untrained: for backtests."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import UNSET, UnsetType
from typer.testing import CliRunner, Result

from handlers.forecasters import build_family, random_tensors
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.archive import DEFAULT_LIMITS
from model_store.archives.manifest import ForecastSpec, InputChannel, Kind, Scaler
from model_store.names import ModelName
from server.cli.main import app
from server.offline.rolling_windows import ArchiveVersion, open_unpublished

HISTORY, HORIZON, DAYS = 24, 6, 20
LEVELS = (0.1, 0.5, 0.9)
START = datetime.fromisoformat("2024-03-04")  # a Monday


def run(*arguments: str) -> Result:
    """`fleetcast` in this process; an exception of ours that is not said in a line comes through."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def name_products(count: int) -> list[str]:
    """M00, M01, ..."""
    return [f"M{i:02}" for i in range(count)]


def write_prices(path: Path, targets: Sequence[str], *, days: int = DAYS, empty: str = "", since: int = 0) -> Path:
    """A price and a load forecast of each market; `empty` has no prices from hour `since` on; some are missing."""
    rng = np.random.default_rng(0)
    hours = np.arange(24 * days)
    wave = 60 + 25 * np.sin(hours / 24 * 2 * np.pi)
    columns = {each: wave + rng.normal(0, 6, len(hours)) for each in targets}
    lines = [",".join(["hour", *targets, *(f"load_{each}" for each in targets)])]
    for hour in hours.tolist():
        stamp = START + hour * timedelta(hours=1)
        gone = [hour % 97 == 50 or (each == empty and hour >= since) for each in targets]
        prices = ["" if lost else f"{columns[each][hour]:.2f}" for each, lost in zip(targets, gone, strict=True)]
        loads = [f"{1000 + 10 * wave[hour]:.0f}" for _ in targets]
        lines.append(",".join([f"{stamp:%Y-%m-%d %H:%M}", *prices, *loads]))
    path.write_text("\n".join(lines) + "\n")
    return path


def make_forecast(**changes: Any) -> ForecastSpec:
    """A day of prices and what is known of the next six hours."""
    horizon = changes.get("prediction_length", HORIZON)
    known = [
        InputChannel(source="dynamic_feat", index=i, shift=horizon) for i in range(len(changes.get("dynamic_feat", ())))
    ]
    asked: dict[str, Any] = {
        "frequency": "1h",
        "context_length": HISTORY,
        "prediction_length": HORIZON,
        "quantile_levels": LEVELS,
        "inputs": (
            InputChannel(source="target"),
            InputChannel(source="calendar", feature="hour_sin", shift=horizon),
            *known,
        ),
        "scaler": Scaler(kind="linear", center=60, scale=20),
        "tail": "clamp",
        "unit": "EUR/MWh",
    }
    return ForecastSpec(**{**asked, **changes})


def pack_market(seed: int = 0, *, trained_until: str | UnsetType = UNSET, **changes: Any) -> bytes:
    """An `mlp` of seeded random weights; keywords change its `ForecastSpec`."""
    record = make_forecast(**changes)
    config = {
        "features": len(record.inputs), "context_length": record.context_length, "hidden": 8,
        "prediction_length": record.prediction_length, "quantiles": len(record.quantile_levels) * len(record.products),
    }  # fmt: skip
    tensors = random_tensors(build_family("mlp", config), seed)
    return pack_model(
        Kind.FORECASTER,
        ArchiveParts(tensors=tensors, architecture="mlp", config=config, forecast=record, trained_until=trained_until),
        model_name="m",
    )


def open_market(seed: int = 0, **changes: Any) -> ArchiveVersion:
    """The same, opened, in no store."""
    return open_unpublished(pack_market(seed, **changes), ModelName("m.mar"), DEFAULT_LIMITS)


def fill(store: Path, targets: Sequence[str], **changes: Any) -> Path:
    """A folder with an archive of each market."""
    store.mkdir()
    for seed, target in enumerate(targets):
        store.joinpath(f"{target}.mar").write_bytes(pack_market(seed, **changes))
    return store
