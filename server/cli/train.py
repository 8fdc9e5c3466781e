"""`fleetcast train` fits forecasters to a price file and stores them as archives. It imports torch when it runs."""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import rich
import typer
from rich.progress import TextColumn
from rich.table import Table

from handlers.architectures import SUMMARIES
from model_store.names import ModelName, parse_model_name
from server.cli import price_flags
from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, make_progress_bar, one_line_errors, parse_moment, verbatim
from server.logs import escape_text

if TYPE_CHECKING:
    from handlers.training.fit import Fitted, Fitting
    from handlers.training.time_series import Series
    from model_store.archives.manifest import ForecastSpec
    from server.settings import Settings

DECIDED = ("features", "context_length", "prediction_length", "quantiles", "members")
CHOSEN = "default: lear for days of steps of 15 minutes to an hour, else tcn"
ARCHITECTURE_HELP = f"\b\n{CHOSEN}\n" + "\n".join(f"{name}: {summary}" for name, summary in SUMMARIES.items())
QUANTILES = "0.01,0.05,0.1,0.25,0.5,0.75,0.9,0.95,0.99"  #: samples beyond the outer ones follow --tail


def train(
    csv: price_flags.PriceFile,
    *,
    time: price_flags.TimeColumn,
    target: Annotated[
        list[str], typer.Option(help="price column, or pattern such as 'NSW*' (repeatable; all are fitted together)")
    ],
    out: Annotated[str, typer.Option(help="folder, created if missing, or store URL (s3://bucket/prefix)")],
    known_future: Annotated[
        list[str] | None,
        typer.Option(
            help="column that is known in advance, such as a load forecast (repeatable); may contain {target}"
        ),
    ] = None,
    architecture: Annotated[str, typer.Option(help=ARCHITECTURE_HELP)] = "",
    members: Annotated[int, typer.Option(min=1, max=64, help="number of networks in the ensemble of one archive")] = 1,
    config: Annotated[
        str, typer.Option(metavar="JSON", help="config fields of the architecture that differ from its defaults")
    ] = "{}",
    name_template: price_flags.NameTemplate = price_flags.NAME_TEMPLATE,
    prediction_length: Annotated[
        int, typer.Option(min=0, help="number of steps to forecast; 0: chosen by the frequency, 24 for hours")
    ] = 0,
    context_length: Annotated[
        int, typer.Option(min=0, help="number of past steps that are read; 0: 168, or 84 if a step is over an hour")
    ] = 0,
    quantiles: Annotated[
        str, typer.Option(help="quantile levels to forecast; samples need outer ones: beyond them is the tail rule")
    ] = QUANTILES,
    tail: Annotated[
        Literal["exponential", "clamp"],
        typer.Option(help="where samples beyond the outer levels lie: as far as past prices did, or on the levels"),
    ] = "exponential",
    max_missing: Annotated[
        float,
        typer.Option(min=0, max=1, help="share of a history that may be missing before its answer is marked for it"),
    ] = 0.25,
    fallback: Annotated[
        bool,
        typer.Option(
            "--fallback", help="answer histories that say too little by the last known day, with the band of its errors"
        ),
    ] = False,
    scaling: Annotated[
        Literal["asinh", "linear"], typer.Option(help="transform of the prices, fitted to their median and quartiles")
    ] = "asinh",
    origin: Annotated[
        str,
        typer.Option(
            metavar="HH:MM",
            help="time of day when every forecast starts, or any; default: 00:00 for lear with whole days, else any",
        ),
    ] = "",
    train_until: Annotated[str, typer.Option(metavar="DATE", help="use only the rows before this date")] = "",
    epochs: price_flags.Epochs = 0.0,
    minutes: Annotated[
        float, typer.Option(min=0, help="time limit, 0: none; a fit that reaches it is not reproducible")
    ] = 0.0,
    seed: price_flags.FitSeed = 0,
    threads: price_flags.FitThreads = 1,
    keep_worse: Annotated[
        bool, typer.Option("--keep-worse", help="store an archive too whose holdout loss is that of the naive or worse")
    ] = False,
    unit: Annotated[str, typer.Option(help="unit of the prices, recorded in the archive")] = "",
    time_zone: Annotated[
        str,
        typer.Option(
            metavar="ZONE", help="IANA time zone, such as Europe/Berlin, on whose clock the archive forecasts: its days"
        ),
    ] = "UTC",
    frequency: Annotated[
        str,
        typer.Option(
            metavar="STEP", help="step of the archive if that of the file changes, such as 15min; rows repeat"
        ),
    ] = "",
    interval_ending: price_flags.IntervalEnding = False,
    stamps_zone: price_flags.StampsZone = "",
    time_format: price_flags.TimeFormat = "",
    item: price_flags.Item = "",
) -> None:
    """Fit a forecaster to each price column of a CSV file and pack it as an archive with a golden sample.

    \b
    fleetcast train prices.csv --time hour --target NSW1 --target VIC1 --out ./models
    fleetcast train de.csv.gz --time hour --target price --known-future load --out s3://models --name-template de.mar

    The frequency is inferred from the stamps; empty cells of a price column are missing values. The last tenth of the
    rows is held out: its loss decides when training stops, and is shown beside the loss of the naive forecast (the
    value at the same time of the last known day, or week for daily data). The loss is the mean pinball loss over the
    quantile levels. What is stored is fitted once more, in the same way, to all rows.

    Stamps with an offset are taken to the clock of --time-zone, and so are those of a local clock that skips and
    repeats hours. An archive forecasts days of 24 hours: a repeated hour is read as the mean of both.
    """  # noqa: D301 -- click's mark for "do not wrap"
    from handlers.codecs.clock import check_zone_name  # noqa: PLC0415
    from handlers.training.fit import Fitting  # noqa: PLC0415
    from handlers.training.time_series import read_csv  # noqa: PLC0415 -- torch, here and below
    from server.offline.input_recipes import make_recipes  # noqa: PLC0415

    with one_line_errors():
        ahead_of = [escape(name).replace("{target}", "*") for name in known_future or []]
        target = price_flags.expand_targets(csv, target, [time, item.partition("=")[0]], ahead_of)
        names = name_archives(target, name_template)
        for name in known_future or []:
            if ahead := {name.replace("{target}", each) for each in target}.intersection(target):
                raise ValueError(f"--known-future {name}: {min(ahead)} is a target, whose future no request can know")
        rules = replace(
            price_flags.make_file_rules(interval_ending, stamps_zone, time_format, item),
            zone=check_zone_name(time_zone),
            step_s=_parse_frequency(frequency),
        )
        series = read_csv(csv, time, target, known_future or [], rules)
        if frequency and round(series[0].step.total_seconds()) != rules.step_s:
            raise ValueError(f"--frequency {frequency}: {csv.name} has steps of {series[0].frequency} throughout")
        price_flags.print_notes(csv, series[0].notes)
        if (end := parse_moment("--train-until", train_until)) is not None:
            series = [each.before(end) for each in series]
        options = _parse_config(config) | ({"members": members} if members > 1 else {})
        recipe: dict[str, Any] = {"tail": tail, "max_missing": max_missing, "fallback": fallback}
        recipe |= {"scaling": scaling, "unit": unit, "time_zone": time_zone, "levels": _parse_levels(quantiles)}
        recipe["origin"] = _parse_origin(origin)
        architecture = architecture or choose_architecture(series[0], prediction_length)
        series, forecasts, dead = _make_recipes(
            series, lambda one: make_recipes([one], architecture, options, prediction_length, context_length, recipe)[0]
        )
        _check_out(out, names[series[0].name])
        limit = minutes * 60 or float("inf")
        fitting = Fitting(epochs, max_seconds=limit, seed=seed, threads=threads)
        fitted, failed = _fit_what_can_be(series, forecasts, architecture, options, fitting)
        until = series[0].stamp(len(series[0].values) - 1)
        description = _describe_training(csv, series[0])
        failed |= dead
        if not keep_worse:
            fitted, worse = _refuse_worse(fitted)
            failed |= worse
        if not fitted:
            raise ValueError("; ".join(failed.values()))
        sizes = _store_archives(out, [(names[each.name], each) for each in fitted], description, (until, epochs))
        _report_archives(out, fitted, sizes)
    for name, why in failed.items():
        print(f"error: {escape_text(why if why.startswith(name) else f'{name}: {why}')}", file=sys.stderr)  # noqa: T201
    if failed:
        raise typer.Exit(BAD)


def name_archives(targets: Sequence[str], template: str) -> dict[str, ModelName]:
    """Target -> name in the store. Raises ValueError (InvalidModelName) for an invalid name or one of two targets."""
    names = {target: parse_model_name(template.replace("{target}", target)) for target in targets}
    if len(names) < len(targets):
        raise ValueError("--target names a column twice")
    if len(set(names.values())) < len(names):
        raise ValueError(f"--name-template {template!r} gives several targets the same name; put {{target}} into it")
    return names


def match_markets(
    csv: Path, time: str, targets: Sequence[str], settings: "Settings", template: str
) -> Mapping[str, ModelName]:
    """Target -> name in the store: of these columns, or of those with an archive (all, or what patterns match).

    Raises ValueError for a pattern without a match, LoadError, SeriesInvalid, OSError.
    """
    from handlers.training.time_series import read_header  # noqa: PLC0415
    from server.offline.fleet_evaluation import match_columns  # noqa: PLC0415 -- torch

    if not targets:
        return match_columns(csv, time, settings, template)
    if not any(map(price_flags.PATTERN.search, targets)):
        return name_archives(targets, template)
    there = match_columns(csv, time, settings, template)
    return name_archives(price_flags.expand_targets(csv, targets, set(read_header(csv)) - set(there)), template)


def _check_out(out: str, name: ModelName) -> None:
    """Check before the fit that `out` can be written to; nothing is created. Raises ValueError."""
    if "://" in out:
        from server.offline.archive_location import locate_archive  # noqa: PLC0415 -- torch

        locate_archive(settings_from({"store": out}), name)
        return
    folder = Path(out).expanduser().absolute()
    nearest = next(each for each in (folder, *folder.parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {out}: {nearest} is not a folder that can be written to")


def choose_architecture(series: "Series", prediction_length: int) -> str:
    """The architecture that has the least errors for prices of this step, by DECISIONS 80."""
    from handlers.training.input_recipe import DAY, HOUR, choose_prediction_length  # noqa: PLC0415

    step_s = round(series.step.total_seconds())
    whole_days = (prediction_length or choose_prediction_length(step_s)) * step_s % DAY == 0
    return "lear" if HOUR / 4 <= step_s <= HOUR and DAY % step_s == 0 and whole_days else "tcn"


def _make_recipes(
    series: Sequence["Series"], make: Callable[["Series"], "ForecastSpec"]
) -> tuple[list["Series"], list["ForecastSpec"], dict[str, str]]:
    """The series that have values, their recipes, and why the others have none. Raises SeriesInvalid if none has."""
    from handlers.training.time_series import SeriesInvalid  # noqa: PLC0415

    found, dead = dict[str, tuple["Series", "ForecastSpec"]](), dict[str, str]()
    for each in series:
        try:
            found[each.name] = (each, make(each))
        except SeriesInvalid as error:
            if len(series) == 1:
                raise
            dead[each.name] = str(error)
    if not found:
        raise SeriesInvalid("; ".join(dead.values()))
    return [each for each, _ in found.values()], [recipe for _, recipe in found.values()], dead


def _fit_what_can_be(
    series: Sequence["Series"],
    forecasts: Sequence["ForecastSpec"],
    architecture: str,
    config: Mapping[str, Any],
    fitting: "Fitting",
) -> tuple[list["Fitted"], dict[str, str]]:
    """Fit all series together; if one cannot be fitted, each alone, and say why. Raises SeriesInvalid if none can."""
    from handlers.training.time_series import SeriesInvalid  # noqa: PLC0415

    try:
        return _fit_with_progress(series, forecasts, architecture, config, fitting), {}
    except SeriesInvalid:
        if len(series) == 1:
            raise
    fitted, failed = list["Fitted"](), dict[str, str]()
    for each, recipe in zip(series, forecasts, strict=True):
        try:
            fitted += _fit_with_progress([each], [recipe], architecture, config, fitting)
        except SeriesInvalid as error:
            failed[each.name] = str(error)
    if not fitted:
        raise SeriesInvalid("; ".join(failed.values()))
    return fitted, failed


def _refuse_worse(fitted: Sequence["Fitted"]) -> tuple[list["Fitted"], dict[str, str]]:
    """Those that are better than the naive forecast, and why the others are not stored."""
    from handlers.training.fit import explain_worse  # noqa: PLC0415

    why = {each.name: explain_worse(each) for each in fitted}
    refused = {name: f"{text}; it is not stored (--keep-worse stores it)" for name, text in why.items() if text}
    return [each for each in fitted if each.name not in refused], refused


def _fit_with_progress(
    series: Sequence["Series"],
    forecasts: Sequence["ForecastSpec"],
    architecture: str,
    config: Mapping[str, Any],
    fitting: "Fitting",
) -> list["Fitted"]:
    """Fit all series, with a progress bar on stderr."""
    from handlers.training.fit import fit_forecasters  # noqa: PLC0415

    with make_progress_bar(TextColumn("{task.fields[loss]}")) as shown:
        task = shown.add_task(f"fitting {len(series)} {architecture}", total=None, loss="")

        def progress(done: int, steps: int, loss: float) -> None:
            shown.update(task, completed=done, total=steps, loss=f"holdout loss {loss:.4f}")

        return fit_forecasters(series, forecasts, architecture, dict(config), fitting, progress)


def _store_archives(
    out: str, named: Sequence[tuple[ModelName, "Fitted"]], description: str, trained: tuple[str, float]
) -> list[int]:
    """Pack the archives, verify them as a worker would, and store them. Returns their sizes in bytes.

    `trained`: until when, and the epochs that were asked for.
    """
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
                tensors=each.tensors,
                architecture=each.architecture,
                config=each.config,
                forecast=each.forecast,
                trained_until=trained[0],
                trained_epochs=trained[1],
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
    """The archive's description: the price file and the range of its rows that the fit used."""
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
    print(f"a request contains {steps}{known} and its answer the next {ahead}; to serve the archives:")  # noqa: T201
    print(f"fleetcast serve --store {out}")  # noqa: T201


def _parse_origin(text: str) -> str:
    if text not in ("", "any") and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", text):
        raise ValueError(f"--origin: expected a time of day such as 00:00, or any, not {text!r}")
    return text


def _parse_frequency(text: str) -> int:
    """The seconds of a step, 0 for none."""
    from handlers.codecs.features import parse_step_seconds  # noqa: PLC0415
    from model_store.errors import ArchiveInvalid  # noqa: PLC0415

    try:
        return parse_step_seconds(text) if text else 0
    except ArchiveInvalid:
        raise ValueError(f"--frequency: expected a step such as 15min or 1h, not {text!r}") from None


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
        what = f"an object such as '{{\"channels\": 32}}' without {', '.join(DECIDED)}, which other options set"
        raise ValueError(f"--config: expected {what}, not {text!r}")
    return found
