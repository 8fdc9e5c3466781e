"""The table of registrations: model name -> versions -> what each is served from, and how. Pure.

Names and versions are a client's words, so that both are bounded, in length and in number.
"""

from collections.abc import Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from model_store.name_table import name_bytes
from model_store.names import ModelName
from server.ipc.operations import Batching, RegisteredModel, ServedVersion
from server.supervisor.registrations.refusals import (
    AlreadyRegistered,
    BadOption,
    DefaultVersionStays,
    ModelUnknown,
    TableFull,
    VersionUnknown,
)

MOST_NAMES = 10_000
MOST_VERSIONS = 100  #: of one name
MAX_TABLE_BYTES = 32 * 1024 * 1024  #: of all registrations together
REGISTRATION_BYTES = 1024  #: of one beside its texts
MAX_VERSION = 128  #: characters of a version


class ServingOptions(Struct, frozen=True):
    """How a version is served, in the terms of TorchServe's management API.

    `min_workers` 0: it answers nothing until it is scaled. Delays and time-outs as clients say them. `says_batching`: a
    client has said how it is batched, which then goes before what the archive says.
    """

    min_workers: int = 0
    max_workers: int = 0
    batch_size: int = 1
    max_batch_delay_ms: int = 100
    response_timeout_s: float = 120.0
    startup_timeout_s: float = 120.0
    says_batching: bool = False

    @property
    def batching(self) -> Batching | None:
        """For workers; None where the archive's own holds."""
        return Batching(self.batch_size, self.max_batch_delay_ms / 1e3) if self.says_batching else None


class Registration(Struct, frozen=True):
    """One version of one name. `url`: as the client named the archive; `key`: what it is called in the store."""

    name: str
    version: str
    url: str
    key: ModelName
    handler: str
    runtime: str
    options: ServingOptions
    loaded_at: float = 0.0  #: wall clock, when it was last given workers; 0: it has none
    has_code: bool = False  #: whether it is a code archive
    is_loading: bool = False  #: workers have been asked for, and are not there yet
    at_start: bool = False  #: whether the settings have registered it


class RegistrationTable:
    """See the module. Every change raises a `RegistrationRefused` before anything is changed."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, Registration]] = {}
        self._defaults: dict[str, str] = {}
        self._batching: dict[ModelName, dict[tuple[str, str], Batching]] = {}  # in the order of registration
        self._replicas: dict[ModelName, dict[tuple[str, str], int]] = {}  # workers of code, where they are several
        self._bytes = 0

    def __repr__(self) -> str:
        """For example `<RegistrationTable 12 names>`."""
        return f"<RegistrationTable {len(self._models)} names>"

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def __iter__(self) -> Iterator[str]:
        """The names, sorted."""
        return iter(sorted(self._models))

    def find(self, name: str, version: str | None = None) -> Registration:
        """This version, or the default one. Raises ModelUnknown, VersionUnknown."""
        versions = self._find_versions(name)
        found = versions.get(self._defaults[name] if version is None else version)
        if found is None:
            raise VersionUnknown(name, version or "")
        return found

    def list_versions(self, name: str) -> Sequence[Registration]:
        """All versions of a name, the default one first. Raises ModelUnknown."""
        default = self._defaults.get(name)
        return sorted(self._find_versions(name).values(), key=lambda each: (each.version != default, each.version))

    def is_default(self, registration: Registration) -> bool:
        """Whether it is its name's default version."""
        return self._defaults.get(registration.name) == registration.version

    def find_batching(self, key: ModelName) -> Batching | None:
        """How the archive is batched: as the version says that was registered last of those that say it."""
        said = self._batching.get(key)
        return said[next(reversed(said))] if said else None

    def list_batching(self) -> dict[str, Batching | None]:
        """Of all archives for which a client has said it."""
        return {key: self.find_batching(key) for key in self._batching}

    def find_replicas(self, key: ModelName) -> int:
        """How many processes the archive should have: as the registration says that has the most workers."""
        return max(self._replicas.get(key, {}).values(), default=1)

    def list_replicas(self) -> dict[str, int]:
        """Of all archives that should have more than one."""
        return {key: self.find_replicas(key) for key in self._replicas}

    def shares_key(self, registration: Registration) -> bool:
        """Whether another registration with workers is served from the same archive."""
        return any(
            each.key == registration.key and each.options.min_workers > 0
            for versions in self._models.values()
            for each in versions.values()
            if (each.name, each.version) != (registration.name, registration.version)
        )

    def require_free(self, registration: Registration) -> None:
        """Raises AlreadyRegistered, TableFull, BadOption where this version cannot be added."""
        name, version = registration.name, registration.version
        if not 1 <= len(version) <= MAX_VERSION or not version.isprintable() or "/" in version:
            raise BadOption(f"a version has 1 to {MAX_VERSION} printable characters without a slash")
        versions = self._models.get(name, {})
        if version in versions:
            raise AlreadyRegistered(name, version)
        if len(self._models) + (not versions) > MOST_NAMES or len(versions) >= MOST_VERSIONS:
            raise TableFull(f"{MOST_NAMES} models with {MOST_VERSIONS} versions each can be registered; remove some")
        if self._bytes + _size(registration) > MAX_TABLE_BYTES:
            raise TableFull(f"registered models take {MAX_TABLE_BYTES} bytes at most; remove some")

    def add(self, registration: Registration) -> None:
        """Register a version. The first one of a name is its default."""
        name, version = registration.name, registration.version
        self.require_free(registration)
        self._models.setdefault(name, {})[version] = registration
        self._defaults.setdefault(name, version)
        self._bytes += _size(registration)
        self._note_replicas(registration, registration.options.min_workers)
        if registration.options.batching is not None:
            self._batching.setdefault(registration.key, {})[name, version] = registration.options.batching

    def put(self, registration: Registration) -> None:
        """Replace what is known of a version that is registered. Raises ModelUnknown, VersionUnknown."""
        self.find(registration.name, registration.version)
        self._models[registration.name][registration.version] = registration
        self._note_replicas(registration, registration.options.min_workers)

    def set_default(self, name: str, version: str) -> None:
        """Make this version the one that answers where none is named. Raises ModelUnknown, VersionUnknown."""
        self.find(name, version)
        self._defaults[name] = version

    def require_removable(self, name: str, version: str | None) -> Registration:
        """What would be removed. Raises ModelUnknown, VersionUnknown, DefaultVersionStays."""
        found = self.find(name, version)
        if self.is_default(found) and len(self._models[name]) > 1:
            raise DefaultVersionStays(name)
        return found

    def remove(self, name: str, version: str | None = None) -> Registration:
        """Remove this version, or the default one, which must be the last. Raises as `require_removable`."""
        found = self.require_removable(name, version)
        self.discard(found)
        return found

    def discard(self, registration: Registration) -> None:
        """Remove a version that has failed, whatever others there are. One of those is the default then."""
        name, version = registration.name, registration.version
        versions = self._models.get(name, {})
        removed = versions.pop(version, None)
        if removed is None:
            return
        self._bytes -= _size(removed)
        self._note_replicas(removed, 0)
        said = self._batching.get(registration.key, {})
        if said.pop((name, version), None) is not None and not said:
            del self._batching[registration.key]
        if not versions:
            del self._models[name], self._defaults[name]
        elif self._defaults[name] == version:
            self._defaults[name] = min(versions)

    def describe_for_fronts(self, name: str) -> RegisteredModel | None:
        """What a front has to know of a name; None: nothing is registered under it."""
        versions = self._models.get(name)
        if versions is None:
            return None
        served = {
            each.version: ServedVersion(each.key, each.options.min_workers, each.options.response_timeout_s)
            for each in versions.values()
        }
        return RegisteredModel(self._defaults[name], served)

    def make_whole(self) -> dict[str, RegisteredModel | None]:
        """All of it, for a front that has just come up."""
        return {name: self.describe_for_fronts(name) for name in self._models}

    def _note_replicas(self, registration: Registration, workers: int) -> None:
        """Keep the number where it is one of processes, so that no change has to look at all registrations."""
        asked = self._replicas.setdefault(registration.key, {})
        if registration.has_code and workers > 1:
            asked[registration.name, registration.version] = workers
        else:
            asked.pop((registration.name, registration.version), None)
        if not asked:
            del self._replicas[registration.key]

    def _find_versions(self, name: str) -> dict[str, Registration]:
        versions = self._models.get(name)
        if versions is None:
            raise ModelUnknown(name)
        return versions


def with_workers(
    registration: Registration, least: int, most: int, now: float, *, is_loading: bool = False
) -> Registration:
    """The registration with so many workers, from `now` on."""
    options = replace(registration.options, min_workers=least, max_workers=most)
    return replace(registration, options=options, loaded_at=now if least else 0.0, is_loading=is_loading)


def _size(each: Registration) -> int:
    texts = (each.name, each.version, each.url, each.key, each.handler, each.runtime)
    return REGISTRATION_BYTES + sum(map(name_bytes, texts))
