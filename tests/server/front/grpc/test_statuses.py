"""How gRPC says a situation."""

import pytest
from grpc import StatusCode

from server.errors import Refused, Situation
from server.front.dialects.open_inference import STATUS as COUNTED
from server.front.grpc.statuses import (
    LONGEST_DETAILS,
    STATUS,
    AnsweredBadly,
    choose_statuses,
    describe_refusal,
    list_advice,
)
from server.settings import Settings

UNHAPPY = set(Situation) - {Situation.OK}


def test_every_situation_has_a_status() -> None:
    """And a number by which it is counted. None of them is OK."""
    assert set(STATUS) == UNHAPPY
    assert set(COUNTED) >= UNHAPPY
    assert StatusCode.OK not in STATUS.values()


@pytest.mark.parametrize(("status", "code"), [(503, StatusCode.UNAVAILABLE), (429, StatusCode.RESOURCE_EXHAUSTED)])
def test_overload_is_retried_or_not_as_the_operator_says(status: int, code: StatusCode) -> None:
    """Clients repeat UNAVAILABLE by themselves."""
    settings = Settings.model_construct(overload_status=status)
    assert choose_statuses(settings)[Situation.OVERLOADED] is code


def test_a_refusal_names_its_place_and_is_bounded() -> None:
    """The field comes first; what a client made long is cut."""
    assert describe_refusal(Refused(Situation.BAD_REQUEST, "must be", field="inputs[0]")) == "inputs[0]: must be"
    assert len(describe_refusal(Refused(Situation.NOT_FOUND, "x" * 10_000))) == LONGEST_DETAILS + 3


def test_advice_is_grpcs_own() -> None:
    """Milliseconds for gRPC, whole seconds as HTTP says it; nothing where nothing is known."""
    assert list_advice(Refused(Situation.OVERLOADED, "full", retry_ms=1200)) == [
        ("grpc-retry-pushback-ms", "1200"),
        ("retry-after", "2"),
    ]
    assert list_advice(Refused(Situation.NOT_FOUND, "none")) == []


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, StatusCode.NOT_FOUND),
        (409, StatusCode.ALREADY_EXISTS),
        (418, StatusCode.FAILED_PRECONDITION),
        (500, StatusCode.INTERNAL),
        (503, StatusCode.UNAVAILABLE),
        (599, StatusCode.INTERNAL),
    ],
)
def test_a_status_of_http_has_one_here(status: int, code: StatusCode) -> None:
    """Of an archive's code, and of the management API."""
    assert AnsweredBadly(status, "why").code is code
