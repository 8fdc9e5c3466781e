"""boto3's response streams and asynchronous invocations, unmodified, of a real server."""

import json
from collections.abc import Iterator
from contextlib import closing

import pytest
from botocore.exceptions import ClientError

from tests.e2e.forecasters import HISTORY, HORIZON, pack_hourly
from tests.e2e.server import Server, run_server
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODEL = "au/NSW1.mar"
INSTANCE = {"start": "2026-01-01 00:00:00", "target": [50.0] * HISTORY}


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one model."""
    bucket = s3.bucket()
    with closing(s3.client()) as client:
        client.put_object(Bucket=bucket, Key=MODEL, Body=pack_hourly(1))
    with run_server(s3, tmp_path_factory.mktemp("streams"), f"s3://{bucket}", model_cache_bytes="64MiB") as server:
        yield server


def test_json_lines_come_a_part_a_line(house: Server) -> None:
    """The inference component names the model; a bad line is an error on its line and stops nobody."""
    lines = [json.dumps(INSTANCE), json.dumps({"start": "never", "target": []}), json.dumps(INSTANCE)]
    answer = house.client().invoke_endpoint_with_response_stream(
        EndpointName="forecasts",
        InferenceComponentName=MODEL,
        ContentType="application/jsonlines",
        Accept="application/jsonlines",
        Body="\n".join(lines).encode(),
    )
    assert answer["ContentType"] == "application/jsonlines"
    assert answer["InvokedProductionVariant"] == "AllTraffic"
    parts = [json.loads(each["PayloadPart"]["Bytes"]) for each in answer["Body"]]
    assert len(parts[0]["mean"]) == HORIZON
    assert "error" in parts[1]
    assert parts[2] == parts[0]


def test_an_endpoint_that_can_be_none_is_the_model(house: Server) -> None:
    """JSON comes whole; boto3 sends the name's slash escaped."""
    body = json.dumps({"instances": [INSTANCE]}).encode()
    answer = house.client().invoke_endpoint_with_response_stream(
        EndpointName=MODEL, ContentType="application/json", Body=body
    )
    whole = b"".join(each["PayloadPart"]["Bytes"] for each in answer["Body"])
    assert len(json.loads(whole)["predictions"][0]["mean"]) == HORIZON
    plain = house.client().invoke_endpoint(EndpointName=MODEL, ContentType="application/json", Body=body)
    assert plain["Body"].read() == whole
    named = house.client().invoke_endpoint(
        EndpointName="f", InferenceComponentName=MODEL, ContentType="application/json", Body=body
    )
    assert named["Body"].read() == whole


def test_errors_before_the_first_frame_are_plain(house: Server) -> None:
    """boto3 raises them by their type; so is the refusal of asynchronous calls, which need a bucket."""
    client = house.client()
    with pytest.raises(ClientError) as none:
        client.invoke_endpoint_with_response_stream(EndpointName="f", InferenceComponentName="none.mar", Body=b"{}")
    assert (none.value.response["Error"]["Code"], "none.mar" in str(none.value)) == ("ValidationError", True)
    with pytest.raises(ClientError) as nobody:
        client.invoke_endpoint_with_response_stream(EndpointName="f", Body=b"{}")
    assert "no target model" in str(nobody.value)
    with pytest.raises(ClientError) as later:
        client.invoke_endpoint_async(EndpointName="f", InputLocation="s3://bucket/in.json")
    assert (later.value.response["Error"]["Code"], "bucket" in str(later.value)) == ("ValidationError", True)
