"""The table of releases: what names stand for that are not simply their archives, and its file. It survives a restart.

An entry under an archive's own name holds the model at a version (a rollback). Any other entry is an alias: of an
archive that follows the store, or of one of its versions, with a share of the requests for a second one (a canary).
"""

import contextlib
import hashlib
import os
import stat
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
from msgspec import Meta, Struct

from model_store.names import InvalidModelName, ModelName, at_version, parse_model_name, parse_version
from model_store.stores.disk_cache import UnsafeDiskCache, check_private
from model_store.stores.disk_files import read_file
from model_store.stores.kept_versions import KeptVersion
from server.ipc.operations import ReleaseArm
from server.settings import Settings

MOST_NAMES = 1000
MOST_ARMS = 2
MAX_FILE_BYTES = 16 * 1024 * 1024
Share = Annotated[float, Meta(ge=0.0, le=1.0)]

log = structlog.get_logger()


class BadRelease(ValueError):
    """What is asked of the table cannot be; the message says why."""


class TableUnreadable(Exception):
    """The table's file is there, but cannot be used; the message names it."""


class Arm(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An archive, or one of its versions, and its share of the requests. No version: it follows the store."""

    model: ModelName
    version: str = ""
    share: Share = 1.0


class Canary(Struct, frozen=True, forbid_unknown_fields=True):
    """The second arm of an alias, by default of the same archive and following the store."""

    share: Share
    model: str = ""
    version: str = ""


class AliasRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /fleet/alias/{alias}`."""

    model: str
    version: str = ""
    canary: Canary | None = None

    def make_arms(self) -> tuple[Arm, ...]:
        """The alias's arms. Raises InvalidModelName."""
        if self.canary is None:
            return (_make_arm(self.model, self.version, 1.0),)
        share = self.canary.share
        other = _make_arm(self.canary.model or self.model, self.canary.version, share)
        return _make_arm(self.model, self.version, 1.0 - share), other


def _make_arm(model: str, version: str, share: float) -> Arm:
    return Arm(parse_model_name(model), parse_version(version) if version else "", share)


class ReleaseTable(Struct, frozen=True, forbid_unknown_fields=True):
    """The table, as its file has it. `store`: whose names it has, for whoever reads the file."""

    store: str
    names: dict[ModelName, tuple[Arm, ...]] = {}

    def hold(self, model: ModelName, version: str) -> "ReleaseTable":
        """The table with the model held at this version. Raises BadRelease where it is full, or this is an alias."""
        if self.is_alias(model):
            raise BadRelease(f"{model} is an alias: POST /fleet/alias/{model} sets it")
        return self._put(model, (Arm(model, version),))

    def set_alias(self, alias: ModelName, arms: tuple[Arm, ...]) -> "ReleaseTable":
        """The table with this alias. Raises BadRelease where it is full, or one would stand for another, or itself."""
        if self.held_version(alias):
            raise BadRelease(f"{alias} is rolled back: POST /fleet/follow/{alias} first")
        if any(arm.model == alias for arm in arms):
            raise BadRelease(f"{alias} cannot stand for itself: POST /fleet/rollback/{alias} holds it at a version")
        table = self._put(alias, arms)
        for name, each in table.names.items():
            wrong = next((arm.model for arm in each if table.is_alias(arm.model)), None)
            if wrong is not None:
                raise BadRelease(f"{name} cannot stand for {wrong}: that is an alias, not an archive")
        return table

    def _put(self, name: ModelName, arms: tuple[Arm, ...]) -> "ReleaseTable":
        if name not in self.names and len(self.names) >= MOST_NAMES:
            raise BadRelease(f"{MOST_NAMES} names are in the table already; remove an alias, or let a model follow")
        return ReleaseTable(self.store, {**self.names, name: arms})

    def remove(self, name: ModelName) -> "ReleaseTable":
        """The table without this entry."""
        return ReleaseTable(self.store, {each: arms for each, arms in self.names.items() if each != name})

    def is_alias(self, name: ModelName) -> bool:
        """Whether the name is an alias, and not a model that is rolled back."""
        return name in self.names and not self.held_version(name)

    def held_version(self, model: ModelName) -> str:
        """The version that the model is rolled back to; empty where it is not."""
        arms = self.names.get(model, ())
        return arms[0].version if len(arms) == 1 and arms[0].model == model else ""

    def held_versions(self) -> dict[ModelName, set[str]]:
        """All versions that entries name, by archive."""
        held: defaultdict[ModelName, set[str]] = defaultdict(set)
        for arms in self.names.values():
            for arm in arms:
                if arm.version:
                    held[arm.model].add(arm.version)
        return dict(held)

    def make_routes(self) -> dict[str, list[ReleaseArm]]:
        """What fronts need. An alias that follows a model which is rolled back gets what the model's own name gets."""
        routes: dict[str, list[ReleaseArm]] = {}
        for name, arms in self.names.items():
            routes[name] = []
            for arm in arms:
                version = arm.version or self.held_version(arm.model)
                key = at_version(arm.model, version) if version else arm.model
                routes[name].append(ReleaseArm(key, version, arm.share))
        return routes

    def list_keys(self) -> set[ModelName]:
        """What the names of the table stand for, as workers call it."""
        return {ModelName(arm.model) for arms in self.make_routes().values() for arm in arms}

    def describe(self) -> Mapping[str, object]:
        """As operators see it."""
        aliases = [
            {"alias": name, "arms": msgspec.to_builtins(arms)}
            for name, arms in sorted(self.names.items())
            if self.is_alias(name)
        ]
        held = [{"model": name, "version": self.held_version(name)} for name in sorted(self.names)]
        return {"aliases": aliases, "rollbacks": [each for each in held if each["version"]]}


def choose_previous(kept: Sequence[KeptVersion], serving: set[str]) -> str | None:
    """The version that was the newest before those that serve now; None where none is kept.

    `kept`: the one that served last first. Of several that serve, while holders swap, the last one is the present one.
    """
    at = min((i for i, each in enumerate(kept) if each.version in serving), default=-1)
    return next((each.version for each in kept[at + 1 :] if not each.asked), None)


def _check_arms(name: str, arms: Sequence[Arm]) -> None:
    """Raises BadRelease, InvalidModelName."""
    parse_model_name(name)
    if not 1 <= len(arms) <= MOST_ARMS:
        raise BadRelease(f"{name} has {len(arms)} arms, not one or two")
    for arm in arms:
        _make_arm(arm.model, arm.version, arm.share)


class ReleaseFile:
    """The table's file, in the folder of the disk tier; each store has its own."""

    def __init__(self, settings: Settings) -> None:
        self._store = f"{settings.store} {settings.s3_endpoint_url or ''}".strip()
        name = hashlib.sha256(self._store.encode()).hexdigest()[:32]
        self._disk_cache = settings.disk_cache
        self.path = settings.disk_cache / "releases" / f"{name}.json"

    def __repr__(self) -> str:
        return f"<ReleaseFile {self.path}>"

    def read(self) -> ReleaseTable:
        """The table, an empty one where there is no file, or no disk cache that could have one.

        Raises TableUnreadable for a file that cannot be used, or that others could have written: names would mean
        something else without it, and another's models with it.
        """
        try:
            if not self._is_there():
                return ReleaseTable(self._store)
            table = msgspec.json.decode(read_file(self.path, MAX_FILE_BYTES), type=ReleaseTable)
            for name, arms in table.names.items():
                _check_arms(name, arms)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, InvalidModelName, BadRelease) as error:
            raise self._refuse(error) from error
        return table

    def _is_there(self) -> bool:
        """Whether there is a file. Raises OSError where it is not known, or where file or folder are others' too."""
        try:
            self._disk_cache.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except PermissionError as error:  # in a folder that is closed to this user, such as another one's home
            log.warning("releases_not_looked_for", file=str(self.path), error=str(error))
            return False
        try:
            check_private(self.path.parent, self.path.parent.lstat())
            found = self.path.lstat()
        except FileNotFoundError:
            return False
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(found.st_mode)
            raise UnsafeDiskCache(
                f"it belongs to user {found.st_uid} and has mode {mode:o}, so that others write to it"
            )
        return True

    def _refuse(self, error: Exception) -> TableUnreadable:
        return TableUnreadable(
            f"{self.path}: the table of aliases and rollbacks cannot be read: {error}; mend it, or remove it: then "
            f"there are no aliases, and every model follows the store"
        )

    def write(self, table: ReleaseTable) -> None:
        """Replace the file; it is on the disk when this returns. Raises OSError."""
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, draft = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")
                file.flush()
                os.fsync(descriptor)
            Path(draft).replace(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(draft).unlink()
            raise
