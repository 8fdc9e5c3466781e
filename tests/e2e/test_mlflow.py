"""MLflow's and Databricks' clients, unmodified and as they were recorded, asking a real server."""

import importlib.util
import io
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from tests.e2e.clients import INSTALL_S, make_environment, run_script
from tests.e2e.forecasters import HISTORY, HORIZON, pack_hourly
from tests.e2e.models import pack_forecaster
from tests.e2e.server import ROOT, Server, run_server
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODEL, DEMAND, TENSORS = "au/NSW1.mar", "au/demand.mar", "au/dense.mar"
PARQUET, HAS_PARQUET = "application/vnd.apache.parquet", importlib.util.find_spec("pyarrow") is not None
GOLDEN = ROOT / "tests" / "golden"
TARGET = [50.0 + i % 24 for i in range(HISTORY)]
INSTANCES = [{"start": "2026-01-01 00:00:00", "target": TARGET}]

SCRIPT = """
import json, sys, os, warnings, logging
warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
import numpy as np, pandas as pd
from mlflow.deployments import get_deploy_client
from mlflow.pyfunc.scoring_server.client import ScoringServerClient
host, port = sys.argv[1:]
url = f"http://{host}:{port}"
instances = [{"start": "2026-01-01 00:00:00", "target": [50.0 + i % 24 for i in range(48)]}]
frame = pd.DataFrame({"ds": [str(each) for each in pd.date_range("2026-01-01", periods=48, freq="h")],
                      "y": [50.0 + i % 24 for i in range(48)]})
said = {}
scoring = ScoringServerClient(host, int(port))
scoring.ping()
said["version"] = scoring.get_version()
said["frame"] = json.loads(scoring.invoke(frame, params={"h": 24}).get_predictions().to_json(orient="records"))
said["list"] = json.loads(scoring.invoke(instances).to_json())
body = {"instances": instances, "configuration": {"quantiles": ["0.1"]}}
said["text"] = json.loads(scoring.invoke(json.dumps(body)).to_json())
deployed = get_deploy_client(url)
said["http"] = deployed.predict(endpoint="au/NSW1.mar", inputs=body)
os.environ.update(DATABRICKS_HOST=url, DATABRICKS_TOKEN="any")
said["databricks"] = get_deploy_client("databricks").predict(endpoint="au/NSW1.mar", inputs=body)
from databricks.sdk import WorkspaceClient
found = WorkspaceClient(host=url, token="any").serving_endpoints.query(name="au/NSW1.mar", instances=instances)
said["sdk"] = {"predictions": found.predictions}
os.environ.update(AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME=url)
sage = get_deploy_client("sagemaker:/us-east-1")
said["sagemaker"] = json.loads(sage.predict("au/NSW1.mar", instances).to_json())
said["sagemaker default"] = json.loads(sage.predict("forecasts", frame).to_json())
try:
    deployed.predict(endpoint="au/none.mar", inputs=body)
except Exception as error:
    said["unknown"] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of an hourly model, which is also the default, of one with a covariate, and of one of tensors."""
    bucket = s3.bucket()
    with closing(s3.client()) as client:
        client.put_object(Bucket=bucket, Key=MODEL, Body=pack_hourly(1))
        client.put_object(Bucket=bucket, Key=DEMAND, Body=pack_hourly(2, features=("demand",), calendar=True))
        client.put_object(Bucket=bucket, Key=TENSORS, Body=pack_forecaster(TENSORS, 3).data)
    folder, store = tmp_path_factory.mktemp("mlflow"), f"s3://{bucket}"
    with run_server(s3, folder, store, model_cache_bytes="64MiB", default_model=MODEL) as server:
        yield server


def post(house: Server, body: Any, path: str = "/invocations", media: str = "application/json") -> httpx.Response:
    """One call that names no model by a header."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return house.http.post(f"{house.url}{path}", content=content, headers={"content-type": media} if media else {})


def make_rows(count: int, item: str | None = None) -> list[dict[str, Any]]:
    """A long frame of so many hours, with or without an id."""
    rows = [{"ds": f"2026-01-{1 + i // 24:02} {i % 24:02}:00:00", "y": 50.0 + i % 24} for i in range(count)]
    return rows if item is None else [{"unique_id": item, **row} for row in rows]


@pytest.mark.timeout(INSTALL_S + PATIENCE_S)
def test_unmodified_clients_get_forecasts(house: Server) -> None:
    """The scoring client, the three deployments clients and databricks-sdk, each in its user's own words."""
    python = make_environment("mlflow-skinny==3.17.2", "pandas", "scipy", "boto3", "databricks-sdk")
    said = run_script(python, SCRIPT, *map(str, house.address))
    expected = post(house, {"instances": INSTANCES}).json()["predictions"]
    narrow = post(house, {"instances": INSTANCES, "configuration": {"quantiles": ["0.1"]}}).json()["predictions"]
    assert said["version"]
    assert [each["mean"] for each in said["frame"]] == pytest.approx(expected[0]["mean"])
    assert said["frame"][0]["timestamp"] == "2026-01-03 00:00:00"
    for name in ("list", "sdk", "sagemaker"):
        assert said[name]["predictions"][0]["mean"] == pytest.approx(expected[0]["mean"]), name
    for name in ("text", "http", "databricks"):
        assert said[name]["predictions"][0]["quantiles"]["0.1"] == pytest.approx(narrow[0]["quantiles"]["0.1"]), name
    assert len(said["sagemaker default"]["predictions"]) == HORIZON
    assert said["unknown"][0] == "HTTPError"
    assert "au/none.mar" in said["unknown"][1]


def test_what_clients_sent_is_answered(house: Server) -> None:
    """Each recorded call reaches a model: it is answered, or refused for its short history and for nothing else."""
    records = [json.loads(line) for line in (GOLDEN / "mlflow-clients.jsonl").read_text().splitlines()]
    seen = 0
    for record in records:
        sent = record.get("request")
        if sent is None or "/invocations" not in sent["path"] or not isinstance(sent.get("body"), dict):
            continue
        path = sent["path"].replace("au%20nsw.mar", MODEL).replace("/NSW1.mar", f"/{MODEL}").replace("au/au", "au")
        headers = {name: sent["headers"][name] for name in ("content-type",) if name in sent["headers"]}
        answer = house.http.post(f"{house.url}{path}", content=json.dumps(sent["body"]).encode(), headers=headers)
        if sent["body"].get("inputs") == [[1.0, 1.0, 1.0]]:
            assert answer.status_code == 400, "three numbers are no tensor of the model's"
            continue
        assert (answer.status_code, "history" in answer.text or "steps" in answer.text) == (400, True), answer.text
        seen += 1
    assert seen >= 10


def test_frames_are_series(house: Server) -> None:
    """Wide and long frames, records and CSV give what their series give as instances."""
    expected = post(house, {"instances": INSTANCES}).json()["predictions"][0]["mean"]
    wide = {"dataframe_split": {"columns": ["start", "target"], "data": [["2026-01-01 00:00:00", TARGET]]}}
    assert post(house, wide).json()["predictions"][0]["mean"] == pytest.approx(expected)
    found = post(house, {"dataframe_records": make_rows(48, "a") + make_rows(48, "b"), "params": {"h": 5}}).json()
    assert [each["mean"] for each in found["predictions"]] == pytest.approx([*expected[:5], *expected[:5]])
    assert [each["item_id"] for each in found["predictions"]] == ["a"] * 5 + ["b"] * 5
    assert {"timestamp", "0.1", "0.9"} <= set(found["predictions"][0])
    lines = "ds,y\n" + "".join(f"{row['ds']},{row['y']}\n" for row in make_rows(48))
    for media in ("text/csv", "text/csv; charset=utf-8"):
        rows = post(house, lines.encode(), media=media).json()["predictions"]
        assert [each["mean"] for each in rows] == pytest.approx(expected)


def test_frames_of_a_target_model(house: Server) -> None:
    """The header names the model of a frame too, with its parameters; its faults are those of a frame."""
    expected = post(house, {"instances": INSTANCES}).json()["predictions"][0]["mean"]
    for path in ("/invocations", "/endpoints/fleet/invocations"):
        frame = json.dumps({"dataframe_records": make_rows(48), "params": {"h": 5}}).encode()
        for body in (frame, frame.replace(b'{"dataframe', b'\n{\n  "dataframe', 1)):
            given = {"content-type": "application/json", "x-amzn-sagemaker-target-model": MODEL}
            answer = house.http.post(f"{house.url}{path}", content=body, headers=given)
            assert answer.status_code == 200, answer.text
            assert [each["mean"] for each in answer.json()["predictions"]] == pytest.approx(expected[:5])
    given["x-amzn-sagemaker-target-model"] = "au/none.mar"
    unknown = house.http.post(f"{house.url}/invocations", content=frame, headers=given)
    assert (unknown.status_code, "au/none.mar" in unknown.json()["message"]) == (400, True)


@pytest.mark.skipif(not HAS_PARQUET, reason="the extra fleetcast[parquet] is not installed")
def test_a_parquet_file_is_a_long_frame(house: Server) -> None:
    """As pandas writes one, with times of its own; it is answered as the records are."""
    import pandas as pd  # type: ignore[import-untyped]  # noqa: PLC0415 -- a second that only this test takes

    frame = pd.DataFrame(make_rows(48))
    frame["ds"] = pd.to_datetime(frame["ds"])
    file = io.BytesIO()
    frame.to_parquet(file, index=False)
    found = post(house, file.getvalue(), media=PARQUET)
    assert found.status_code == 200, found.text
    expected = post(house, {"dataframe_records": make_rows(48)}).json()["predictions"]
    means = [each["mean"] for each in found.json()["predictions"]]
    assert means == pytest.approx([each["mean"] for each in expected])


def test_covariates_come_by_name_and_reach_the_forecast(house: Server) -> None:
    """Rows without a value after the last one are the forecast's: they carry what is known of it."""
    rows = [{**row, "demand": 7.0} for row in make_rows(72)]
    for row in rows[48:]:
        row["y"] = None
    path = f"/serving-endpoints/{DEMAND}/invocations"
    found = post(house, {"dataframe_records": rows}, path)
    assert found.status_code == 200, found.text
    assert [each["timestamp"] for each in found.json()["predictions"]] == [row["ds"] for row in rows[48:]]
    strange = post(house, {"dataframe_records": [{**row, "wind": 1.0} for row in rows]}, path)
    assert (strange.status_code, "'wind' is none of them" in strange.json()["message"]) == (400, True)
    short = post(house, {"dataframe_records": rows[:60]}, path)
    assert (short.status_code, "dynamic_feat" in short.json()["message"]) == (400, True)


def test_inputs_of_arrays_have_a_batch_axis(house: Server) -> None:
    """Each row is what the model answers for it alone, by the input's name or without it."""
    rows = [[[float(i + j + k) for k in range(12)] for j in range(3)] for i in range(2)]
    path = f"/endpoints/{TENSORS}/invocations"
    alone = [post(house, {"x": row}, path).json()["predictions"] for row in rows]
    assert post(house, {"inputs": rows}, path).json()["predictions"] == alone
    assert post(house, {"inputs": {"x": rows}}, path).json()["predictions"] == alone
    assert post(house, {"inputs": {"y": rows}}, path).status_code == 400


def test_which_model_is_asked(house: Server) -> None:
    """The query before the path, the path before the default, SageMaker's component before all of them."""
    body = {"instances": INSTANCES}
    for path in (
        "/invocations",
        "/endpoints/anything/invocations",
        f"/endpoints/{MODEL}/invocations",
        "/endpoints/au%2FNSW1.mar/invocations",
        f"/endpoints/au/none.mar/invocations?model_name={MODEL}",
    ):
        assert post(house, body, path).status_code == 200, path
    unknown = post(house, body, "/endpoints/au/none.mar/invocations")
    assert (unknown.status_code, unknown.json()["error_code"]) == (400, "BAD_REQUEST")
    assert unknown.headers["x-amzn-errortype"] == "ValidationError"
    unknown = post(house, body, "/serving-endpoints/au/none.mar/invocations")
    assert (unknown.status_code, unknown.json()["error_code"]) == (404, "RESOURCE_DOES_NOT_EXIST")


@pytest.mark.parametrize(
    ("body", "media", "status", "words"),
    [
        ({"inputs": [1], "instances": [1]}, "application/json", 400, "a request has one of"),
        (b"{", "application/json", 400, "no JSON object"),
        (b"", "text/csv", 400, "no columns"),
        (b"ds,y\n2026,1,2\n", "text/csv", 400, "3 cells for 2 columns"),
        ({"dataframe_split": {"columns": ["a"]}}, "application/json", 400, "data is missing"),
        ({"dataframe_records": {"a": 1}}, "application/json", 400, "expected a list, not an object"),
        ({"dataframe_records": [{"a": 1}]}, "application/json", 400, "timestamp (or ds)"),
        ({"instances": INSTANCES, "params": {"h": 25}}, "application/json", 400, "forecasts 24 steps, not 25"),
        ({"dataframe_records": make_rows(48), "param": {"h": 5}}, "application/json", 400, "did you mean params?"),
        ({"instances": INSTANCES, "params": {"horizon": 3}}, "application/json", 400, "horizon"),
        ({"instances": INSTANCES}, "application/json; charset=latin-1", 415, "charset=utf-8"),
        (b"x", "application/vnd.apache.arrow.stream", 415, "is not served"),
        (b"x", PARQUET, *((400, "not a Parquet file") if HAS_PARQUET else (415, "installs fleetcast[parquet]"))),
    ],
)
def test_what_is_wrong_is_said(house: Server, body: Any, media: str, status: int, words: str) -> None:
    """One body for both dialects: `error_code` for MLflow's users, `message` and the header for boto3's."""
    answer = post(house, body, media=media)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["message"]
    assert answer.json()["error_code"] == "BAD_REQUEST"
    assert answer.headers["x-amzn-errortype"]


def test_probes_of_a_scoring_server_are_answered(house: Server) -> None:
    """`/health` and `/version` by GET; by POST they are 405."""
    for path in ("/health", "/version"):
        assert house.http.get(f"{house.url}{path}").status_code == 200, path
        assert house.http.post(f"{house.url}{path}").status_code == 405, path
    assert house.http.get(f"{house.url}/health").text == "\n"
    assert post(house, {"instances": INSTANCES}, media="").status_code == 200
