"""Forecasters to serve for clients that send series: hourly, 48 steps of history, 24 of forecast."""

from msgspec import UNSET, UnsetType

from handlers.forecasters import build_family, random_tensors
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import ForecastSpec, HistoryRules, InputChannel, Kind, Scaler

HISTORY, HORIZON = 48, 24
LEVELS = (0.005, 0.1, 0.5, 0.9, 0.995)


def pack_hourly(
    seed: int,
    *,
    features: tuple[str, ...] = (),
    calendar: bool = False,
    products: int = 1,
    history: HistoryRules | UnsetType = UNSET,
) -> bytes:
    """An archive of seeded random weights, with these covariates, and with rules for histories."""
    inputs = [InputChannel(source="target", product=i) for i in range(products)]
    inputs += [InputChannel(source="dynamic_feat", index=i, shift=HORIZON) for i in range(len(features))]
    if calendar:
        inputs.append(InputChannel(source="calendar", feature="hour_sin", shift=HORIZON))
    config = {
        "features": len(inputs),
        "context_length": HISTORY,
        "prediction_length": HORIZON,
        "quantiles": len(LEVELS) * products,
        "channels": 8,
        "layers": 2,
    }
    recipe = ForecastSpec(
        frequency="1h",
        context_length=HISTORY,
        prediction_length=HORIZON,
        quantile_levels=LEVELS,
        inputs=tuple(inputs),
        dynamic_feat=features,
        products=tuple(f"product{i}" for i in range(products)),
        scaler=Scaler(kind="linear", center=60.0, scale=20.0),
        tail="clamp",
        history=history,
    )
    tensors = random_tensors(build_family("tcn", config), seed)
    parts = ArchiveParts(tensors=tensors, architecture="tcn", config=config, forecast=recipe)
    return pack_model(Kind.FORECASTER, parts, model_name=f"hourly-{seed}")


def pack_paths(seed: int) -> bytes:
    """An archive whose network draws 16 paths."""
    config = {"features": 2, "context_length": HISTORY, "prediction_length": HORIZON, "hidden": 8, "paths": 16}
    recipe = ForecastSpec(
        frequency="1h",
        context_length=HISTORY,
        prediction_length=HORIZON,
        quantile_levels=(0.1, 0.5, 0.9),
        inputs=(
            InputChannel(source="target"),
            InputChannel(source="seed"),
        ),
        scaler=Scaler(kind="linear", center=60.0, scale=20.0),
        paths=16,
    )
    tensors = random_tensors(build_family("deepar", config), seed)
    parts = ArchiveParts(tensors=tensors, architecture="deepar", config=config, forecast=recipe)
    return pack_model(Kind.FORECASTER, parts, model_name=f"paths-{seed}")
