"""The service that changes the table of releases, and its file: over a real folder store and a real disk tier."""

import asyncio
import json
import os
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from model_store.archives.archive import Limits
from model_store.errors import LoadError
from model_store.names import ModelName, at_version, split_version
from model_store.stores.disk_cache import DiskTier
from model_store.stores.model_store import ModelStore
from model_store.stores.object_store import open_source
from server.errors import Situation, situation_of
from server.ipc.control import ControlError
from server.ipc.operations import ReleaseArm
from server.settings import Settings
from server.supervisor.releases.service import ReleaseService
from server.supervisor.releases.table import (
    AliasRequest,
    Canary,
    ReleaseFile,
    ReleaseTable,
    TableUnreadable,
)
from tests.archives import make_graph

NAME, OTHER, ALIAS = ModelName("au/nsw1.mar"), ModelName("au/vic1.mar"), ModelName("nsw1@stable")


class House:
    """A store, a disk tier, and a fleet of one worker that loads by them. `versions`: what was published, in order."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        (folder / "store").mkdir(exist_ok=True)
        self.settings = Settings.model_validate(
            {"store": str(folder / "store"), "disk_cache": folder / "cache", **settings}
        )
        source = open_source(self.settings.store)
        disk = DiskTier(self.settings.disk_cache, source.url)
        disk.prepare()
        self._source, self.store, self.disk = source, ModelStore(source, disk, Limits()), disk
        self.serving: set[str] = set()
        self.routes: dict[str, list[ReleaseArm]] = {}
        self.proved: list[ModelName] = []
        self.dropped: list[ModelName] = []
        self.unheard: list[int] = []  # fronts that do not answer
        self.service = ReleaseService(self.settings, self)
        self.service.open()

    def publish(self, seed: int) -> str:
        """A new version, which serves at once."""
        self._source.put(NAME, make_graph(seed))
        found = self.store.fetch(NAME, revalidate=True)
        self.store.keep_version(NAME, found.version, newest=True)
        self.serving = {found.version}
        return found.version

    async def serving_versions(self, model: ModelName) -> set[str]:
        """See ReleasedFleet."""
        return self.serving if model == NAME else set()

    async def prove_release(self, model: ModelName, key: ModelName) -> None:
        """See ReleasedFleet."""
        assert split_version(key)[0] == model
        try:
            name, version = split_version(key)
            if version:
                self.store.version_at_hand(name, version) or self.store.fetch_version(name, version)
            else:
                self.store.fetch(name)
        except LoadError as error:
            raise ControlError(str(error), situation_of(error)) from error
        self.proved.append(key)

    async def drop_release(self, key: ModelName) -> None:
        """See ReleasedFleet."""
        self.dropped.append(key)

    async def announce_releases(self, routes: dict[str, list[ReleaseArm]]) -> list[int]:
        """See ReleasedFleet."""
        self.routes = routes
        return self.unheard

    def held(self) -> set[str]:
        """The versions that the disk tier holds."""
        return {kept.version for kept in self.disk.list_versions(NAME) if kept.held}


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result."""
    return asyncio.run(work)


def catch_refusal(work: Coroutine[Any, Any, Any]) -> Situation:
    """The situation of a call that must fail."""
    with pytest.raises(ControlError) as caught:
        run(work)
    return Situation(caught.value.situation)


def test_rollbacks_go_back_one_version_after_another(tmp_path: Path) -> None:
    """From the third to the second to the first, then no further; each is proved before fronts hear of it, and held."""
    house = House(tmp_path)
    first, second, third = (house.publish(seed) for seed in (1, 2, 3))
    assert run(house.service.rollback(NAME)) == {"model": NAME, "version": second, "served": [third]}
    assert run(house.service.rollback(NAME))["version"] == first
    assert house.routes == {NAME: [ReleaseArm(at_version(NAME, first), first, 1.0)]}
    assert catch_refusal(house.service.rollback(NAME)) is Situation.NOT_FOUND
    assert house.proved == [at_version(NAME, second), at_version(NAME, first)]
    assert (house.held(), house.dropped) == ({first}, [at_version(NAME, second)])
    house.unheard = [1]
    assert run(house.service.follow(NAME)) == {"model": NAME, "held": first, "unheard_fronts": [1]}
    assert house.proved[-1] == NAME
    assert (house.routes, house.held()) == ({}, set())
    assert run(house.service.follow(NAME)) == {"model": NAME, "held": None}


def test_the_present_version_is_known_though_nobody_holds_the_model(tmp_path: Path) -> None:
    """After a restart, or unloaded: the disk says what would be loaded. A version that proved bad is forgotten there;
    then the one that served last is the one to go back to. While holders swap, the newer of two is the present one.
    """
    house = House(tmp_path)
    _, second, third = (house.publish(seed) for seed in (1, 2, 3))
    house.serving = {third, second}
    assert run(house.service.rollback(NAME))["version"] == second
    run(house.service.follow(NAME))
    house.serving = set()
    assert run(house.service.rollback(NAME)) == {"model": NAME, "version": second, "served": []}
    run(house.service.follow(NAME))
    house.store.forget(NAME)
    assert run(house.service.rollback(NAME))["version"] == third


def test_a_rollback_goes_back_to_no_canary(tmp_path: Path) -> None:
    """A version that was asked for by name alone has never been what the model's clients got."""
    house = House(tmp_path)
    first, second = house.publish(1), house.publish(2)
    house._source.put(NAME, make_graph(3))
    canary = house._source.read_version(NAME)
    run(house.service.set_alias(ALIAS, AliasRequest(NAME, second, Canary(0.1, version=canary))))
    assert house.held() == {second, canary}
    assert run(house.service.rollback(NAME))["version"] == first


def test_a_table_that_is_not_written_holds_nothing(tmp_path: Path) -> None:
    """The hold before it is undone, and the version may be evicted; what a crash left is let go at the next start."""
    house = House(tmp_path)
    first, second = house.publish(1), house.publish(2)
    folder = ReleaseFile(house.settings).path.parent
    folder.write_text("a file in its place")
    assert catch_refusal(house.service.rollback(NAME)) is Situation.INTERNAL
    assert (house.held(), house.dropped) == (set(), [at_version(NAME, first)])
    folder.unlink()
    run(house.service.set_alias(ALIAS, AliasRequest(NAME, second)))
    house.disk.hold_versions(NAME, {first, second})
    restarted = House(tmp_path)
    run(restarted.service.let_go_leftovers())
    assert house.held() == {second}


def test_the_table_survives_a_restart(tmp_path: Path) -> None:
    """A new service on the same folder has what was last announced; another store's has nothing of it."""
    house = House(tmp_path)
    first, _ = house.publish(1), house.publish(2)
    run(house.service.rollback(NAME))
    run(house.service.set_alias(ALIAS, AliasRequest(NAME)))
    restarted = House(tmp_path)
    assert restarted.service.table.make_routes() == house.routes
    assert restarted.service.describe() == {
        "aliases": [{"alias": ALIAS, "arms": ({"model": NAME},)}],
        "rollbacks": [{"model": NAME, "version": first}],
    }
    (tmp_path / "other" / "store").mkdir(parents=True)
    settings = house.settings.model_copy(update={"store": str(tmp_path / "other" / "store")})
    assert ReleaseFile(settings).read().names == {}


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """To start without it would let names mean something else."""
    file = ReleaseFile(House(tmp_path).settings)
    file.path.parent.mkdir(mode=0o700)
    tables: list[dict[str, Any]] = [
        {"a//b": [{"model": "a"}]},
        {"a": []},
        {"a": [{"model": "b"}] * 3},
        {"a": [{"model": "a//b"}]},
        {"a": [{"model": "b", "version": "v\\"}]},
    ]
    for content in ("{", json.dumps({"names": {}}), *(json.dumps({"store": "s", "names": each}) for each in tables)):
        file.path.write_text(content)
        with pytest.raises(TableUnreadable, match=r"releases/.*\.json: the table of .* cannot be read"):
            file.read()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_table_that_others_could_have_written_is_refused(tmp_path: Path, what: str) -> None:
    """Its names would stand for their models. Neither owner nor mode may let anybody else write."""
    house = House(tmp_path)
    file = ReleaseFile(house.settings)
    file.write(ReleaseTable("s").hold(NAME, "v1"))
    assert file.read().held_version(NAME) == "v1"
    path = file.path if what == "file" else file.path.parent
    mode = path.stat().st_mode
    path.chmod(mode | 0o020)
    with pytest.raises(TableUnreadable, match=r"has mode 620|written by other users \(mode 720"):
        file.read()
    path.chmod(mode)
    os.chown(path, 12345, -1)
    with pytest.raises(TableUnreadable, match="belongs to user 12345"):
        ReleaseService(house.settings, house).open()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_table_that_is_closed_to_this_user_is_no_missing_one() -> None:
    """The start ends, and no rollback is forgotten. A disk cache that was never this user's has no table."""
    with tempfile.TemporaryDirectory() as folder:
        house = House(Path(folder))
        file = ReleaseFile(house.settings)
        file.write(ReleaseTable("s").hold(NAME, "v1"))
        os.seteuid(12345)
        try:
            assert file.read().names == {}  # behind a closed folder
            os.seteuid(0)
            for each in (Path(folder), house.settings.disk_cache):
                each.chmod(0o755)
            os.seteuid(12345)
            with pytest.raises(TableUnreadable, match=r"cannot be read: .*belongs to user 0"):
                file.read()
            os.seteuid(0)
            house.settings.disk_cache.chmod(0o700)
            os.seteuid(12345)
            with pytest.raises(TableUnreadable, match="Permission denied"):
                file.read()
        finally:
            os.seteuid(0)


def test_a_server_without_a_disk_cache_has_no_table(tmp_path: Path) -> None:
    """A folder that is none, or cannot be made, is no reason not to start: nothing was ever written there."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "absent", tmp_path / "file" / "cache"):
        settings = House(tmp_path).settings.model_copy(update={"disk_cache": folder})
        assert ReleaseFile(settings).read().names == {}


def test_what_cannot_be_proved_or_written_changes_nothing(tmp_path: Path) -> None:
    """A version that nobody has; a disk that refuses; no disk tier: refused, and the fronts keep what they had."""
    house = House(tmp_path)
    first, _ = house.publish(1), house.publish(2)
    assert catch_refusal(house.service.rollback(NAME, "v0")) is Situation.NOT_FOUND
    assert catch_refusal(house.service.set_alias(ALIAS, AliasRequest(ALIAS))) is Situation.BAD_REQUEST
    folder = ReleaseFile(house.settings).path.parent
    folder.write_text("a file in its place")
    assert catch_refusal(house.service.rollback(NAME, first)) is Situation.INTERNAL
    assert (house.routes, house.service.table.names) == ({}, {})
    folder.unlink()
    without = House(tmp_path, disk_cache_bytes=0)
    assert catch_refusal(without.service.set_alias(ALIAS, AliasRequest(NAME, first))) is Situation.BAD_REQUEST
    run(without.service.set_alias(ALIAS, AliasRequest(NAME)))
    assert list(without.routes) == [ALIAS]


def test_what_cannot_be_loaded_is_not_followed(tmp_path: Path) -> None:
    """Rubbish in the place of the archive: its model stays rolled back. No archive at all: the alias is not made."""
    house = House(tmp_path)
    house.publish(1)
    house.publish(2)
    held = run(house.service.rollback(NAME))["version"]
    house.store.forget(NAME)
    (tmp_path / "store" / NAME).write_bytes(b"PK\x03\x04 rubbish")
    assert catch_refusal(house.service.follow(NAME)) is Situation.ARCHIVE_FAILED
    assert house.service.table.held_version(NAME) == held
    assert catch_refusal(house.service.set_alias(ALIAS, AliasRequest(OTHER))) is Situation.NOT_FOUND
    assert list(house.routes) == [NAME]


def test_aliases_hold_what_they_are_pinned_to(tmp_path: Path) -> None:
    """Versions of an alias and of its canary stay on disk however many follow; removed, they are let go."""
    house = House(tmp_path)
    first, second = house.publish(1), house.publish(2)
    run(house.service.set_alias(ALIAS, AliasRequest(NAME, first, Canary(0.1, version=second))))
    for seed in range(3, 8):
        house.publish(seed)
    assert house.held() == {first, second}
    assert run(house.service.remove_alias(ALIAS)) == {"alias": ALIAS, "removed": True}
    assert house.held() == set()
    assert run(house.service.remove_alias(ALIAS)) == {"alias": ALIAS, "removed": False}
