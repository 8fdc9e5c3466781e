"""`fleetcast correlate` estimates how the errors of many forecasts are correlated. It imports torch when it runs."""

import sys
import time as clock
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import rich
import typer
from rich.table import Table

from model_store.names import ModelName
from server.cli import price_flags
from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, one_line_errors, parse_moment
from server.cli.train import name_archives
from server.shell.escaping import escape_text
from server.shell.progress import show_progress

if TYPE_CHECKING:
    from handlers.codecs.features import Float64
    from handlers.evaluation.correlation import Estimate
    from handlers.training.stamps import FileRules
    from server.offline.forecast_errors import Residuals

AXES = 3  #: of residuals


def correlate(
    csv: Annotated[
        Path | None,
        typer.Argument(metavar="CSV", help="price file (.csv or .csv.gz) with a header and one row per time step"),
    ] = None,
    *,
    target: Annotated[
        list[str], typer.Option(help="price column or pattern such as 'NSW*', or the name of a product (repeatable)")
    ],
    out: Annotated[str, typer.Option(metavar="ARCHIVE", help="path or store URL of the archive to write")],
    time: Annotated[str, typer.Option(help="column of the time stamps, which are evenly spaced")] = "",
    store: Annotated[
        str, typer.Option(help="folder or store URL of the forecasters; default: the store of `serve`")
    ] = "",
    name_template: Annotated[str, typer.Option(help="name of a target's archive in the store")] = "{target}.mar",
    residuals: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="errors [windows, targets, steps] instead of CSV and store")
    ] = None,
    since: Annotated[
        str,
        typer.Option(metavar="DATE", help="date of the first step that is forecast; default: that of the last tenth"),
    ] = "",
    every: Annotated[int, typer.Option(min=0, help="steps between windows; 0: the windows do not overlap")] = 0,
    method: Annotated[
        Literal["gaussian", "schaake"],
        typer.Option(help="gaussian keeps two small matrices, schaake the ranks of past windows"),
    ] = "gaussian",
    interval_ending: price_flags.IntervalEnding = False,
    stamps_zone: price_flags.StampsZone = "",
    time_format: price_flags.TimeFormat = "",
    item: price_flags.Item = "",
) -> None:
    """Estimate how the forecasts of several models move together, and pack it as an archive for joint scenarios.

    \b
    fleetcast correlate prices.csv --time hour --target NSW1 --target VIC1 --store ./models \\
        --since 2024-01-01 --out ./models/joint.mar
    fleetcast correlate --residuals errors.npy --target de.mar --target fr.mar --out s3://models/joint.mar

    In this process, each target's model forecasts the prices of rolling windows that it was not fitted to. Only the
    order of its errors is used: it tells how a high price of one product goes with a high price of another, and now
    with later. A product has the name of its model in the store; with --residuals it has the name that --target gives
    (a model's name, or model#product). Errors may be any numbers that rise with the actual price, NaN if it is missing.

    gaussian: a correlation matrix of the products and one of the steps, shrunk and made positive definite. schaake: the
    order of past windows itself, of any shape; only windows without missing values are used, and each takes memory.
    A target without an archive, a covariate or a price in the windows is left out, and the exit code is 1.
    """  # noqa: D301 -- click's mark for "do not wrap"
    with one_line_errors():
        started = clock.perf_counter()
        if residuals is not None and csv is None:
            found = _take_errors(residuals, target)
        elif csv is not None and residuals is None and time:
            names = name_archives(price_flags.expand_targets(csv, target, [time]), name_template)
            rules = price_flags.make_file_rules(interval_ending, stamps_zone, time_format, item)
            found = _measure_errors(csv, time, names, store, since, every, rules)
        else:
            raise ValueError("give a CSV file with --time, or --residuals")
        horizon = found.values.shape[2]
        overlap = max(1.0, horizon / (every or horizon))
        estimate = _estimate_correlation(method, found.values, found.products, overlap)
        size = _store_archive(out, estimate, f"estimated from {found.source}")
        _report_archive(out, estimate, size, clock.perf_counter() - started)
    for name, why in found.failed.items():
        print(escape_text(f"error: {why if why.startswith(name) else f'{name}: {why}'}"), file=sys.stderr)  # noqa: T201
    if found.failed:
        raise typer.Exit(BAD)


class _Errors(NamedTuple):
    """Errors [windows, products, steps] of products, what they are of, and why other targets have none."""

    values: "Float64"
    products: tuple[str, ...]
    source: str
    failed: Mapping[str, str]


def _take_errors(path: Path, target: Sequence[str]) -> _Errors:
    """The errors of a file, without the targets of which nothing is observed. Raises ValueError where none is left."""
    import numpy as np  # noqa: PLC0415 -- what help need not import

    errors = _read_errors(path, len(target))
    observed = [not np.isnan(errors[:, i]).all() for i in range(len(target))]
    failed = {each: "no error is observed" for each, some in zip(target, observed, strict=True) if not some}
    products = tuple(each for each in target if each not in failed)
    if not products:
        raise ValueError(f"--residuals {path}: no error is observed")
    return _Errors(errors[:, observed], products, path.name, failed)


def _measure_errors(
    csv: Path, time: str, names: dict[str, ModelName], store: str, since: str, every: int, rules: "FileRules"
) -> _Errors:
    """The errors of forecasts of windows; what limits them is printed."""
    made = _forecast_windows(csv, time, names, store, since, every, rules)
    price_flags.print_notes(csv, made.notes)
    source = f"{csv.name}, windows from {made.first} to {made.last}"
    return _Errors(made.values, tuple(names[each] for each in made.targets), source, made.failed)


def _read_errors(path: Path, products: int) -> "Float64":
    """Read errors [windows, products, steps]. Raises ValueError that says what the file contains instead."""
    import numpy as np  # noqa: PLC0415 -- what help need not import

    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"--residuals {path}: not an array of numbers: {error}") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
        raise ValueError(f"--residuals {path}: not one array of numbers")
    if found.ndim != AXES or found.shape[1] != products or not found.size:
        what = f"an array {list(found.shape)}, but expected [windows, {products}, steps]: a row for each --target"
        raise ValueError(f"--residuals {path}: {what}")
    if np.isinf(found).any():
        raise ValueError(f"--residuals {path}: a value is infinite; write NaN where one is missing")
    return found.astype(np.float64)


def _forecast_windows(
    csv: Path, time: str, names: dict[str, ModelName], store: str, since: str, every: int, rules: "FileRules"
) -> "Residuals":
    """Forecast all windows, with a progress bar on stderr."""
    from server.offline.forecast_errors import measure_errors  # noqa: PLC0415 -- torch

    settings, begin = settings_from({"store": store} if store else {}), parse_moment("--since", since)
    with show_progress("forecasting") as told:
        return measure_errors(settings, csv, time, names, begin, every, told, rules)


def _estimate_correlation(method: str, errors: "Float64", products: tuple[str, ...], overlap: float) -> "Estimate":
    from handlers.evaluation.correlation import estimate_gaussian, estimate_schaake  # noqa: PLC0415 -- torch

    return estimate_schaake(errors, products) if method == "schaake" else estimate_gaussian(errors, products, overlap)


def _store_archive(out: str, estimate: "Estimate", description: str) -> int:
    """Pack the estimate, verify it as a worker would, and store it. Returns its size in bytes."""
    from handlers.codecs.scenarios import load_correlation  # noqa: PLC0415
    from handlers.kinds import ArchiveParts, pack_model  # noqa: PLC0415
    from model_store.archives.archive import open_archive, read_tensors  # noqa: PLC0415
    from model_store.archives.manifest import Kind  # noqa: PLC0415
    from server.offline.archive_location import locate_archive, split_location  # noqa: PLC0415

    folder, name = split_location(out)
    packed = pack_model(
        Kind.CORRELATION,
        ArchiveParts(correlation=estimate.record, tensors=estimate.tensors),
        model_name=name.partition(".")[0],
        description=description,
    )
    load_correlation(estimate.record, read_tensors(open_archive(packed, name)))
    if "://" not in out:
        Path(folder).mkdir(parents=True, exist_ok=True)
    locate_archive(settings_from({"store": folder}), name).source.put(name, packed)
    return len(packed)


def _report_archive(out: str, estimate: "Estimate", size: int, seconds: float) -> None:
    record = estimate.record
    if estimate.matrices:
        table = Table("among", "", "independent of", "shrunk by", "condition before", "after")
        for among, matrix in zip(("products", "steps"), estimate.matrices, strict=True):
            count, all_of = len(matrix.correlation), matrix.observations
            table.add_row(
                among, str(count), f"{matrix.independent:.0f} of {all_of:.0f}", f"{matrix.shrinkage:.3f}",
                f"{matrix.condition_before:.3g}", f"{matrix.condition:.3g}",
            )  # fmt: skip
        rich.print(table)
    what = f"{len(record.products)} products, {record.horizon} steps, {record.windows} windows"
    print(f"{out}: {size} bytes, {record.method}: {what}, {seconds:.1f} s")  # noqa: T201
