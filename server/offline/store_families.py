"""The families that `fleetcast doctor` measures: the built-in architectures, or those found in a store. Torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from handlers import forecasters
from handlers.base import Family, Float32
from handlers.model import open_model
from model_store.errors import LoadError
from server.offline.archive_location import ArchiveLocation
from server.offline.host_checks import HostFact
from server.settings import Settings
from server.worker.archive_store import open_store

MOST_ARCHIVES = 20  #: most archives of a store that are opened, spread over its listing


@dataclass(frozen=True, slots=True)
class Measurable:
    """A family, the row of one of its models, its name for people, and the number of opened archives of it."""

    name: str
    family: Family
    row: Float32
    archives: int = 0


@dataclass(slots=True)
class StoreFamilies:
    """The families of a store by key, and facts. `bad` says that it or some archives cannot be opened."""

    families: dict[str, Measurable] = field(default_factory=dict)
    facts: list[HostFact] = field(default_factory=list)
    bad: bool = False


def make_built_in_families() -> Iterator[Measurable]:
    """Make a family of every architecture in its default configuration, with random numbers."""
    for name in forecasters.ARCHITECTURES:
        family = forecasters.build_family(name, {})
        yield Measurable(name, family, family.row(forecasters.random_tensors(family, 0)))


def find_families(settings: Settings, report_progress: Callable[[int, int], None]) -> StoreFamilies:
    """Open some archives of the store as a worker does, all but their golden samples."""
    found = StoreFamilies()
    try:
        source, limits = open_store(settings)
        names = [listed.name for listed in source.list()]
    except (LoadError, ValueError) as error:
        found.facts.append(HostFact("store", settings.store, f"{error}"))
        found.bad = True
        return found
    empty = "" if names else "it is empty: `fleetcast train` and `fleetcast pack` make archives"
    found.facts.append(HostFact("store", f"{settings.store}: {len(names)} archives", empty))
    until: list[str] = []
    some = names[:: -(-len(names) // MOST_ARCHIVES)] if names else []
    for name in some:
        report_progress(1, len(some))
        try:
            archive, _ = ArchiveLocation(source, name, limits).fetch()
            model = open_model(archive)
        except LoadError as error:
            found.bad = True
            found.facts.append(HostFact("archive", name, f"would not load: {error}"))
            continue
        if archive.spec is not None and archive.spec.forecast is not None:
            until.append(archive.spec.trained_until or "")
        family, row = model.built.body.family, model.built.row
        if family is not None and row is not None:
            seen = found.families.get(family.key)
            count = seen.archives + 1 if seen else 1
            found.families[family.key] = Measurable(family.key, family, row, count)
    if until:
        found.facts.append(describe_training(until))
    return found


def describe_training(until: Sequence[str]) -> HostFact:
    """Say until when archives were trained, by their records, empty if one does not say."""
    known = sorted(filter(None, until))
    text = f"{known[0]} to {known[-1]}" if known else "unknown"
    unknown = len(until) - len(known)
    advice = (
        f"{unknown} of {len(until)} archives do not say, so that no backtest can tell their in-sample windows: retrain"
    )
    return HostFact("trained until", text, advice if unknown else "")
