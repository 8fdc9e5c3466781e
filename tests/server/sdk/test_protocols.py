"""One request to a model in each protocol: where the model and its version stand, and what the body becomes."""

import json

import pytest

from server.contract import HEADER_TARGET_MODEL
from server.sdk.errors import InvalidRequest, ModelNotFound, Unavailable, error_from_reply
from server.sdk.protocols import Protocol, wrap_forecast, write_request


@pytest.mark.parametrize(
    ("protocol", "version", "path"),
    [
        (Protocol.SAGEMAKER, "", "/invocations"),
        (Protocol.FORECASTS, "", "/v1/forecasts"),
        (Protocol.TORCHSERVE, "", "/predictions/au/NSW%201.mar"),
        (Protocol.TORCHSERVE, "2/1", "/predictions/au/NSW%201.mar/2%2F1"),
        (Protocol.V2, "", "/v2/models/au/NSW%201.mar/infer"),
        (Protocol.V2, "1", "/v2/models/au/NSW%201.mar/versions/1/infer"),
    ],
)
def test_where_the_model_stands(protocol: Protocol, version: str, path: str) -> None:
    """In the path, quoted, its slashes kept; or in a header, as it is; or in the body."""
    body = b'{"instances": []}'
    found = write_request(protocol, "au/NSW 1.mar", body, version)
    assert found.path == path
    assert dict(found.headers) == ({HEADER_TARGET_MODEL: "au/NSW 1.mar"} if protocol is Protocol.SAGEMAKER else {})
    assert (found.body == body) == (protocol is not Protocol.FORECASTS)


def test_instances_become_a_call_for_forecasts() -> None:
    """Each names the model; the configuration is that of all; a body of such a call goes as it is."""
    asked = {"instances": [{"target": [1]}, {"target": [2]}], "configuration": {"num_samples": 3}}
    found = json.loads(write_request(Protocol.FORECASTS, "m", json.dumps(asked).encode()).body)
    assert found == {
        "requests": [{"target_model": "m", "target": [1]}, {"target_model": "m", "target": [2]}],
        "configuration": {"num_samples": 3},
    }
    whole = b'{"requests": [{"target_model": "other"}]}'
    assert write_request(Protocol.FORECASTS, "m", whole).body == whole


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"instances": 1}', b'{"instances": [1]}'])
def test_other_bodies_are_no_call_for_forecasts(body: bytes) -> None:
    """The message says what would be one."""
    with pytest.raises(ValueError, match=r"not JSON|takes"):
        write_request(Protocol.FORECASTS, "m", body)


def test_a_version_has_a_place_in_some_protocols_only() -> None:
    """It is not left out in silence."""
    for protocol in (Protocol.SAGEMAKER, Protocol.FORECASTS):
        with pytest.raises(ValueError, match="no place for a version"):
            write_request(protocol, "m", b"{}", "1")


def test_errors_of_each_protocol_are_read() -> None:
    """A sentence of the Open Inference Protocol, and the code, type and message of TorchServe."""
    error = error_from_reply(400, "", {"error": "inputs[0]: too long"})
    assert (type(error), str(error)) == (InvalidRequest, "inputs[0]: too long")
    found = {"code": 404, "type": "ModelNotFoundException", "message": "Model not found: m"}
    error = error_from_reply(404, "", found)
    assert (type(error), str(error), error.error_type) == (
        ModelNotFound,
        "Model not found: m",
        "ModelNotFoundException",
    )
    assert isinstance(error_from_reply(503, "", {"code": 503, "message": "busy"}), Unavailable)


def test_a_forecast_is_one_element_of_bytes() -> None:
    """For the Open Inference Protocol; its own requests, tensors as bytes and what is no JSON go as they are."""
    body = b'{"instances": [{"target": [1]}]}'
    (given,) = json.loads(wrap_forecast(body))["inputs"]
    assert given == {"name": "request", "shape": [1], "datatype": "BYTES", "data": [body.decode()]}
    for other in (b'{"inputs": [], "instances": []}', b'{"x": [1]}', b"[1]", b"{", b"\xff\x00"):
        assert wrap_forecast(other) == other
