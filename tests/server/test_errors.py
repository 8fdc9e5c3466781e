"""Situations and their codes (CONTRACTS 1)."""

import json

import pytest

from model_store import errors
from model_store.errors import LoadError
from server.errors import SAGEMAKER, Detail, Refused, SageMakerCode, Situation, sagemaker_error, situation_of


def all_load_errors(root: type[LoadError] = LoadError) -> list[type[LoadError]]:
    """Every class of the family."""
    return [root, *(found for child in root.__subclasses__() for found in all_load_errors(child))]


def test_every_situation_has_a_code_and_fits_a_byte() -> None:
    """Nothing but success is missing from the table, and all numbers travel in one byte of a response frame."""
    assert SAGEMAKER.keys() == set(Situation) - {Situation.OK}
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
    """The slug is a metrics label and a table's key: no two classes share one."""
    reasons = [error.reason for error in all_load_errors()]
    assert len(set(reasons)) == len(reasons)


def test_a_model_error_carries_its_original() -> None:
    """424 with OriginalStatusCode and OriginalMessage, and the type that boto3 needs, in header and body."""
    status, headers, body = sagemaker_error(Situation.DEADLINE, Detail("too late"))
    assert status == 424
    assert dict(headers) == {b"content-type": b"application/json", b"x-amzn-errortype": b"ModelError"}
    assert json.loads(body) == {
        "message": "too late",
        "Message": "too late",
        "OriginalStatusCode": 504,
        "OriginalMessage": "too late",
    }


def test_the_place_of_a_bad_request_is_named() -> None:
    """Instance 0 is a place too; a request that is wrong as a whole has none."""
    _, _, body = sagemaker_error(Situation.BAD_REQUEST, Detail("too short", 0, "dynamic_feat[0]"))
    assert json.loads(body) == {
        "message": "too short",
        "error": {"code": "bad_request", "message": "too short", "instance": 0, "field": "dynamic_feat[0]"},
    }
    assert json.loads(sagemaker_error(Situation.BAD_REQUEST, Detail("no JSON"))[2]) == {"message": "no JSON"}


def test_overload_says_when_to_retry() -> None:
    """In milliseconds for botocore, in whole seconds, rounded up, for all others; the operator's code replaces it."""
    status, headers, _ = sagemaker_error(Situation.OVERLOADED, Detail("full"))
    assert status == 503
    assert dict(headers)[b"x-amz-retry-after"] == b"200"
    assert dict(headers)[b"retry-after"] == b"1"
    code = SageMakerCode(429, "ModelNotReadyException", retry_after_ms=1500)
    status, headers, _ = sagemaker_error(Situation.OVERLOADED, Detail("full"), code)
    assert (status, dict(headers)[b"retry-after"]) == (429, b"2")
    assert dict(headers)[b"x-amzn-errortype"] == b"ModelNotReadyException"


def test_a_refusal_keeps_its_detail() -> None:
    """What is raised in the middle arrives whole at the rim."""
    refused = Refused(Situation.BAD_REQUEST, "wrong", 3, "target")
    assert (str(refused), refused.detail) == ("wrong", Detail("wrong", 3, "target"))
