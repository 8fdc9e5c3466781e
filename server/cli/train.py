"""`fleetcast train`: the price columns of a CSV file to archives in a store. Torch is imported when it runs."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import rich
import typer
from rich.progress import TextColumn
from rich.table import Table

from handlers.architectures import SUMMARIES
from model_store.names import ModelName, parse_model_name
from server.cli.setting_flags import settings_from
from server.cli.terminal import make_progress_bar, one_line_errors, parse_moment, verbatim

if TYPE_CHECKING:
    from handlers.training.fit import Fitted, Fitting
    from handlers.training.time_series import Series
    from model_store.archives.manifest import ForecastSpec

DECIDED = ("features", "context_length", "prediction_length", "quantiles", "members")
ARCHITECTURE_HELP = "\b\n" + "\n".join(f"{name}: {summary}" for name, summary in SUMMARIES.items())


def train(
    csv: Annotated[Path, typer.Argument(metavar="CSV", help="file (.csv or .csv.gz) with a header, a row a time step")],
    *,
    time: Annotated[str, typer.Option(help="column of the time stamps, evenly spaced")],
    target: Annotated[list[str], typer.Option(help="price column (repeatable: all are fitted together)")],
    out: Annotated[str, typer.Option(help="folder, made where it is missing, or store URL (s3://bucket/prefix)")],
    known_future: Annotated[
        list[str] | None,
        typer.Option(help="column known ahead, such as a load forecast (repeatable); may contain {target}"),
    ] = None,
    architecture: Annotated[str, typer.Option(help=ARCHITECTURE_HELP)] = "tcn",
    members: Annotated[int, typer.Option(min=1, max=64, help="of an ensemble in one archive")] = 1,
    config: Annotated[str, typer.Option(metavar="JSON", help="what the architecture leaves open")] = "{}",
    name_template: Annotated[str, typer.Option(help="an archive's name in the store")] = "{target}.mar",
    prediction_length: Annotated[int, typer.Option(min=0, help="steps to forecast; 0: by the frequency, hours 24")] = 0,
    context_length: Annotated[int, typer.Option(min=0, help="steps to look at; 0: 168, above an hour 84")] = 0,
    quantiles: Annotated[str, typer.Option(help="levels to forecast")] = "0.1,0.25,0.5,0.75,0.9",
    scaling: Annotated[Literal["asinh", "linear"], typer.Option(help="after median and quartiles")] = "asinh",
    origin: Annotated[
        str, typer.Option(metavar="HH:MM", help="every forecast's first step; lear of days 00:00, or any")
    ] = "",
    train_until: Annotated[str, typer.Option(metavar="DATE", help="use only the rows before it")] = "",
    epochs: Annotated[float, typer.Option(min=0, help="passes at most; 0: 20, more for a short series")] = 0.0,
    minutes: Annotated[
        float, typer.Option(min=0, help="end after so long, 0: no limit; if cut not reproducible")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same archives")] = 0,
    threads: Annotated[int, typer.Option(min=1, max=256, help="cores to use, as far as there are targets")] = 1,
    unit: Annotated[str, typer.Option(help="of the prices, noted in the archive")] = "",
    time_zone: Annotated[str, typer.Option(help="of the time stamps, noted in the archive")] = "UTC",
) -> None:
    """Fit a forecaster to each price column of a CSV file and pack it as an archive with a golden sample.

    \b
    fleetcast train prices.csv --time hour --target NSW1 --target VIC1 --out ./models
    fleetcast train de.csv.gz --time hour --target price --known-future load --out s3://models --name-template de.mar

    The frequency is inferred from the stamps; empty cells of a price column are missing values. The last tenth of the
    rows decides when to stop, and the losses shown are of it: mean pinball loss over the quantile levels, for the
    forecaster and for the naive forecast (the value at the same time of the last known day, or week for daily data).
    """  # noqa: D301 -- click's mark for "do not wrap"
    from handlers.training.fit import Fitting  # noqa: PLC0415
    from handlers.training.time_series import read_csv  # noqa: PLC0415 -- torch, here and below
    from server.offline.input_recipes import make_recipes  # noqa: PLC0415

    with one_line_errors():
        names = archive_names(target, name_template)
        series = read_csv(csv, time, target, known_future or [])
        if (until := parse_moment("--train-until", train_until)) is not None:
            series = [each.before(until) for each in series]
        options = _parse_config(config) | ({"members": members} if members > 1 else {})
        recipe = {"scaling": scaling, "unit": unit, "time_zone": time_zone, "levels": _parse_levels(quantiles)}
        recipe["origin"] = _parse_origin(origin)
        forecasts = make_recipes(series, architecture, options, prediction_length, context_length, recipe)
        _check_out(out, names[series[0].name])
        limit = minutes * 60 or float("inf")
        fitted = _fit_with_progress(
            series, forecasts, architecture, options, Fitting(epochs, max_seconds=limit, seed=seed, threads=threads)
        )
        sizes = _store_archives(out, [(names[each.name], each) for each in fitted], _describe_training(csv, series[0]))
        _report_archives(out, fitted, sizes)


def archive_names(targets: Sequence[str], template: str) -> dict[str, ModelName]:
    """Target -> name in the store. Raises ValueError (InvalidModelName) for an impossible or a shared name."""
    names = {target: parse_model_name(template.replace("{target}", target)) for target in targets}
    if len(names) < len(targets):
        raise ValueError("--target names a column twice")
    if len(set(names.values())) < len(names):
        raise ValueError(f"--name-template {template!r} gives several targets the same name; put {{target}} into it")
    return names


def _check_out(out: str, name: ModelName) -> None:
    """A place that cannot be written to is better known before the fit. Nothing is made yet. Raises ValueError."""
    if "://" in out:
        from server.offline.archive_location import locate_archive  # noqa: PLC0415 -- torch

        locate_archive(settings_from({"store": out}), name)
        return
    folder = Path(out).expanduser().absolute()
    nearest = next(each for each in (folder, *folder.parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {out}: {nearest} is not a folder that can be written to")


def _fit_with_progress(
    series: Sequence["Series"],
    forecasts: Sequence["ForecastSpec"],
    architecture: str,
    config: Mapping[str, Any],
    fitting: "Fitting",
) -> list["Fitted"]:
    """With a bar on stderr."""
    from handlers.training.fit import fit_forecasters  # noqa: PLC0415

    with make_progress_bar(TextColumn("{task.fields[loss]}")) as shown:
        task = shown.add_task(f"fitting {len(series)} {architecture}", total=None, loss="")

        def progress(done: int, steps: int, loss: float) -> None:
            shown.update(task, completed=done, total=steps, loss=f"holdout loss {loss:.4f}")

        return fit_forecasters(series, forecasts, architecture, dict(config), fitting, progress)


def _store_archives(out: str, named: Sequence[tuple[ModelName, "Fitted"]], description: str) -> list[int]:
    """Pack the archives, prove them as a worker would, and store them; their sizes in bytes."""
    from handlers.kinds import ArchiveParts, pack_model  # noqa: PLC0415
    from model_store.archives.manifest import Kind  # noqa: PLC0415
    from server.offline.archive_location import locate_archive  # noqa: PLC0415
    from server.offline.archive_tools import verify_packed_archive  # noqa: PLC0415

    if "://" not in out:
        Path(out).expanduser().mkdir(parents=True, exist_ok=True)
    settings, sizes = settings_from({"store": out}), []
    place = locate_archive(settings, named[0][0])
    for name, each in named:
        packed = pack_model(
            Kind.FORECASTER,
            ArchiveParts(
                tensors=each.tensors, architecture=each.architecture, config=each.config, forecast=each.forecast
            ),
            model_name=name.rpartition("/")[2].partition(".")[0],
            golden=each.golden,
            description=description,
        )
        verify_packed_archive(packed, name, place.limits)
        place.source.put(name, packed)
        sizes.append(len(packed))
    return sizes


def _describe_training(csv: Path, series: "Series") -> str:
    """Where the numbers come from."""
    return f"trained on {csv.name}, {series.stamp(0)} to {series.stamp(len(series.values) - 1)}"


def _report_archives(out: str, fitted: Sequence["Fitted"], sizes: Sequence[int]) -> None:
    table = Table("target", "holdout loss", "naive", "ratio", "bytes")
    for each, size in zip(fitted, sizes, strict=True):
        ratio = f"{each.loss / each.naive_loss:.2f}" if each.naive_loss else ""
        table.add_row(verbatim(each.name), f"{each.loss:.3f}", f"{each.naive_loss:.3f}", ratio, str(size))
    rich.print(table)
    forecast = fitted[0].forecast
    steps, ahead = f"{forecast.history_length} steps of {forecast.frequency}", forecast.prediction_length
    features = ", ".join(forecast.dynamic_feat)
    known = f", with dynamic_feat ({features}) for these and {ahead} more," if features else ""
    print(f"a request brings {steps}{known} and gets the next {ahead}; next:")  # noqa: T201
    print(f"fleetcast serve --store {out}")  # noqa: T201


def _parse_origin(text: str) -> str:
    if text not in ("", "any") and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", text):
        raise ValueError(f"--origin: expected a time of day such as 00:00, or any, not {text!r}")
    return text


def _parse_levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(level) for level in text.split(","))
    except ValueError:
        levels = ()
    if not levels or not all(0 < level < 1 for level in levels) or sorted(set(levels)) != list(levels):
        raise ValueError(f"--quantiles: expected rising levels between 0 and 1 such as 0.1,0.5,0.9, not {text!r}")
    return levels


def _parse_config(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--config: not JSON: {error}") from None
    if not isinstance(found, dict) or found.keys() & DECIDED:
        what = f"an object such as '{{\"channels\": 32}}' without {', '.join(DECIDED)}, which the other options decide"
        raise ValueError(f"--config: expected {what}, not {text!r}")
    return found
