"""Fleets to test with: the archives that a seed makes, under names like those of real markets, and their writing.

fleetcast-load fleet FOLDER|URL --models 10000 --families tcn:0.7,mlp-64:0.2,trained:0.1

`Fleet` is pure: it gives each name a kind of model. `synthetic_archives` makes the archives; it needs torch and is
imported only to write. INVARIANT: the first names of a fleet are the same for every size of it.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.table import Table

from loadtest.fleets.archive_writer import (
    ReadyArchive,
    StoreOccupied,
    WriteCounts,
    console,
    write_archives,
)
from loadtest.fleets.network_shape import TRAINED
from model_store.errors import LoadError
from model_store.names import ModelName
from model_store.stores.object_store import open_source
from server.shell.errors import describe_error
from server.shell.progress import Task, TaskList, follow_tasks

if TYPE_CHECKING:
    from handlers.training.fit import Fitted
    from handlers.training.fit import Progress as Fitting

SEEDS_APART = 1_000_000  #: more than the models of a fleet, so that fleets of different seeds share no weights
TOGETHER = 200  #: models that are fitted at a time, in a third of a gigabyte

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


# --- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FleetMember:
    """One model: its name, its index in the fleet, and its kind."""

    name: ModelName
    index: int
    kind: str


@dataclass(frozen=True, slots=True)
class Fleet:
    """`models` models of the kinds in `shares`, which maps a kind to its relative weight.

    A model's kind is drawn by its name and the seed: it is the kind of least -log(u) / share, where u is a uniform
    number of that model and kind (weighted rendezvous). So a changed share of one kind moves models only to or from
    that kind, and a changed size of the fleet changes no model.
    """

    models: int = 200
    seed: int = 0
    shares: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({"tcn": 1.0}))

    def members(self) -> list[FleetMember]:
        """The models in the order of `list_fleet_names`."""
        return [FleetMember(name, i, self._kind(name)) for i, name in enumerate(list_fleet_names(self.models))]

    def seed_of(self, member: FleetMember) -> int:
        """Return the seed of a model's weights."""
        return self.seed * SEEDS_APART + member.index

    def _kind(self, name: ModelName) -> str:
        return min(self.shares, key=lambda kind: -math.log(self._uniform(name, kind)) / self.shares[kind])

    def _uniform(self, name: ModelName, kind: str) -> float:
        """Return the uniform number of a model and kind, above 0 and at most 1."""
        digest = blake2b(f"{self.seed} {kind} {name}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") + 1) / 2**64


def list_fleet_names(models: int) -> list[ModelName]:
    """List the first `models` names, such as `au/nsw1/energy.mar`; beyond 205 they repeat with a number."""
    plain = [
        f"{market}/{zone}/{product}"
        for market, (zones, products) in MARKETS.items()
        for zone in zones.split()
        for product in products.split()
    ]
    rounds = itertools.chain(("",), (f"-{i}" for i in itertools.count(2)))
    names = (ModelName(f"{name}{suffix}.mar") for suffix in rounds for name in plain)
    return list(itertools.islice(names, models))


def parse_families(text: str) -> dict[str, float]:
    """Parse `tcn:0.7,mlp-64:0.3`, or just `tcn`, into shares. Raises ValueError."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        kind, colon, share = part.strip().partition(":")
        try:
            weight = float(share) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not kind or kind in shares or not 0 < weight < math.inf:
            raise ValueError(f"{part!r} in the families {text!r}: give each once, as NAME:SHARE with a share above 0")
        shares[kind] = weight
    return shares


def parse_sizes(text: str) -> tuple[int, float]:
    """Parse `70KB:1` into the median in bytes and the standard deviation of the logarithm. Raises ValueError."""
    median, _, sigma = text.partition(":")
    try:
        size, spread = TypeAdapter(ByteSize).validate_python(median), float(sigma)
    except (ValidationError, ValueError):
        size, spread = ByteSize(0), 0.0
    if not (size > 0 and 0 < spread < math.inf):
        raise ValueError(f"the sizes {text!r}: give MEDIAN:SIGMA, such as 70KB:1")
    return int(size), spread


# --- writing it -----------------------------------------------------------------------------------------------------


def write_fleet(fleet: Fleet, where: str, tasks: TaskList, *, over: bool = False) -> WriteCounts:
    """Make the archives of a fleet and write them; see `archive_writer.write_archives`.

    Raises:
        ValueError: an unknown kind. Also what `write_archives` raises.
    """
    from loadtest.fleets.synthetic_archives import check_kind  # noqa: PLC0415 -- torch

    for kind in fleet.shares:
        check_kind(kind)
    members = fleet.members()
    return write_archives(
        where, {each.name for each in members}, _make_archives(fleet, members, tasks), tasks, over=over
    )


def make_fleet(where: str, models: int = 200, seed: int = 0, families: str = "tcn") -> list[ModelName]:
    """Write a fleet over existing archives and return its names. Raises as `write_fleet` and `parse_families` do."""
    with follow_tasks() as tasks:
        write_fleet(Fleet(models, seed, parse_families(families)), where, tasks, over=True)
    return list_fleet_names(models)


def make_trained_fleet(
    where: str, models: int = 200, seed: int = 0, progress: "Fitting | None" = None
) -> "list[Fitted]":
    """Fit forecasters of synthetic markets together and write them; returns names as `list_fleet_names` orders them."""
    from loadtest.fleets.synthetic_archives import pack_fitted  # noqa: PLC0415 -- torch
    from loadtest.fleets.synthetic_markets import fit_markets  # noqa: PLC0415

    if "://" not in where:
        Path(where).mkdir(parents=True, exist_ok=True)
    source, fitted = open_source(where), fit_markets(range(models), seed, progress)
    for name, each in zip(list_fleet_names(models), fitted, strict=True):
        source.put(name, pack_fitted(each, name, seed))
    return fitted


def _make_archives(fleet: Fleet, members: Sequence[FleetMember], tasks: TaskList) -> Iterator[ReadyArchive]:
    """Yield the archives one by one; the trained ones come last, because they are fitted in groups."""
    from loadtest.fleets.synthetic_archives import make_archive, pack_fitted  # noqa: PLC0415 -- torch
    from loadtest.fleets.synthetic_markets import fit_markets  # noqa: PLC0415

    for member in members:
        if member.kind != TRAINED:
            yield ReadyArchive(member.name, member.kind, make_archive(member.kind, member.name, fleet.seed_of(member)))
    trained = [member for member in members if member.kind == TRAINED]
    for start in range(0, len(trained), TOGETHER):
        group = trained[start : start + TOGETHER]
        task = tasks.start_task(f"fitting {len(group)} markets together")
        look = partial(_show_fitting, task)
        for member, each in zip(group, fit_markets([each.index for each in group], fleet.seed, look), strict=True):
            yield ReadyArchive(member.name, TRAINED, pack_fitted(each, member.name, fleet.seed))
        task.end()


def _show_fitting(task: Task, done: int, most: int, _: float) -> None:
    task.update(done, most)


# --- the command ----------------------------------------------------------------------------------------------------


def main(
    where: Annotated[str, typer.Argument(metavar="FOLDER|URL", help="where to: a folder, or s3://bucket/prefix")],
    *,
    models: Annotated[int, typer.Option(min=1, max=SEEDS_APART, help="how many archives")] = 200,
    families: Annotated[str | None, typer.Option(help="NAME:SHARE,NAME:SHARE ...; else tcn alone")] = None,
    sizes: Annotated[
        str | None, typer.Option(metavar="MEDIAN:SIGMA", help="of the weights, instead of families")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="same seed, same bytes")] = 0,
    over: Annotated[
        bool, typer.Option("--over", help="write although other archives are there, and over them")
    ] = False,
    create_bucket: Annotated[bool, typer.Option("--create-bucket", help="make the s3:// URL's bucket first")] = False,
) -> None:
    """Make a fleet of archives for tests, in a folder or in an S3 bucket.

    \b
    fleetcast-load fleet models --models 200
    fleetcast-load fleet s3://bucket/models --families tcn:7,mlp-64:2,trained:1 --create-bucket

    --families gives the kinds and their shares: the networks tcn, gru, seq2seq and mlp with random weights, also with
    another width (mlp-64 has 64 hidden units); trained, a tcn fitted to a synthetic market of its own (20 a second);
    onnx, graphs that take tensors.

    --sizes 70KB:1 draws lognormal sizes instead: 70 KB of weights in the middle, a third of all beyond a factor of e
    either way, rounded to five widths of tcn, since models of one family share memory and batches.

    The same seed makes the same bytes, and a larger fleet begins with the smaller one. The same command continues an
    interrupted run: existing archives are compared and kept. For S3, boto3's settings apply.
    """  # noqa: D301 -- click's mark for "do not wrap"
    try:
        if create_bucket:
            _create_bucket(where)
        fleet = Fleet(models, seed, _parse_shares(families, sizes))
        with follow_tasks() as tasks:
            found = write_fleet(fleet, where, tasks, over=over)
    except (LoadError, StoreOccupied, ValueError, OSError) as error:
        raise SystemExit(f"no fleet: {describe_error(error)}") from error
    names = list_fleet_names(models)
    console.print(_build_table(found))
    kept = f", {found.kept} of them there before" if found.kept else ""
    console.print(f"{models} archives in {where}, from {names[0]} to {names[-1]}{kept}")


def _parse_shares(families: str | None, sizes: str | None) -> dict[str, float]:
    if sizes is None:
        return parse_families(families or "tcn")
    if families is not None:
        raise ValueError("give either --families or --sizes")
    from loadtest.fleets.synthetic_archives import compute_size_shares  # noqa: PLC0415 -- torch

    return compute_size_shares(*parse_sizes(sizes))


def _create_bucket(where: str) -> None:
    """Create the bucket of a store URL. Raises ValueError if the store has none."""
    import boto3  # noqa: PLC0415 -- a third of a second
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

    parts = urlsplit(where)
    if parts.scheme not in ("s3", "s3a"):
        raise ValueError(f"--create-bucket is for s3:// URLs, not for {where}")
    try:
        boto3.client("s3").create_bucket(Bucket=parts.netloc)
    except (BotoCoreError, ClientError) as error:
        if "BucketAlreadyOwnedByYou" in str(error):
            return
        raise ValueError(f"the bucket {parts.netloc} cannot be made: {error}") from error


def _build_table(found: WriteCounts) -> Table:
    """Make the table of the written archives, with a row for each kind."""
    table = Table("family", "archives", "KB each", "MB")
    for kind, (archives, size) in sorted(found.kinds.items()):
        table.add_row(kind, str(archives), f"{size / archives / 1e3:.1f}", f"{size / 1e6:.1f}")
    return table
