"""KServe's time-series protocol: what its documentation shows and what was recorded, asked of a real server."""

import json
import math
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import numpy as np
import pytest

from handlers.evaluation.correlation import estimate_gaussian
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import Kind
from tests.e2e.forecasters import HISTORY, HORIZON, pack_hourly
from tests.e2e.server import ROOT, Server, run_server
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

PLAIN, CLOCK, PAIR, OTHER, JOINT = "au/NSW1.mar", "au/clock.mar", "au/pair.mar", "au/QLD1.mar", "au/joint.mar"
RECORDED = [json.loads(line) for line in (ROOT / "tests" / "golden" / "kserve-forecast.jsonl").read_text().splitlines()]
SERIES = [50.0 + i % 24 for i in range(HISTORY)]
#: Statuses that differ from the recorded ones, with the reason: what is broken there is done right here.
DIFFERENT = {
    "frequency h (lower case)": (200, "an archive's own alias is known"),
    "frequency 30min": (400, "known, but not the archive's"),
    "series with null": (200, "null is missing"),
    "type says univariate, series is 2-D": (400, "it is no such series"),
    "multivariate": (400, "the model has one product"),
    "horizon too long (error without code, as upstream returns it)": (400, "a refusal, not a 500"),
    "error with code 400": (400, "a horizon too long"),
    "model raises": (400, "a horizon too long"),
    "horizon 0": (422, "nothing is no forecast"),
    "no content type": (200, "read as JSON"),
    "model of another kind": (404, "unknown"),
}


def make_correlation() -> bytes:
    """An archive in which two hourly models move together."""
    errors = np.random.default_rng(5).standard_normal((200, 2, HORIZON))
    errors[:, 1] = 0.98 * errors[:, 0] + 0.2 * errors[:, 1]
    found = estimate_gaussian(errors, (PLAIN, OTHER))
    parts = ArchiveParts(correlation=found.record, tensors=found.tensors)
    return pack_model(Kind.CORRELATION, parts, model_name="joint")


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of two hourly models and their correlation, of one that reads the clock, and of one of two products."""
    bucket = s3.bucket()
    with closing(s3.client()) as client:
        client.put_object(Bucket=bucket, Key=PLAIN, Body=pack_hourly(1))
        client.put_object(Bucket=bucket, Key=CLOCK, Body=pack_hourly(2, features=("demand",), calendar=True))
        client.put_object(Bucket=bucket, Key=OTHER, Body=pack_hourly(4))
        client.put_object(Bucket=bucket, Key=JOINT, Body=make_correlation())
        client.put_object(Bucket=bucket, Key=PAIR, Body=pack_hourly(3, products=2))
    with run_server(s3, tmp_path_factory.mktemp("kserve"), f"s3://{bucket}", model_cache_bytes="64MiB") as server:
        yield server


def make_input(**changed: Any) -> dict[str, Any]:
    """An input as the documentation has it."""
    return {
        "type": "univariate_time_series",
        "name": "NSW1",
        "series": SERIES,
        "frequency": "H",
        "start_timestamp": "2026-01-01T00:00:00Z",
        **changed,
    }


def post(house: Server, *inputs: dict[str, Any], model: str = PLAIN, **options: Any) -> httpx.Response:
    """One call."""
    body = {"model": model, "inputs": inputs, "options": {"horizon": HORIZON, **options}, "metadata": {"id": "r1"}}
    return house.http.post(f"{house.url}/v1/timeseries/forecast", json=body)


def test_the_documented_call_is_answered_in_the_documented_words(house: Server) -> None:
    """Every field is there, the numbers are those of `/v1/forecasts`, Z stays Z, and null is not left out."""
    answer = post(house, make_input(), quantiles=[0.1, 0.5]).json()
    assert list(answer) == ["id", "created_at", "status", "error", "model", "outputs", "usage"]
    assert (answer["status"], answer["error"], answer["model"], answer["usage"]) == ("completed", None, PLAIN, None)
    (output,) = answer["outputs"]
    assert (output["type"], output["status"], output["error"]) == ("time_series_forecast", "completed", None)
    (content,) = output["content"]
    assert (content["type"], content["name"], content["frequency"]) == ("univariate_time_series", "NSW1", "H")
    assert content["start_timestamp"] == "2026-01-03T00:00:00Z"
    request = {"target_model": PLAIN, "start": "2026-01-01 00:00:00", "target": SERIES}
    configuration = {"output_types": ["mean", "quantiles"], "quantiles": ["0.1", "0.5"]}
    made = house.http.post(f"{house.url}/v1/forecasts", json={"requests": [request], "configuration": configuration})
    (expected,) = made.json()["predictions"]
    assert content["mean_forecast"] == pytest.approx(expected["mean"])
    assert {level: pytest.approx(each) for level, each in content["quantiles"].items()} == expected["quantiles"]
    (content,) = post(house, make_input(start_timestamp="2026-01-01T00:00:00+10:00")).json()["outputs"][0]["content"]
    assert (content["quantiles"], content["start_timestamp"]) == (None, "2026-01-03T00:00:00+10:00")


def test_recorded_calls_have_the_recorded_status_or_a_better_one(house: Server) -> None:
    """The public server's own exchanges, with a series as long as the model needs."""
    for record in RECORDED:
        sent, body = record["request"], record["request"].get("body")
        if "timeseries" not in sent["path"]:
            continue
        given = json.loads(body) if isinstance(body, str) and body.startswith('{"model') else body
        for one in given.get("inputs", []) if isinstance(given, dict) else []:
            times = math.ceil(HISTORY / len(one["series"]))
            one["series"] = one["series"] * times
            one.pop("dynamic_feat", None)
        if isinstance(given, dict) and given.get("model") == "plain":
            given["model"] = "au/none.mar"
        content = json.dumps(given).encode() if isinstance(given, dict) else (body or "").encode()
        headers = {} if record["case"] == "no content type" else {"content-type": "application/json"}
        answer = house.http.request(sent["method"], f"{house.url}{sent['path']}", content=content, headers=headers)
        status = DIFFERENT.get(record["case"], (record["reply"]["status"], ""))[0]
        assert answer.status_code == status, (record["case"], answer.text)
        if status >= 400:
            error = answer.json()["error"]
            assert error["code"] == str(status), record["case"]
            assert {"message", "param", "type"} <= set(error)
            assert ("detail" in answer.json()) == (status == 422)
        elif sent["method"] == "POST":
            assert set(answer.json()) == set(
                record["reply"]["body"] if "outputs" in record["reply"]["body"] else answer.json()
            )


def test_an_input_that_fails_does_not_stop_the_others(house: Server) -> None:
    """200 and `partial`, its error in its place; where all fail, the status of the first."""
    short = make_input(series=[1.0, 2.0], name="short")
    answer = post(house, make_input(), short, make_input(target_model="au/none.mar"))
    assert (answer.status_code, answer.json()["status"]) == (200, "partial")
    fine, bad, unknown = answer.json()["outputs"]
    assert fine["status"] == "completed"
    assert (bad["status"], bad["content"], bad["error"]["code"]) == ("error", [], "400")
    assert bad["error"]["param"] == "inputs[1].series"
    assert unknown["error"]["code"] == "404"
    alone = post(house, short)
    assert (alone.status_code, alone.json()["error"]["param"]) == (400, "inputs[0].series")


def test_many_markets_several_products_and_samples(house: Server) -> None:
    """`target_model` an input; products are [T][D], time first; samples where they are asked."""
    pair = make_input(type="multivariate_time_series", series=[[each, each + 1] for each in SERIES], target_model=PAIR)
    answer = post(house, make_input(), pair, quantiles=[0.5], num_samples=3, seed=1).json()
    first, second = (each["content"][0] for each in answer["outputs"])
    assert len(first["samples"]) == 3
    assert (len(second["mean_forecast"]), len(second["mean_forecast"][0])) == (HORIZON, 2)
    assert (len(second["quantiles"]["0.5"]), len(second["quantiles"]["0.5"][0])) == (HORIZON, 2)
    cut = post(house, make_input(), horizon=5).json()["outputs"][0]["content"][0]
    assert cut["mean_forecast"] == pytest.approx(first["mean_forecast"][:5])
    assert PLAIN in house.http.get(f"{house.url}/v1/timeseries/models").json()


def test_the_time_is_needed_where_the_model_reads_the_clock(house: Server) -> None:
    """Left out it is 400 naming it, or else the series begins in 1970."""
    features = {"dynamic_feat": [[1.0] * (HISTORY + HORIZON)]}
    late = make_input(**features)
    del late["start_timestamp"]
    answer = post(house, late, model=CLOCK)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "inputs[0].start_timestamp")
    assert post(house, make_input(**features), model=CLOCK).status_code == 200
    answer = post(house, make_input(**features), model=CLOCK, horizon=5)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "options.horizon")
    timeless = make_input()
    del timeless["start_timestamp"]
    (content,) = post(house, timeless).json()["outputs"][0]["content"]
    assert content["start_timestamp"] == "1970-01-03T00:00:00Z"


@pytest.mark.parametrize(
    ("field", "options", "given"),
    [("options.quantile", {"quantile": [0.1]}, {}), ("inputs[0].dynamic_feats", {}, {"dynamic_feats": [[1.0]]})],
)
def test_a_misspelt_key_is_not_left_out(
    house: Server, field: str, options: dict[str, Any], given: dict[str, Any]
) -> None:
    """422 with the one that is meant; other unknown keys are let through, as KServe does."""
    answer = post(house, make_input(**given), **options)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, field), answer.text
    assert "did you mean" in answer.json()["error"]["message"]
    assert post(house, make_input(other=1), more=2).status_code == 200


def test_joint_scenarios_move_together(house: Server) -> None:
    """Sample s is the same scenario in both markets, and those of one call without a correlation are refused."""
    inputs = make_input(), make_input(target_model=OTHER)
    answer = post(house, *inputs, num_samples=200, seed=7, joint=True, correlation=JOINT, quantiles=[0.5])
    assert answer.status_code == 200, answer.text
    first, second = (each["content"][0] for each in answer.json()["outputs"])
    ranks = [np.argsort(np.argsort(np.array(each["samples"])[:, 3])) for each in (first, second)]
    assert np.asarray(np.corrcoef(np.array(ranks)))[0, 1] > 0.9
    assert set(first["quantiles"]) == {"0.5"}
    refused = post(house, *inputs, num_samples=200, joint=True)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "options.joint")
    unknown = post(house, *inputs, num_samples=200, joint=True, correlation="none.mar")
    assert (unknown.status_code, "none.mar" in unknown.text) == (404, True)
