"""What a message of TorchServe's management service asks of the REST API, and what becomes of the answer."""

from typing import Any

import pytest

from server.errors import Refused
from server.front.grpc.messages import find_message
from server.front.grpc.torchserve_management import REST_CALLS, RestCall, read_error, read_message


def make_message(method: str, **fields: Any) -> Any:
    """The message of a method."""
    return find_message(f"org.pytorch.serve.grpc.management.{method}Request")(**fields)


@pytest.mark.parametrize(
    ("method", "fields", "expected"),
    [
        ("ListModels", {}, RestCall("GET", "/models", {})),
        (
            "ListModels",
            {"limit": 2, "next_page_token": 4},
            RestCall("GET", "/models", {"limit": "2", "next_page_token": "4"}),
        ),
        ("DescribeModel", {"model_name": "au/a", "model_version": "all"}, RestCall("GET", "/models/au/a/all", {})),
        (
            "DescribeModel",
            {"model_name": "a", "customized": True},
            RestCall("GET", "/models/a", {"customized": "true"}),
        ),
        (
            "RegisterModel",
            {"url": "a.mar", "synchronous": True, "initial_workers": 1, "batch_size": 4},
            RestCall(
                "POST", "/models", {"url": "a.mar", "synchronous": "true", "initial_workers": "1", "batch_size": "4"}
            ),
        ),
        ("ScaleWorker", {"model_name": "a", "min_worker": 0}, RestCall("PUT", "/models/a", {})),
        ("ScaleWorker", {"model_name": "a", "max_worker": 2}, RestCall("PUT", "/models/a", {"max_worker": "2"})),
        ("SetDefault", {"model_name": "a", "model_version": "2"}, RestCall("PUT", "/models/a/2/set-default", {})),
        ("UnregisterModel", {"model_name": "a", "model_version": "2"}, RestCall("DELETE", "/models/a/2", {})),
    ],
)
def test_each_method_is_a_call(method: str, fields: dict[str, Any], expected: RestCall) -> None:
    """Zeros and empty texts are not sent: in this protocol they are fields that are not set."""
    assert REST_CALLS[method](make_message(method, **fields)) == expected


@pytest.mark.parametrize(
    ("method", "missing"),
    [("DescribeModel", "model_name"), ("UnregisterModel", "model_name"), ("SetDefault", "model_version")],
)
def test_what_is_required(method: str, missing: str) -> None:
    """A call without it would mean another path."""
    fields = {} if missing == "model_name" else {"model_name": "a"}
    with pytest.raises(Refused, match=f"Parameter {missing} is required"):
        REST_CALLS[method](make_message(method, **fields))


def test_answers_are_said_as_torchserve_says_them() -> None:
    """A status alone is its sentence, all else the JSON; errors have their kind on a line of its own."""
    assert read_message('{\n  "status": "done"\n}\n') == "done"
    assert read_message('{"models": []}') == '{"models": []}'
    assert read_message('[{"status": "x"}]') == '[{"status": "x"}]'
    assert (
        read_error('{"code": 404, "type": "ModelNotFoundException", "message": "no"}') == "no\nModelNotFoundException"
    )
    assert read_error('{"error": {"code": "forbidden", "message": "the token"}}') == "the token"
    assert read_error("not JSON") == "not JSON"
