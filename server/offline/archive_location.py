"""Locates one archive, which may not exist yet: its store and its name there, from a path or a URL."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_store.archives.archive import Archive, Limits, open_archive
from model_store.names import ModelName, parse_model_name
from model_store.stores.object_store import Source
from server.settings import Settings
from server.worker.archive_store import open_store


@dataclass(frozen=True, slots=True)
class ArchiveLocation:
    """A store and the archive's name in it; the archive need not exist yet."""

    source: Source
    name: ModelName
    limits: Limits

    def fetch(self) -> tuple[Archive, bytes]:
        """Fetch the archive; returns it opened, and its bytes. Raises LoadError."""
        fetched = self.source.get(self.name)
        assert fetched is not None, "only a conditional GET is answered `not modified`"
        return open_archive(fetched.data, self.name, self.limits), fetched.data


def split_location(where: str) -> tuple[str, ModelName]:
    """Split the path or URL of an archive into its store and its name there. Raises InvalidModelName."""
    if "://" in where:
        store, _, name = where.rpartition("/")
    else:
        path = Path(where).expanduser().resolve()
        store, name = str(path.parent), path.name
    return store, parse_model_name(name)


def settings_of_store(store: str) -> Settings:
    """Return the settings of variables and file, with another store. Raises ValueError."""
    given: dict[str, Any] = {"store": store}
    return Settings(**given)


def locate_archive(settings: Settings, name: ModelName) -> ArchiveLocation:
    """Locate the archive `name` in the store of the settings. Raises InvalidStoreUrl, StoreDenied."""
    source, limits = open_store(settings)
    return ArchiveLocation(source, name, limits)
