"""The table of releases: what names may stand for. Its file is tested with the service that writes it."""

from typing import Any

import msgspec
import pytest

from model_store.names import InvalidModelName, ModelName, at_version
from server.ipc.operations import ReleaseArm
from server.supervisor.releases import table as releases
from server.supervisor.releases.table import (
    AliasRequest,
    Arm,
    BadRelease,
    Canary,
    ReleaseTable,
)

NAME, OTHER, ALIAS = ModelName("au/nsw1.mar"), ModelName("au/vic1.mar"), ModelName("nsw1@stable")


def test_an_alias_stands_for_archives_alone() -> None:
    """Not for itself, not for an alias, and no name that is rolled back becomes one; the other way round as well."""
    table = ReleaseTable("s").set_alias(ALIAS, (Arm(NAME),)).hold(NAME, "v1")
    for name, arms, said in (
        (NAME, (Arm(OTHER),), "is rolled back"),
        (OTHER, (Arm(ALIAS),), "is an alias, not an archive"),
        (OTHER, (Arm(OTHER, "v1"),), "stand for itself"),
    ):
        with pytest.raises(BadRelease, match=said):
            table.set_alias(name, arms)
    with pytest.raises(BadRelease, match="is an alias"):
        table.hold(ALIAS, "v1")
    with pytest.raises(BadRelease, match=r"cannot stand for au/vic1\.mar"):
        table.set_alias(ModelName("b"), (Arm(OTHER),)).set_alias(OTHER, (Arm(NAME),))


def test_an_alias_that_follows_goes_where_its_model_goes() -> None:
    """Rolled back, the model takes its aliases along, but those that are pinned; then they follow again."""
    table = ReleaseTable("s").set_alias(ALIAS, (Arm(NAME, "", 0.5), Arm(NAME, "v1", 0.5)))
    assert table.make_routes() == {ALIAS: [ReleaseArm(NAME, "", 0.5), ReleaseArm(at_version(NAME, "v1"), "v1", 0.5)]}
    held = table.hold(NAME, "v2")
    assert held.make_routes()[ALIAS][0] == ReleaseArm(at_version(NAME, "v2"), "v2", 0.5)
    assert held.held_versions() == {NAME: {"v1", "v2"}}
    assert held.remove(NAME) == table


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A further name is refused; one that is in the table may change."""
    monkeypatch.setattr(releases, "MOST_NAMES", 2)
    table = ReleaseTable("s").hold(NAME, "v1").hold(OTHER, "v1")
    with pytest.raises(BadRelease, match="2 names are in the table already"):
        table.set_alias(ALIAS, (Arm(NAME),))
    assert table.hold(NAME, "v2").held_version(NAME) == "v2"


@pytest.mark.parametrize(
    "body", [{}, {"model": "a", "x": 1}, {"model": "a", "canary": {}}, {"model": "a", "canary": {"share": 1.5}}]
)
def test_a_body_is_checked_field_by_field(body: Any) -> None:
    """Missing, unknown and impossible fields are named."""
    with pytest.raises(ValueError, match=r"share|field"):
        msgspec.convert(body, AliasRequest)


@pytest.mark.parametrize(
    "asked", [AliasRequest("a//b"), AliasRequest("a", "v\\"), AliasRequest("a", canary=Canary(0.1, "/"))]
)
def test_names_and_versions_in_a_body_are_checked(asked: AliasRequest) -> None:
    """As those in paths."""
    with pytest.raises(InvalidModelName):
        asked.make_arms()
