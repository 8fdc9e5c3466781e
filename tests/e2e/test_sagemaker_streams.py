"""boto3's response streams and asynchronous invocations, unmodified, of a real server."""

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from botocore.exceptions import ClientError, EventStreamError

from tests.e2e.forecasters import HISTORY, HORIZON, pack_hourly
from tests.e2e.server import Server, run_server
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODEL = "au/NSW1.mar"
LARGE_LINES = 240  #: of a fifth of a megabyte each: more than the connection's buffers hold
INSTANCE = {"start": "2026-01-01 00:00:00", "target": [50.0] * HISTORY}


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    """The store of the server."""
    return s3.bucket()


@pytest.fixture(scope="module")
def house(s3: S3Server, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one model."""
    with closing(s3.client()) as client:
        client.put_object(Bucket=bucket, Key=MODEL, Body=pack_hourly(1))
    settings: dict[str, Any] = {"model_cache_bytes": "64MiB", "disk_cache_bytes": 0}
    with run_server(s3, tmp_path_factory.mktemp("streams"), f"s3://{bucket}", **settings) as server:
        yield server


def ask_stream(house: Server, model: str, lines: list[dict[str, Any]], **headers: str) -> Any:
    """boto3's answer to JSON Lines."""
    return house.client().invoke_endpoint_with_response_stream(
        EndpointName="forecasts",
        InferenceComponentName=model,
        ContentType="application/jsonlines",
        Accept="application/jsonlines",
        Body="\n".join(map(json.dumps, lines)).encode(),
        **headers,
    )


def ask_large(house: Server, model: str) -> Any:
    """A stream of many large parts."""
    wanted = {"output_types": ["samples"], "num_samples": 1000, "seed": 1}
    return ask_stream(house, model, [{**INSTANCE, "configuration": wanted}] * LARGE_LINES)


def read_part(event: Any) -> bytes:
    """The bytes of an event."""
    return bytes(event["PayloadPart"]["Bytes"])


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


def test_instances_of_json_come_a_line_each_where_lines_are_asked(house: Server) -> None:
    """Each with the configuration of all, as JSON Lines with it are answered; a bad instance costs no other."""
    wanted = {"quantiles": ["0.5"], "output_types": ["quantiles"]}
    body = json.dumps({"instances": [INSTANCE, {"start": "never"}, INSTANCE], "configuration": wanted}, indent=1)
    answer = house.client().invoke_endpoint_with_response_stream(
        EndpointName=MODEL, ContentType="application/json", Accept="application/jsonlines", Body=body.encode()
    )
    assert answer["ContentType"] == "application/jsonlines"
    parts = [json.loads(read_part(each)) for each in answer["Body"]]
    lines = ask_stream(house, MODEL, [{**INSTANCE, "configuration": wanted}] * 2)
    assert [parts[0], parts[2]] == [json.loads(read_part(each)) for each in lines["Body"]]
    assert list(parts[0]["quantiles"]) == ["0.5"]
    assert "error" in parts[1]


def test_parts_are_made_as_the_client_takes_them(house: Server) -> None:
    """A client that stands still keeps the model from most of its lines; then it gets all of them."""
    before = house.total("fleetcast_inference_batch_rows_sum")
    answer = ask_large(house, MODEL)
    events = iter(answer["Body"])
    size = len(read_part(next(events)))
    wait_until(
        lambda: house.total("fleetcast_inference_batch_rows_sum") - before >= 2, "lines are made ahead of the client"
    )
    assert house.total("fleetcast_inference_batch_rows_sum") - before < LARGE_LINES
    assert size + sum(len(read_part(event)) for event in events) == LARGE_LINES * size
    assert house.total("fleetcast_inference_batch_rows_sum") - before == LARGE_LINES


def test_a_client_that_leaves_ends_its_stream(house: Server) -> None:
    """The lines that it has not got are not made."""
    before = house.total("fleetcast_inference_batch_rows_sum")
    gone = house.total("fleetcast_inference_requests_total", code="499")
    answer = ask_large(house, MODEL)
    next(iter(answer["Body"]))
    answer["Body"].close()
    wait_until(
        lambda: house.total("fleetcast_inference_requests_total", code="499") > gone, "the front has seen it leave"
    )
    assert house.total("fleetcast_inference_batch_rows_sum") - before < LARGE_LINES


def test_a_model_that_is_gone_in_the_middle_is_an_error_of_boto3(house: Server, s3: S3Server, bucket: str) -> None:
    """Its archive is gone when half of the answer is on the way: the parts before the error are whole lines."""
    name = "au/leaving.mar"
    s3.put(bucket, name, pack_hourly(2))
    answer = ask_large(house, name)
    events = iter(answer["Body"])
    parts = [read_part(next(events))]
    s3.delete(bucket, name)
    assert house.fleet("unload", name).is_success
    with pytest.raises(EventStreamError) as broken:
        parts.extend(read_part(event) for event in events)
    answer["Body"].close()
    assert broken.value.response["Error"]["Code"] == "ModelStreamError"
    assert "au/leaving.mar" in str(broken.value)
    assert 1 <= len(parts) < LARGE_LINES
    assert all(json.loads(part)["samples"] for part in parts)
    assert house.total("fleetcast_inference_requests_total", code="400", protocol="sagemaker_streams") >= 1


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
