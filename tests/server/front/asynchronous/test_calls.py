"""The headers of asynchronous invocations, also those that boto3 itself would refuse to send."""

import pytest

from server.errors import Refused, Situation
from server.front.asynchronous.bucket import Bucket
from server.front.asynchronous.calls import AsyncCall, read_call
from server.front.exchange import HttpRequest
from server.settings import Settings
from tests.server.front.answering import stay_connected

BUCKET = Bucket(Settings.model_validate({"store": "models", "async_output": "s3://bucket/desk/"}))


def read(body: bytes = b"", **headers: str) -> AsyncCall:
    """The call of a request with these of SageMaker's headers, `_` for a dash."""
    raw = {f"x-amzn-sagemaker-{name.replace('_', '-')}".encode(): value.encode() for name, value in headers.items()}
    return read_call(HttpRequest("POST", "/", raw, stay_connected, body=body), BUCKET)


def test_where_answers_go() -> None:
    """Below the prefix: folder and name as the client says, else a name of ours that no other call has."""
    call = read(b"{}", inference_id="run 1", s3outputpathextension="nsw/2026/", filename="day.json")
    assert (call.id, call.output, call.source) == ("run 1", "nsw/2026/day.json", None)
    assert call.failure.startswith("failures/nsw/2026/")
    one, other = read(inputlocation="s3://bucket/desk/in/a.json"), read(inputlocation="s3://bucket/desk/in/a.json")
    assert one.source == "in/a.json"
    assert one.output == f"{one.id}.out" != other.output
    assert (one.ttl_s, one.timeout_s) == (21_600, None)
    timed = read(b"{}", requestttlseconds="60", invocationtimeoutseconds="3600")
    assert (timed.ttl_s, timed.timeout_s) == (60, 3600)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("inference_id", " starts with a space"),
        ("inference_id", "x" * 65),
        ("inference_id", ""),
        ("s3outputpathextension", "s3://other/"),
        ("s3outputpathextension", "a//b"),
        ("s3outputpathextension", "../b"),
        ("filename", "a.b.c"),
        ("filename", ".hidden"),
        ("filename", "x" * 33),
        ("requestttlseconds", "59"),
        ("requestttlseconds", "21601"),
        ("requestttlseconds", "1e3"),
        ("invocationtimeoutseconds", "0"),
        ("invocationtimeoutseconds", "9" * 5000),
        ("inputlocation", "https://bucket.s3.amazonaws.com/desk/in.json"),
    ],
)
def test_rules_of_sagemaker_hold(header: str, value: str) -> None:
    """What breaks one is 400, and the message says which."""
    with pytest.raises(Refused) as refused:
        read(b"" if header == "inputlocation" else b"{}", **{header: value})
    assert refused.value.situation is Situation.BAD_REQUEST
    named = {"inference_id": "inferenceid"}.get(header, header)
    assert named in refused.value.detail.message.lower()
    assert len(refused.value.detail.message) < 400
