"""boto3's asynchronous invocations, unmodified, of a real server that writes to a real S3."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError

from tests.e2e.forecasters import HISTORY, HORIZON, pack_hourly
from tests.e2e.server import Server, run_server
from tests.patience import PATIENCE_S, repeat_in_stalls, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODEL = "au/NSW1.mar"
BODY = json.dumps({"instances": [{"start": "2026-01-01 00:00:00", "target": [50.0] * HISTORY}]}).encode()


@pytest.fixture(scope="module")
def output(s3: S3Server) -> str:
    """The bucket that answers are written to."""
    return s3.bucket()


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    """The store of the server."""
    return s3.bucket()


@pytest.fixture(scope="module")
def house(s3: S3Server, bucket: str, output: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one model and two fronts with a bucket for answers."""
    s3.put(bucket, MODEL, pack_hourly(1))
    folder = tmp_path_factory.mktemp("async")
    settings: dict[str, Any] = {"async_output": f"s3://{output}/desk", "model_cache_bytes": "64MiB", "fronts": 2}
    with run_server(s3, folder, f"s3://{bucket}", **settings) as server:
        yield server


def read_when_written(s3: S3Server, url: str) -> bytes:
    """The object at an s3:// URL, once it is there."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    with closing(s3.client()) as client:
        wait_until(lambda: is_written(client, bucket, key), f"{url} is written")
        return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())


def is_written(client: Any, bucket: str, key: str) -> bool:
    """Whether the bucket has this key."""
    return any(each["Key"] == key for each in client.list_objects_v2(Bucket=bucket, Prefix=key).get("Contents", ()))


def test_an_answer_is_written_where_boto3_is_told(house: Server, s3: S3Server, output: str) -> None:
    """From a body and from an input in the bucket; the answer is that of a plain call."""
    client = house.client()
    plain = client.invoke_endpoint(EndpointName=MODEL, ContentType="application/json", Body=BODY)["Body"].read()
    sent = client.invoke_endpoint_async(
        EndpointName=MODEL, ContentType="application/json", Body=BODY, InferenceId="run-7",
        S3OutputPathExtension="2026/nsw/", Filename="day.json",
    )  # fmt: skip
    assert (sent["InferenceId"], sent["ResponseMetadata"]["HTTPStatusCode"]) == ("run-7", 202)
    assert sent["OutputLocation"] == f"s3://{output}/desk/2026/nsw/day.json"
    assert read_when_written(s3, sent["OutputLocation"]) == plain
    assert len(json.loads(plain)["predictions"][0]["mean"]) == HORIZON
    s3.put(output, "desk/in/day.json", BODY)
    named = client.invoke_endpoint_async(
        EndpointName=MODEL, ContentType="application/json", InputLocation=f"s3://{output}/desk/in/day.json",
        RequestTTLSeconds=60, InvocationTimeoutSeconds=30,
    )  # fmt: skip
    assert read_when_written(s3, named["OutputLocation"]) == plain
    assert named["FailureLocation"] != named["OutputLocation"]


def test_a_failure_is_written_in_place_of_the_answer(house: Server, s3: S3Server, output: str) -> None:
    """A bad request, a model that is not there, and an input that is not there or too large."""
    s3.put(output, "desk/in/large", b" " * (6 * 1024 * 1024 + 1))
    client = house.client()
    asked = {
        "start": client.invoke_endpoint_async(
            EndpointName=MODEL, ContentType="application/json", Body=b'{"instances":[{}]}'
        ),
        "au/none.mar": client.invoke_endpoint_async(EndpointName="au/none.mar", Body=BODY),
        "missing.json": client.invoke_endpoint_async(
            EndpointName=MODEL, InputLocation=f"s3://{output}/desk/in/missing.json"
        ),
        "max_body_bytes": client.invoke_endpoint_async(
            EndpointName=MODEL, InputLocation=f"s3://{output}/desk/in/large"
        ),
    }
    for part, sent in asked.items():
        failure = json.loads(read_when_written(s3, sent["FailureLocation"]))
        assert part in failure["message"], failure
        assert failure["error_code"]


def test_what_cannot_be_accepted_is_a_plain_error(house: Server, output: str) -> None:
    """No other bucket is read, and no header breaks SageMaker's rules."""
    client = house.client()
    for arguments, part in (
        ({"InputLocation": "s3://elsewhere/in.json"}, "must lie below"),
        ({"InputLocation": f"s3://{output}/deskmate/in.json"}, "must lie below"),
        ({"InputLocation": f"s3://{output}/desk/../in.json"}, "segment '..'"),
        ({"InputLocation": f"s3://{output}/desk/in.json", "Body": BODY}, "both InputLocation and a body"),
        ({}, "neither InputLocation nor a body"),
        ({"Body": BODY, "S3OutputPathExtension": "a/../../b"}, "segment '..'"),
        ({"Body": BODY, "Filename": "a/b"}, "Filename"),
        ({"Body": b" " * 128_001}, "128000"),
    ):
        with pytest.raises(ClientError) as refused:
            client.invoke_endpoint_async(EndpointName=MODEL, ContentType="application/json", **arguments)
        assert part in str(refused.value), arguments
        assert refused.value.response["Error"]["Code"] == "ValidationError"


def kill_fronts(house: Server) -> None:
    """SIGKILL all fronts; new ones are up, and have found the worker, when this returns."""
    killed = {row["pid"] for row in house.processes("front")}
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: all(row["up"] and row["pid"] not in killed for row in house.processes("front")),
        "new fronts are up",
    )
    wait_until(lambda: all(is_ready(house) for _ in range(20)), "both have found the worker")


def is_ready(house: Server) -> bool:
    """Whether the front that a new connection reaches can ask a worker."""
    with httpx.Client(timeout=PATIENCE_S, trust_env=False) as http:
        return http.get(f"{house.url}/ready").is_success


def count_jobs(house: Server, result: str) -> float:
    """The jobs that have come to this, in fronts that are up."""
    return house.total("fleetcast_async_invocations_total", result=result)


def test_every_job_of_a_killed_front_is_answered_or_failed(
    house: Server, s3: S3Server, bucket: str, output: str
) -> None:
    """All fronts die while the model's archive is on its way; each job has one object, written once."""
    s3.put(bucket, "slow.mar", pack_hourly(2))
    s3.put(output, "desk/in/slow.json", BODY)
    client = house.client(attempts=None)
    done, failed = count_jobs(house, "done"), count_jobs(house, "failed")
    inputs: list[dict[str, Any]] = [
        {"Body": BODY},
        {"InputLocation": f"s3://{output}/desk/in/slow.json"},
        {"Body": b'{"instances":[{}]}'},
    ]
    with s3.hold(f"{bucket}/slow.mar", times=100):
        sent = [
            client.invoke_endpoint_async(EndpointName="slow.mar", ContentType="application/json", **each)
            for each in inputs * 5
        ]
        under_way = "fleetcast_async_invocations_under_way"
        wait_until(lambda: house.total(under_way) == len(sent), "all are under way")
        kill_fronts(house)
    kinds = ["FailureLocation" if i % 3 == 2 else "OutputLocation" for i in range(len(sent))]
    found = [read_when_written(s3, each[kind]) for each, kind in zip(sent, kinds, strict=True)]
    plain = client.invoke_endpoint(EndpointName="slow.mar", ContentType="application/json", Body=BODY)["Body"].read()
    for each, kind, data in zip(sent, kinds, found, strict=True):
        assert data == plain if kind == "OutputLocation" else (b"start" in data and b"error_code" in data)
        keys = [each[kind].removeprefix(f"s3://{output}/") for kind in ("OutputLocation", "FailureLocation")]
        assert sorted(len(s3.seen("PUT", key)) for key in keys) == [0, 1]
    wait_until(lambda: count_jobs(house, "done") - done == 10, "ten are counted as done")
    wait_until(lambda: count_jobs(house, "failed") - failed == 5, "five are counted as failed")
    wait_until(lambda: house.total(under_way) == 0, "none is under way")


def test_a_front_that_dies_while_it_writes_leaves_its_answer_to_the_next(
    house: Server, s3: S3Server, output: str
) -> None:
    """The samples are drawn anew by every call: the model is asked once, and what is written twice is the same."""
    wanted = {"output_types": ["samples"], "num_samples": 10}
    body = json.dumps({**json.loads(BODY), "configuration": wanted}).encode()
    rows = house.total("fleetcast_inference_batch_rows_sum")
    with s3.hold("desk/held.json") as released:
        sent = house.client(attempts=None).invoke_endpoint_async(
            EndpointName=MODEL, ContentType="application/json", Body=body, Filename="held.json"
        )
        wait_until(lambda: not any(fault.times for fault in s3.faults), "the answer is being written")
        kill_fronts(house)
        before = read_when_written(s3, sent["OutputLocation"])
        released.set()
        wait_until(lambda: len(s3.seen("PUT", "desk/held.json")) == 2, "the first one is written too")
    assert read_when_written(s3, sent["OutputLocation"]) == before
    assert json.loads(before)["predictions"][0]["samples"]
    assert house.total("fleetcast_inference_batch_rows_sum") - rows == 1


def test_what_is_not_answered_when_the_server_stops_has_failed(
    s3: S3Server, output: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The model's archive is never read to its end; the failure object says that the server has stopped."""
    bucket = s3.bucket()
    s3.put(bucket, "slow.mar", pack_hourly(2))
    folder = tmp_path_factory.mktemp("stopping")

    def stop_server(trial: int) -> None:
        settings: dict[str, Any] = {"async_output": f"s3://{output}/stopped{trial}", "drain_s": 2}
        settings |= {"disk_cache": folder / f"cache{trial}"}
        with run_server(s3, folder, f"s3://{bucket}", **settings) as server, s3.hold(f"{bucket}/slow.mar", times=100):
            sent = server.client().invoke_endpoint_async(EndpointName="slow.mar", Body=BODY)
            server.terminate()
            failure = json.loads(read_when_written(s3, sent["FailureLocation"]))
        assert "stopped" in failure["message"]

    repeat_in_stalls(stop_server)
