"""SageMaker's codes, headers and error bodies (CONTRACTS 1)."""

import json

import pytest

from server.errors import Refused, Situation
from server.front.dialects.sagemaker import ERRORS, SageMaker
from server.front.exchange import HttpRequest
from server.settings import Settings
from tests.server.front.answering import stay_connected

PLAIN = HttpRequest("POST", "/invocations", {}, stay_connected)


def make_dialect(**settings: object) -> SageMaker:
    """The dialect under these settings."""
    return SageMaker(Settings.model_validate({"store": "models", **settings}))


def test_every_situation_has_a_code() -> None:
    """Nothing but success is missing from the table."""
    assert ERRORS.keys() == set(Situation) - {Situation.OK}
    assert ERRORS[Situation.NO_ROOM].original == 507


@pytest.mark.parametrize(
    ("path", "served"),
    [
        ("/invocations", True),
        ("/endpoints/a-1/invocations", True),
        (f"/endpoints/{'a' * 63}/invocations", True),
        (f"/endpoints/{'a' * 64}/invocations", True),
        ("/endpoints//invocations", False),
        ("/endpoints/a/b/invocations", True),
        ("/v1/forecasts", False),
    ],
)
def test_paths(path: str, served: bool) -> None:
    """`/invocations`, and under any name, which is a model's where it can be no endpoint's; by POST only."""
    assert (make_dialect().match("POST", path) is not None) == served
    if served:
        with pytest.raises(Refused, match="not GET") as caught:
            make_dialect().match("GET", path)
        assert caught.value.situation is Situation.BAD_METHOD


def test_a_model_error_carries_its_original() -> None:
    """424 with OriginalStatusCode and OriginalMessage, and the type that boto3 needs, in header and body."""
    reply = make_dialect().refused(Refused(Situation.DEADLINE, "too late"), PLAIN)
    assert (reply.status, reply.content_type) == (424, "application/json")
    assert dict(reply.headers) == {
        b"x-amzn-errortype": b"ModelError",
        b"x-amzn-invoked-production-variant": b"AllTraffic",
    }
    assert json.loads(reply.body) == {
        "message": "too late",
        "error_code": "BAD_REQUEST",
        "Message": "too late",
        "OriginalStatusCode": 504,
        "OriginalMessage": "too late",
    }


def test_the_place_of_a_bad_request_is_named() -> None:
    """Instance 0 is a place too; a request that is wrong as a whole has none."""
    placed = make_dialect().refused(Refused(Situation.BAD_REQUEST, "too short", 0, "dynamic_feat[0]"), PLAIN)
    assert json.loads(placed.body) == {
        "message": "instances[0].dynamic_feat[0]: too short",
        "error_code": "BAD_REQUEST",
        "error": {
            "code": "bad_request",
            "message": "instances[0].dynamic_feat[0]: too short",
            "instance": 0,
            "field": "dynamic_feat[0]",
        },
    }
    whole = make_dialect().refused(Refused(Situation.BAD_REQUEST, "no JSON"), PLAIN)
    assert json.loads(whole.body) == {"message": "no JSON", "error_code": "BAD_REQUEST"}


def test_overload_says_when_to_retry() -> None:
    """In milliseconds for botocore, in whole seconds, rounded up, for all others; 429 where the operator wants it."""
    full = Refused(Situation.OVERLOADED, "full")
    reply = make_dialect().refused(full, PLAIN)
    assert reply.status == 503
    assert dict(reply.headers)[b"x-amz-retry-after"] == b"200"
    assert dict(reply.headers)[b"retry-after"] == b"1"
    estimated = dict(make_dialect().refused(Refused(Situation.OVERLOADED, "full", retry_ms=1234), PLAIN).headers)
    assert (estimated[b"x-amz-retry-after"], estimated[b"retry-after"]) == (b"1234", b"2")
    reply = make_dialect(overload_status=429).refused(full, PLAIN)
    assert (reply.status, dict(reply.headers)[b"retry-after"]) == (429, b"1")
    assert dict(reply.headers)[b"x-amzn-errortype"] == b"ModelNotReadyException"


def test_every_answer_has_an_aws_request_id() -> None:
    """It is what boto3 shows as `RequestId`, and the id of the access log."""
    request = HttpRequest("POST", "/invocations", {}, stay_connected, id=b"abc-1")
    headers = dict(make_dialect().refused(Refused(Situation.NOT_FOUND, "no"), request).headers)
    assert headers[b"x-amzn-requestid"] == b"abc-1"


@pytest.mark.parametrize(("size", "echoed"), [(1024, True), (1025, False)])
def test_custom_attributes_are_echoed_on_refusals(size: int, echoed: bool) -> None:
    """As long as SageMaker allows them to be."""
    attributes = b"a" * size
    request = HttpRequest("POST", "/invocations", {b"x-amzn-sagemaker-custom-attributes": attributes}, stay_connected)
    headers = dict(make_dialect().refused(Refused(Situation.NOT_FOUND, "no"), request).headers)
    assert headers.get(b"x-amzn-sagemaker-custom-attributes") == (attributes if echoed else None)
