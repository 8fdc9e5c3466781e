"""Situations of failed loads, and the contents of a refusal."""

import pytest

from model_store import errors
from model_store.errors import LoadError
from server.errors import Detail, Refused, Situation, situation_of


def all_load_errors(root: type[LoadError] = LoadError) -> list[type[LoadError]]:
    """Every class of the family."""
    return [root, *(found for child in root.__subclasses__() for found in all_load_errors(child))]


def test_every_situation_fits_a_byte() -> None:
    """All numbers travel in one byte of a response frame."""
    assert max(Situation) < 256


@pytest.mark.parametrize(
    ("error", "situation"),
    [
        (errors.ModelNotFound, Situation.NOT_FOUND),
        (errors.StoreDenied, Situation.STORE_FAILED),
        (errors.StoreUnavailable, Situation.STORE_FAILED),
        (errors.NoRoom, Situation.NO_ROOM),
        (errors.ArchiveInvalid, Situation.ARCHIVE_FAILED),
        (errors.ArchiveTooLarge, Situation.ARCHIVE_FAILED),
        (errors.GoldenMismatch, Situation.ARCHIVE_FAILED),
        (errors.UnsupportedKind, Situation.ARCHIVE_FAILED),
    ],
)
def test_a_failed_load_is_told_as_whose_fault_it_is(error: type[LoadError], situation: Situation) -> None:
    """The key's, the store's, the room's, else the archive's."""
    assert situation_of(error("x")) is situation


def test_reasons_are_distinct() -> None:
    """The slug is a metrics label and a table's key: no two classes name the same one."""
    reasons = [error.reason for error in all_load_errors() if "reason" in vars(error)]
    assert len(set(reasons)) == len(reasons)


def test_a_refusal_keeps_its_detail() -> None:
    """What is raised in the middle arrives whole at the rim."""
    refused = Refused(Situation.BAD_REQUEST, "wrong", 3, "target")
    assert (str(refused), refused.detail) == ("wrong", Detail("wrong", 3, "target"))
