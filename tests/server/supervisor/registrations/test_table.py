"""The table of registrations: defaults, versions, what fronts are told, and its bounds."""

import pytest
from msgspec.structs import replace

from model_store.names import ModelName
from server.ipc.operations import RegisteredModel, ServedVersion
from server.supervisor.registrations import table as tables
from server.supervisor.registrations.refusals import (
    AlreadyRegistered,
    BadOption,
    DefaultVersionStays,
    ModelUnknown,
    TableFull,
    VersionUnknown,
)
from server.supervisor.registrations.table import Registration, RegistrationTable, ServingOptions, with_workers


def make_registration(name: str = "nsw1", version: str = "1.0", key: str = "nsw1.mar") -> Registration:
    """A version without workers."""
    return Registration(name, version, key, ModelName(key), "", "python", ServingOptions())


def fill_table(*registrations: Registration) -> RegistrationTable:
    """A table that has these."""
    table = RegistrationTable()
    for each in registrations:
        table.add(each)
    return table


def test_first_version_is_default_until_another_is_made_so() -> None:
    """A name without a version means the default one; others are reached by their version."""
    table = fill_table(make_registration(), make_registration(version="2.0", key="new.mar"))
    assert (table.find("nsw1").version, table.find("nsw1", "2.0").key) == ("1.0", "new.mar")
    table.set_default("nsw1", "2.0")
    assert table.find("nsw1").version == "2.0"
    assert [each.version for each in table.list_versions("nsw1")] == ["2.0", "1.0"]


def test_default_version_stays_while_there_are_others() -> None:
    """Only the last version may go as the default one; a refused removal changes nothing."""
    table = fill_table(make_registration(), make_registration(version="2.0"))
    with pytest.raises(DefaultVersionStays):
        table.remove("nsw1", "1.0")
    with pytest.raises(DefaultVersionStays):
        table.remove("nsw1")
    table.remove("nsw1", "2.0")
    assert table.remove("nsw1").version == "1.0"
    assert "nsw1" not in table


def test_unknown_names_and_versions_are_told_apart() -> None:
    """Clients learn which of the two is wrong."""
    table = fill_table(make_registration())
    with pytest.raises(ModelUnknown):
        table.find("vic1")
    with pytest.raises(VersionUnknown):
        table.set_default("nsw1", "9")
    with pytest.raises(AlreadyRegistered):
        table.add(make_registration())


def test_failed_default_leaves_another_one() -> None:
    """A version that could not be loaded goes, also where it is the default one of several."""
    first = make_registration()
    table = fill_table(first, make_registration(version="2.0"))
    table.discard(first)
    table.discard(first)
    assert table.find("nsw1").version == "2.0"


def test_number_of_names_and_versions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients make up names: there is a bound on each dimension, and what is removed gives its room back."""
    monkeypatch.setattr(tables, "MOST_NAMES", 2)
    monkeypatch.setattr(tables, "MOST_VERSIONS", 2)
    table = fill_table(make_registration("a"), make_registration("b"), make_registration("b", "2.0"))
    for name, version in (("c", "1.0"), ("b", "3.0")):
        with pytest.raises(TableFull):
            table.add(make_registration(name, version))
    table.remove("a")
    table.add(make_registration("c"))
    monkeypatch.setattr(tables, "MOST_NAMES", 1000)
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 6 * tables.REGISTRATION_BYTES)
    with pytest.raises(TableFull, match="bytes"):  # not only names count
        table.add(replace(make_registration("d"), url="x" * 2 * tables.REGISTRATION_BYTES))
    table.add(make_registration("d"))
    table.remove("d")
    table.add(make_registration("d"))
    for version in ("", "1/2", "x" * 129, "a\n"):
        with pytest.raises(BadOption):
            table.add(make_registration("c", version))


def test_fronts_are_told_keys_workers_and_the_default() -> None:
    """What a front needs to route a request, and nothing else."""
    table = fill_table(make_registration())
    assert table.describe_for_fronts("vic1") is None
    served = {"1.0": ServedVersion("nsw1.mar", 0, 120.0)}
    assert table.make_whole() == {"nsw1": RegisteredModel("1.0", served)}
    table.put(with_workers(table.find("nsw1"), 2, 3, 5.0))
    assert table.make_whole() == {"nsw1": RegisteredModel("1.0", {"1.0": ServedVersion("nsw1.mar", 2, 120.0)})}


def test_batching_is_as_the_last_version_says() -> None:
    """Of several versions of one archive the one that was registered last holds, while it is there."""
    few, many = (ServingOptions(batch_size=size, says_batching=True) for size in (2, 8))
    first, silent = replace(make_registration("b"), options=few), make_registration("c")
    last = replace(make_registration("a"), options=many)
    table = fill_table(first, silent, last)
    assert table.list_batching() == {"nsw1.mar": many.batching}
    table.remove("a")
    assert table.find_batching(ModelName("nsw1.mar")) == few.batching
    table.remove("b")
    assert (table.find_batching(ModelName("nsw1.mar")), table.list_batching()) == (None, {})


def test_key_is_shared_only_with_versions_that_have_workers() -> None:
    """An archive is unloaded when the last version with workers that is served from it goes."""
    one, other = make_registration("a"), make_registration("b")
    table = fill_table(one, other)
    assert not table.shares_key(one)
    table.put(with_workers(other, 1, 1, 5.0))
    assert table.shares_key(one)
    assert not table.shares_key(other)
