"""`fleetcast train` fits forecasters to a price file and stores them as archives. It imports torch when it runs."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import rich
import typer
from rich.table import Table

from handlers.architectures import SUMMARIES
from model_store.names import ModelName, parse_model_name
from server.cli import architecture_flags, price_flags
from server.cli.architecture_flags import parse_architecture
from server.cli.command_flags import with_flags
from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, one_line_errors, parse_moment, verbatim
from server.shell.escaping import escape_text
from server.shell.progress import watch_progress

if TYPE_CHECKING:
    from handlers.training.fit import Progress
    from handlers.training.stamps import FileRules
    from server.offline.training import GroupPlace, Trained, TrainingPlan
    from server.settings import Settings

SHOWN = 10  #: most names of archives that were there already
CHOSEN = "default: lear for days of steps of 15 minutes to an hour, else tcn"
SEVERAL = "several make one archive of their weighted mean, such as lear:3,ddnn,ddnn@linear; lear:3 has 3 members"
ARCHITECTURE_HELP = f"\b\n{CHOSEN}\n{SEVERAL}\n" + "\n".join(
    f"{name}: {summary}" for name, summary in SUMMARIES.items()
)
QUANTILES = "0.01,0.05,0.1,0.25,0.5,0.75,0.9,0.95,0.99"  #: samples beyond the outer ones follow --tail


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainFlags:
    """The flags of `fleetcast train`."""

    csv: price_flags.PriceFile
    time: price_flags.TimeColumn
    target: Annotated[
        list[str], typer.Option(help="price column, or pattern such as 'NSW*' (repeatable; all are fitted together)")
    ]
    out: Annotated[str, typer.Option(help="folder, created if missing, or store URL (s3://bucket/prefix)")]
    known_future: Annotated[
        list[str] | None,
        typer.Option(
            help="column that is known in advance, such as a load forecast (repeatable); may contain {target}"
        ),
    ] = None
    residual_to: price_flags.ResidualTo = ""
    architecture: Annotated[str, typer.Option(help=ARCHITECTURE_HELP)] = ""
    members: Annotated[int, typer.Option(min=1, max=64, help="number of networks in the ensemble of one archive")] = 1
    stack: architecture_flags.Stack = False
    config: Annotated[
        str,
        typer.Option(
            metavar="JSON",
            help="config fields of the architecture that differ from its defaults; of several, by architecture",
        ),
    ] = "{}"
    name_template: price_flags.NameTemplate = price_flags.NAME_TEMPLATE
    prediction_length: Annotated[
        int, typer.Option(min=0, help="number of steps to forecast; 0: chosen by the frequency, 24 for hours")
    ] = 0
    context_length: Annotated[
        int, typer.Option(min=0, help="number of past steps that are read; 0: 168, or 84 if a step is over an hour")
    ] = 0
    quantiles: Annotated[
        str, typer.Option(help="quantile levels to forecast; samples need outer ones: beyond them is the tail rule")
    ] = QUANTILES
    tail: Annotated[
        Literal["exponential", "clamp"],
        typer.Option(help="where samples beyond the outer levels lie: as far as past prices did, or on the levels"),
    ] = "exponential"
    max_missing: Annotated[
        float,
        typer.Option(min=0, max=1, help="share of a history that may be missing before its answer is marked for it"),
    ] = 0.25
    fallback: Annotated[
        bool,
        typer.Option(
            "--fallback", help="answer histories that say too little by the last known day, with the band of its errors"
        ),
    ] = False
    scaling: Annotated[
        Literal["asinh", "linear"], typer.Option(help="transform of the prices, fitted to their median and quartiles")
    ] = "asinh"
    origin: Annotated[
        str,
        typer.Option(
            metavar="HH:MM",
            help="time of day when every forecast starts, or any; default: 00:00 for lear with whole days, else any",
        ),
    ] = ""
    train_until: Annotated[str, typer.Option(metavar="DATE", help="use only the rows before this date")] = ""
    epochs: price_flags.Epochs = 0.0
    half_life: price_flags.HalfLife = 0.0
    minutes: Annotated[
        float, typer.Option(min=0, help="time limit, 0: none; a fit that reaches it is not reproducible")
    ] = 0.0
    seed: price_flags.FitSeed = 0
    threads: price_flags.FitThreads = 1
    keep_worse: Annotated[
        bool, typer.Option("--keep-worse", help="store an archive too whose holdout loss is that of the naive or worse")
    ] = False
    unit: Annotated[str, typer.Option(help="unit of the prices, recorded in the archive")] = ""
    time_zone: Annotated[
        str,
        typer.Option(
            metavar="ZONE", help="IANA time zone, such as Europe/Berlin, on whose clock the archive forecasts: its days"
        ),
    ] = "UTC"
    frequency: Annotated[
        str,
        typer.Option(
            metavar="STEP", help="step of the archive if that of the file changes, such as 15min; rows repeat"
        ),
    ] = ""
    interval_ending: price_flags.IntervalEnding = False
    stamps_zone: price_flags.StampsZone = ""
    time_format: price_flags.TimeFormat = ""
    item: price_flags.Item = ""


@with_flags(TrainFlags)
def train(flags: TrainFlags) -> None:
    """Fit a forecaster to each price column of a CSV file and pack it as an archive with a golden sample.

    \b
    fleetcast train prices.csv --time hour --target NSW1 --target VIC1 --out ./models
    fleetcast train de.csv.gz --time hour --target price --known-future load --out s3://models --name-template de.mar

    The frequency is inferred from the stamps; empty cells of a price column are missing values. The last tenth of the
    rows is held out: its loss decides when training stops, and is shown beside the loss of the naive forecast (the
    value at the same time of the last known day, or week for daily data). The loss is the mean pinball loss over the
    quantile levels. What is stored is fitted once more, in the same way, to all rows. Many targets are fitted and
    stored in groups; what is in the store already, of the same rows and flags, is not fitted again.

    With --residual-to the network learns how prices deviate from a column that forecasts them, such as an operator's
    own forecast; each request brings that column's numbers, and the forecast is added to them.

    Stamps with an offset are taken to the clock of --time-zone, and so are those of a local clock that skips and
    repeats hours. An archive forecasts days of 24 hours: a repeated hour is read as the mean of both.
    """  # noqa: D301 -- click's mark for "do not wrap"
    from server.offline.training import train_archives  # noqa: PLC0415 -- torch

    with one_line_errors():
        plan = make_training_plan(flags)
        with watch_progress("fitting") as update:
            found = train_archives(plan, partial(_watch_group, update))
    price_flags.print_notes(flags.csv, found.notes)
    _report_archives(flags.out, found)
    for name, why in found.failed.items():
        print(f"error: {escape_text(why if why.startswith(name) else f'{name}: {why}')}", file=sys.stderr)  # noqa: T201
    if found.failed:
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


def make_training_plan(flags: TrainFlags) -> "TrainingPlan":
    """Check the flags, and look up in the file which columns they mean. Raises ValueError, SeriesInvalid, OSError."""
    from handlers.training.fit import Fitting  # noqa: PLC0415 -- torch, here and below
    from server.offline.training import TrainingPlan  # noqa: PLC0415

    targets = _choose_targets(flags)
    rules = _make_rules(flags)
    limit = flags.minutes * 60 or float("inf")
    architecture, config = parse_architecture(flags.architecture, flags.config, flags.members, stack=flags.stack)
    return TrainingPlan(
        csv=flags.csv,
        time=flags.time,
        names=name_archives(targets, flags.name_template),
        known_future=_list_known_future(flags),
        residual_to=flags.residual_to,
        rules=rules,
        out=flags.out,
        settings=settings_from({"store": flags.out}),
        until=parse_moment("--train-until", flags.train_until),
        architecture=architecture,
        config=config,
        prediction_length=flags.prediction_length,
        context_length=flags.context_length,
        options=_make_recipe_options(flags),
        fitting=Fitting(
            flags.epochs,
            half_life_days=flags.half_life,
            max_seconds=limit,
            seed=flags.seed,
            threads=flags.threads,
        ),
        keep_worse=flags.keep_worse,
    )


def _choose_targets(flags: TrainFlags) -> list[str]:
    """The columns that the targets and their patterns name. Raises ValueError for one that is known in advance."""
    known_future = _list_known_future(flags)
    ahead_of = [escape(name).replace("{target}", "*") for name in known_future]
    others = [flags.time, flags.item.partition("=")[0]]
    targets = price_flags.expand_targets(flags.csv, flags.target, others, ahead_of)
    for name in known_future:
        if ahead := {name.replace("{target}", each) for each in targets}.intersection(targets):
            flag = "--residual-to" if name == flags.residual_to else "--known-future"
            raise ValueError(f"{flag} {name}: {min(ahead)} is a target, whose future no request can know")
    return targets


def _list_known_future(flags: TrainFlags) -> list[str]:
    """The columns that each request brings: those known in advance, and the one that deviations are from."""
    known = flags.known_future or []
    return [*known, flags.residual_to] if flags.residual_to and flags.residual_to not in known else known


def _make_rules(flags: TrainFlags) -> "FileRules":
    """The rules by which the file is read, on the clock and with the step of the archive. Raises ValueError."""
    from handlers.codecs.clock import check_zone_name  # noqa: PLC0415 -- numpy

    rules = price_flags.make_file_rules(flags.interval_ending, flags.stamps_zone, flags.time_format, flags.item)
    return replace(rules, zone=check_zone_name(flags.time_zone), step_s=_parse_frequency(flags.frequency))


def _make_recipe_options(flags: TrainFlags) -> dict[str, Any]:
    """What `handlers.training.input_recipe.make_recipe` is told beside lengths. Raises ValueError."""
    return {
        "tail": flags.tail,
        "max_missing": flags.max_missing,
        "fallback": flags.fallback,
        "scaling": flags.scaling,
        "unit": flags.unit,
        "time_zone": flags.time_zone,
        "levels": _parse_levels(flags.quantiles),
        "origin": _parse_origin(flags.origin),
    }


@contextmanager
def _watch_group(update: "Callable[[float, int, str], None]", place: "GroupPlace") -> Iterator["Progress"]:
    """Count the steps of one fit as a share of its targets, with the loss of its holdout."""

    def progress(done: int, steps: int, loss: float) -> None:
        share = place.size * done / max(1, steps)
        update(place.done + share, place.total, f"{place.architecture}, holdout loss {loss:.4f}")

    yield progress
    update(place.done + place.size, place.total, place.architecture)


def _report_archives(out: str, found: "Trained") -> None:
    """Print a table of the archives, what a request contains, and how to serve them."""
    table = Table("target", "holdout loss", "naive", "ratio", "bytes")
    for each in found.stored:
        ratio = f"{each.loss / each.naive_loss:.2f}" if each.naive_loss else ""
        table.add_row(verbatim(each.target), f"{each.loss:.3f}", f"{each.naive_loss:.3f}", ratio, str(each.size))
    if found.stored:
        rich.print(table)
    if found.unchanged:
        names = ", ".join(each.target for each in found.unchanged[:SHOWN])
        more = f" and {len(found.unchanged) - SHOWN} more" if len(found.unchanged) > SHOWN else ""
        print(escape_text(f"{names}{more}: there already, of the same fit"))  # noqa: T201
    forecast = (found.stored or found.unchanged)[0].forecast
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
