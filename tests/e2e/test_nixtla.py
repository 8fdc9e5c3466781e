"""Nixtla's clients, unmodified and as they were recorded, asking a real server."""

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import numpy as np
import pytest

from handlers.evaluation.correlation import estimate_gaussian
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import Kind
from tests.e2e.clients import INSTALL_S, make_environment, run_script
from tests.e2e.forecasters import HISTORY, HORIZON, pack_hourly, pack_paths
from tests.e2e.server import ROOT, Server, run_server
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

PLAIN, DEMAND, TIMELESS, PAIR = "au/NSW1.mar", "au/demand.mar", "au/timeless.mar", "au/pair.mar"
OTHER, JOINT, PATHS, MIXED = "au/QLD1.mar", "joint.mar", "au/paths.mar", "mixed.mar"
RECORDED = [json.loads(line) for line in (ROOT / "tests" / "golden" / "nixtla.jsonl").read_text().splitlines()]
VERSIONS = ("0.7.3", "0.8.0", "0.9.0")
#: What is refused on purpose, by the call that was recorded: the status, and a word of the reason.
REFUSED = {
    "forecast(df, h=24) default model": (404, "model='au/NSW1.mar'"),
    "forecast(.., feature_contributions=True)": (501, "feature contributions"),
    "forecast(.., hist_exog_list=['demand'])": (400, "X_df"),
    "simulate(df, h=24, n_paths=3)": (501, "fleetcast correlate"),
}

SCRIPT = """
import json, sys, warnings, logging
warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
import pandas as pd
from nixtla import NixtlaClient
url, version = sys.argv[1:]
client = NixtlaClient(api_key="any", base_url=url)
said = {"valid": client.validate_api_key(), "usage": client.usage()}
stamps = pd.date_range("2026-01-01", periods=120, freq="h")
df = pd.concat([pd.DataFrame({"unique_id": name, "ds": stamps, "y": [50.0 + i % 24 + at for i in range(120)]})
                for at, name in enumerate(("NSW1", "QLD1"))])
given = {"model": "au/NSW1.mar", "freq": "h"}
model = "au/demand.mar" if version >= "0.9" else "au/timeless.mar"  # older clients send no times
made = client.forecast(df, h=24, level=[80, 97.5], **given)
said["forecast"] = {"columns": list(made.columns), "rows": len(made), "ds": str(made["ds"].iloc[0]),
                    "ordered": bool((made["TimeGPT-lo-80"] <= made["TimeGPT-hi-80"]).all())}
quantiles = client.forecast(df, h=12, quantiles=[0.1, 0.5, 0.9], **given)
said["quantiles"] = {"columns": list(quantiles.columns), "rows": len(quantiles)}
tied = client.forecast(df, h=24, model="joint.mar", freq="h")
alone = client.forecast(df[df.unique_id == "QLD1"], h=24, **given)
said["tied"] = [len(tied), [float(each) for each in tied[tied.unique_id == "QLD1"]["TimeGPT"]]]
said["alone"] = [float(each) for each in alone["TimeGPT"]]
future = pd.DataFrame({"unique_id": "NSW1", "ds": pd.date_range("2026-01-06", periods=24, freq="h"), "demand": 7.0})
one = df[df.unique_id == "NSW1"].assign(demand=8.0)
said["exogenous"] = len(client.forecast(one, h=24, X_df=future, model=model, freq="h"))
tested = client.cross_validation(df, h=24, n_windows=2, level=[80], **given)
said["backtest"] = {"rows": len(tested), "cutoffs": sorted({str(each) for each in tested["cutoff"]})}
found = client.detect_anomalies(df, level=99, **given)
said["anomalies"] = {"rows": len(found), "columns": list(found.columns)}
history = client.forecast(df[df.unique_id == "NSW1"], h=24, add_history=True, **given)
said["history"] = len(history)
big = pd.DataFrame({"unique_id": "NSW1", "ds": pd.date_range("2000-01-01", periods=60000, freq="h"),
                    "y": [50.123456789 + i % 24 for i in range(60000)], "demand": 7000.123456789})
after = pd.date_range(big.ds.iloc[-1], periods=25, freq="h")[1:]
after = pd.DataFrame({"unique_id": "NSW1", "ds": after, "demand": 7.0})
said["big"] = len(client.forecast(big, h=24, X_df=after, model=model, freq="h"))
try:
    client.forecast(df, h=24, model="none", freq="h")
except Exception as error:
    said["unknown"] = [type(error).__name__, str(error)]
try:
    client.forecast(df, h=24, model="au/demand.mar", freq="h")
except Exception as error:
    said["lacking"] = str(error)
if version >= "0.9":
    asked = {"h": 24, "n_paths": 5, "seed": -7, "freq": "h", "poll_interval": 0.05}
    for name in ("joint.mar", "au/paths.mar"):
        drawn, again = (client.simulate(df, model=name, **asked) for _ in range(2))
        said[name] = {"columns": list(drawn.columns), "rows": len(drawn), "coupled": bool(drawn["coupled"].all()),
                      "again": bool((drawn["TimeGPT"] == again["TimeGPT"]).all()),
                      "different": drawn.groupby("sample_id")["TimeGPT"].sum().nunique(),
                      "ordered": drawn["unique_id"].iloc[:48].tolist() == ["NSW1"] * 24 + ["QLD1"] * 24}
    try:
        client.simulate(df, model="au/NSW1.mar", **asked)
    except Exception as error:
        said["no paths"] = [type(error).__name__, str(error)]
    job = client.jobs.forecast(df, h=24, level=[80, 97.5], **given)
    said["job"] = bool(job.wait(0.05)["TimeGPT"].equals(made["TimeGPT"]))
    job = client.jobs.cross_validation(df, h=24, n_windows=2, level=[80], **given)
    said["backtest job"] = bool(job.wait(0.05)["TimeGPT"].equals(tested["TimeGPT"]))
    asked = {"h": 24, "detection_size": 12, "level": 80, **given}
    online = client.detect_anomalies_online(df, **asked)
    said["online job"] = [len(online), bool(client.jobs.detect_anomalies(df, **asked).wait(0.05).equals(online))]
    try:
        client.detect_anomalies_online(df, threshold_method="multivariate", **asked)
    except Exception as error:
        said["multivariate"] = str(error)
    job = client.jobs.forecast(df, h=24, **given)
    job.cancel()
    said["cancelled"] = job.status.value
said["models"] = client.list_models() if hasattr(client, "list_models") else None
print(json.dumps(said))
"""


def pack_correlation(*names: str) -> bytes:
    """An archive that ties these models together."""
    errors = np.random.default_rng(5).standard_normal((50, len(names), HORIZON))
    found = estimate_gaussian(errors, names)
    parts = ArchiveParts(correlation=found.record, tensors=found.tensors)
    return pack_model(Kind.CORRELATION, parts, model_name="joint")


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of an hourly model, of two with a covariate, of which one needs the time, and of one of two products."""
    bucket = s3.bucket()
    with closing(s3.client()) as client:
        client.put_object(Bucket=bucket, Key=PLAIN, Body=pack_hourly(1))
        client.put_object(Bucket=bucket, Key=DEMAND, Body=pack_hourly(2, features=("demand",), calendar=True))
        client.put_object(Bucket=bucket, Key=TIMELESS, Body=pack_hourly(4, features=("demand",)))
        client.put_object(Bucket=bucket, Key=PAIR, Body=pack_hourly(3, products=2))
        client.put_object(Bucket=bucket, Key=OTHER, Body=pack_hourly(5))
        client.put_object(Bucket=bucket, Key=JOINT, Body=pack_correlation(OTHER, PLAIN))
        client.put_object(Bucket=bucket, Key=PATHS, Body=pack_paths(6))
        members = (f"{PAIR}#product1", PLAIN, f"{PAIR}#product0")
        client.put_object(Bucket=bucket, Key=MIXED, Body=pack_correlation(*members))
        client.put_object(Bucket=bucket, Key="half.mar", Body=pack_correlation(PLAIN, f"{PAIR}#product0"))
        client.put_object(Bucket=bucket, Key="odd.mar", Body=pack_correlation(PLAIN, DEMAND))
    with run_server(
        s3, tmp_path_factory.mktemp("nixtla"), f"s3://{bucket}", model_cache_bytes="64MiB", fronts=2
    ) as server:
        yield server


def ask(house: Server, model: str, path: str = "/v2/forecast", **body: Any) -> tuple[int, Any]:
    """A request's status and JSON."""
    answer = house.http.post(f"{house.url}{path}", json={"model": model, "freq": "h", **body})
    return answer.status_code, answer.json()


@pytest.mark.timeout(INSTALL_S + PATIENCE_S)
@pytest.mark.parametrize("version", VERSIONS)
def test_an_unmodified_client_gets_what_its_user_asks(house: Server, version: str) -> None:
    """Forecasts, quantiles, covariates, backtests, anomalies, history, a packed body: by each generation's client."""
    python = make_environment(f"nixtla=={version}")
    said = run_script(python, SCRIPT, f"{house.url}/", version)
    assert said["valid"] is True
    columns = ["unique_id", "ds", "TimeGPT", "TimeGPT-hi-80", "TimeGPT-hi-97.5", "TimeGPT-lo-80", "TimeGPT-lo-97.5"]
    assert sorted(said["forecast"]["columns"]) == sorted(columns)
    assert said["forecast"]["rows"] == 48
    assert said["forecast"]["ordered"]
    assert said["forecast"]["ds"] == "2026-01-06 00:00:00"
    assert said["quantiles"]["rows"] == 24
    assert {"TimeGPT-q-10", "TimeGPT-q-50", "TimeGPT-q-90"} <= set(said["quantiles"]["columns"])
    assert said["tied"][0] == 48
    assert said["tied"][1] == pytest.approx(said["alone"], rel=1e-5), "the second series goes to the second product"
    assert said["exogenous"] == HORIZON
    assert said["backtest"]["rows"] == 96
    assert said["backtest"]["cutoffs"] == ["2026-01-03 23:00:00", "2026-01-04 23:00:00"]
    assert said["anomalies"]["rows"] == 2 * 72
    assert "anomaly" in said["anomalies"]["columns"]
    assert said["history"] > HORIZON
    assert said["big"] == HORIZON
    assert said["unknown"][0] == "ApiError"
    assert "404" in said["unknown"][1]
    assert "model='au/NSW1.mar'" in said["unknown"][1]
    assert "demand" in said["lacking"]
    assert said["models"] is None or PLAIN in said["models"]
    if version < "0.9":
        return
    for name, coupled in ((JOINT, True), (PATHS, False)):
        assert said[name]["columns"] == ["unique_id", "ds", "sample_id", "TimeGPT", "coupled"]
        assert (said[name]["rows"], said[name]["coupled"], said[name]["again"]) == (2 * 5 * HORIZON, coupled, True)
        assert (said[name]["different"], said[name]["ordered"]) == (5, True)
    assert said["no paths"][0] == "ApiError"
    assert "fleetcast correlate" in said["no paths"][1]
    assert (said["job"], said["backtest job"], said["cancelled"]) == (True, True, "cancelled")
    assert said["online job"] == [2 * 12, True]
    assert "leave out threshold_method" in said["multivariate"]


def test_what_clients_sent_is_answered_as_they_need_it(house: Server) -> None:
    """Every recorded request gets the recorded reply's status, fields and lengths, or its refusal of the table."""
    for record in RECORDED:
        sent, reply = record["request"], record["reply"]
        body = sent.get("body")
        if "60000 items" in json.dumps(body) or "/simulate/jobs/" in sent["path"]:
            continue
        features = isinstance(body, dict) and body["series"].get("X")
        if features:
            body = {**body, "model": DEMAND if record["call"] not in REFUSED else body["model"]}
        headers = {name: value for name, value in sent["headers"].items() if name != "content-length"}
        content = None if body is None else json.dumps(body).encode()
        answer = house.http.request(sent["method"], f"{house.url}{sent['path']}", content=content, headers=headers)
        status, reason = REFUSED.get(record["call"], (reply["status"], ""))
        if sent["path"].startswith("/model_params") and "timegpt" not in sent["path"]:
            status, reason = 200, ""
        assert answer.status_code == status, (record["call"], answer.text[:300])
        if status != 200:
            assert reason in answer.json()["detail"], record["call"]
            continue
        found, recorded = answer.json(), reply["body"]
        assert set(recorded) <= set(found), record["call"]
        for name in ("mean", "sizes", "idxs", "anomaly", "anomaly_score"):
            if isinstance(recorded.get(name), list) and "anomaly_detection" not in sent["path"]:
                assert len(found[name]) == len(recorded[name]), (record["call"], name)
        assert set(recorded.get("intervals") or ()) <= set(found.get("intervals") or ()), record["call"]


def test_numbers_are_those_of_forecasts(house: Server) -> None:
    """Series end to end, a window of a backtest and a cut horizon give what `/v1/forecasts` gives for each."""
    y = [[50.0 + i % 24 + at for i in range(72)] for at in range(2)]
    requests = [{"target_model": PLAIN, "start": "2026-01-01 00:00:00", "target": target} for target in (*y, y[0][:48])]
    configuration = {"output_types": ["mean", "quantiles"], "quantiles": ["0.1", "0.9"]}
    made = house.http.post(
        f"{house.url}/v1/forecasts", json={"requests": requests, "configuration": configuration}
    ).json()["predictions"]
    series = {"y": [*y[0], *y[1]], "sizes": [72, 72], "start_datetime": ["2026-01-01", "2026-01-01T00:00"]}
    status, found = ask(house, PLAIN, h=10, level=[80], series=series)
    assert status == 200, found
    assert found["mean"] == pytest.approx([*made[0]["mean"][:10], *made[1]["mean"][:10]], rel=1e-5)
    low = [*made[0]["quantiles"]["0.1"][:10], *made[1]["quantiles"]["0.1"][:10]]
    assert found["intervals"]["lo-80"] == pytest.approx(low, rel=1e-5)
    status, found = ask(house, PLAIN, "/v2/cross_validation", h=24, series={"y": y[0], "sizes": [72]}, n_windows=1)
    assert status == 200, found
    assert found["mean"] == pytest.approx(made[2]["mean"], rel=1e-5)
    assert found["idxs"] == list(range(48, 72))


def test_a_model_of_two_products_takes_two_series(house: Server) -> None:
    """With multivariate they are one instance, and the answer has both, one after the other."""
    y = [50.0 + i % 24 for i in range(96)]
    series = {"y": y, "sizes": [48, 48]}
    status, found = ask(house, PAIR, h=24, series=series, multivariate=True)
    assert (status, len(found["mean"])) == (200, 48), found
    status, found = ask(house, PAIR, h=24, series=series)
    assert (status, "multivariate=True" in found["detail"]) == (400, True), found


def test_a_correlation_archive_gives_each_series_to_its_product(house: Server) -> None:
    """Series go to the models that it names, in its order; a backtest has a window of each."""
    y = [50.0 + i % 24 for i in range(48)]
    means = [ask(house, name, h=24, series={"y": y, "sizes": [48]})[1]["mean"] for name in (OTHER, PLAIN)]
    assert means[0] != means[1]
    status, found = ask(house, JOINT, h=24, level=[80], series={"y": y * 2, "sizes": [48, 48]})
    assert status == 200, found
    assert found["mean"] == pytest.approx([*means[0], *means[1]], rel=1e-5)
    assert len(found["intervals"]["lo-80"]) == 48
    longer = [50.0 + i % 24 for i in range(72)]
    series = {"y": longer * 2, "sizes": [72, 72]}
    status, found = ask(house, JOINT, "/v2/cross_validation", h=24, series=series, n_windows=1)
    assert (status, found["sizes"]) == (200, [24, 24]), found
    detail = house.http.get(f"{house.url}/model_params", params={"model": JOINT, "freq": "h"}).json()["detail"]
    assert detail == {"input_size": HISTORY, "horizon": HORIZON}


def test_series_that_do_not_fit_a_correlation_are_refused(house: Server) -> None:
    """The message says how many series are taken, and why models cannot be asked together."""
    series = {"y": [50.0] * 48, "sizes": [48]}
    status, found = ask(house, JOINT, h=24, series=series)
    assert (status, f"takes 2 series, of {OTHER}, {PLAIN} in this order, not 1" in found["detail"]) == (400, True), (
        found
    )
    status, found = ask(house, "odd.mar", h=24, series={"y": [50.0] * 96, "sizes": [48, 48]})
    assert (status, "has other covariates than" in found["detail"]) == (400, True), found


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        ({"h": 25}, 400, "h: the model forecasts 24 steps, not 25"),
        ({"h": 0}, 400, "at least 1 step"),
        ({"freq": "D"}, 400, "freq: the model forecasts in steps of 1h, not 'D'"),
        ({"series": {"y": [1.0] * 40, "sizes": [40]}}, 400, "series 0"),
        ({"series": {"y": [1.0] * 40, "sizes": [41]}}, 400, "series.sizes: the sizes are 41 together"),
        ({"series": {"y": [1.0] * 48, "sizes": [48], "X": [[1.0] * 48], "X_future": [[1.0] * 24]}}, 400, "series.X"),
        ({"series": {"y": ["a"], "sizes": [1]}}, 400, "series.y[0]: expected a number or null, not text"),
        ({"level": [100]}, 400, "level"),
        ({"levels": [80]}, 400, "levels: there is no such key; did you mean level?"),
        ({"series": {"y": [1.0] * 48, "sizes": [48], "start_datetimes": []}}, 400, "series.start_datetimes: there is"),
        ({"finetune_steps": 3}, 501, "not trained"),
        ({"finetuned_model_id": "x"}, 501, "not trained"),
        ({"model_parameters": {"seeds": 1}}, 400, "seeds"),
        ({"model": "a/../b"}, 400, "model"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(house: Server, wrong: dict[str, Any], status: int, words: str) -> None:
    """`detail` is one sentence that names the series and the field: the client's user sees nothing else."""
    body = {"h": 24, "series": {"y": [1.0] * 48, "sizes": [48]}, **wrong}
    found = ask(house, body.pop("model", PLAIN), **body)
    assert found[0] == status, found
    assert words in found[1]["detail"], found


def test_the_time_of_an_old_clients_series_can_be_said(house: Server) -> None:
    """Clients before 0.9 send no times: a model that needs one says so, and takes it from `model_parameters`."""
    series = {"y": [50.0] * 48, "sizes": [48], "X": [[1.0] * 48], "X_future": [[1.0] * 24]}
    status, found = ask(house, DEMAND, h=24, series=series)
    assert (status, "upgrade" in found["detail"]) == (400, True), found
    status, found = ask(house, DEMAND, h=24, series=series, model_parameters={"start": "2026-01-01"})
    assert (status, len(found["mean"])) == (200, 24), found


def draw(house: Server, model: str, count: int, **more: Any) -> tuple[int, Any]:
    """The answer of a simulation of so many equal series, fetched by its job's number, or its refusal."""
    series = {"y": [50.0 + i % 24 for i in range(HISTORY)] * count, "sizes": [HISTORY] * count}
    series["start_datetime"] = ["2026-01-01T00:00:00"] * count
    status, found = ask(house, model, "/v2/simulate/async", **{"h": HORIZON, "n_paths": 8, "series": series, **more})
    if status != 202:
        return status, found
    answer = house.http.get(f"{house.url}/v2/simulate/jobs/{found['job_id']}")
    return answer.status_code, answer.json()["result"]


def test_paths_are_those_of_forecasts_samples(house: Server) -> None:
    """Scenario s of `/v1/forecasts` is path s here, whatever is asked of whom; the horizon cuts it."""
    y = [50.0 + i % 24 for i in range(HISTORY)]
    requests = [{"target_model": name, "start": "2026-01-01 00:00:00", "target": y} for name in (OTHER, PLAIN)]
    configuration = {"joint": True, "correlation": JOINT, "num_samples": 8, "seed": 3, "output_types": ["samples"]}
    told = house.http.post(f"{house.url}/v1/forecasts", json={"requests": requests, "configuration": configuration})
    samples = np.array([each["samples"] for each in told.json()["predictions"]])  # [series, path, step]
    status, found = draw(house, JOINT, 2, seed=3, h=10)
    assert (status, found["sizes"], found["coupled"]) == (200, [10, 10], True), found
    np.testing.assert_allclose(np.array(found["samples"]).reshape(8, 2, 10), samples.swapaxes(0, 1)[..., :10])


def test_series_drawn_apart_have_noise_of_their_own(house: Server) -> None:
    """Equal series of one seed get different paths, and the same again in the next call."""
    status, found = draw(house, PATHS, 2, seed=3)
    assert (status, found["coupled"]) == (200, False), found
    paths = np.array(found["samples"]).reshape(8, 2, HORIZON)
    assert not np.allclose(paths[:, 0], paths[:, 1])
    assert draw(house, PATHS, 2, seed=3)[1] == found
    status, found = draw(house, PATHS, 1, n_paths=17)
    assert (status, "n_paths: the network of au/paths.mar draws 16 paths" in found["detail"]) == (400, True), found
    status, found = draw(house, DEMAND, 1, n_paths=1)
    assert (status, "exogenous columns" in found["detail"]) == (400, True), found
    status, found = draw(house, PLAIN, 1)
    assert (status, "--architecture deepar" in found["detail"]) == (501, True), found


def test_a_correlations_members_may_be_products(house: Server) -> None:
    """Series come in the order of the members, and a model of two products gets both of its own."""
    y = [[50.0 + (i + at) % 24 for i in range(HISTORY)] for at in range(3)]
    pair = ask(house, PAIR, h=24, series={"y": [*y[2], *y[0]], "sizes": [HISTORY] * 2}, multivariate=True)[1]["mean"]
    plain = ask(house, PLAIN, h=24, series={"y": y[1], "sizes": [HISTORY]})[1]["mean"]
    status, found = ask(house, MIXED, h=24, series={"y": [*y[0], *y[1], *y[2]], "sizes": [HISTORY] * 3})
    assert status == 200, found
    assert found["mean"] == pytest.approx([*pair[HORIZON:], *plain, *pair[:HORIZON]], rel=1e-5)
    status, found = draw(house, MIXED, 3, seed=1)
    assert (status, len(found["samples"]), found["coupled"]) == (200, 8 * 3 * HORIZON, True), found
    longer = {"y": [*range(72)] * 3, "sizes": [72] * 3}
    status, found = ask(house, MIXED, "/v2/cross_validation", h=24, series=longer, n_windows=1)
    assert (status, found["sizes"], found["idxs"][::24]) == (200, [24] * 3, [48, 120, 192]), found
    status, found = ask(house, "half.mar", h=24, series={"y": y[0] * 2, "sizes": [HISTORY] * 2})
    assert (status, f"but {PAIR} forecasts {PAIR}#product0, {PAIR}#product1 together" in found["detail"]) == (400, True)


def test_a_job_is_its_clients_for_a_while(house: Server) -> None:
    """Any front has its answer, until it is cancelled; other numbers are 404, and a wrong call is refused at once."""
    body: dict[str, Any] = {"h": 24, "series": {"y": [1.0] * 48, "sizes": [48]}}
    status, found = ask(house, PLAIN, "/v2/forecast/async", **body)
    assert status == 202, found
    url, cancel = (f"{house.url}/v2/{path}" for path in (f"forecast/jobs/{found['job_id']}", "async/jobs/{}/cancel"))
    cancel = cancel.format(found["job_id"])
    told = {httpx.get(url, trust_env=False).text for _ in range(8)}  # each by a connection of its own
    assert len(told) == 1
    assert json.loads(told.pop())["result"]["mean"] == ask(house, PLAIN, **body)[1]["mean"]
    assert house.http.post(cancel).json()["status"] == "cancelled"
    assert [house.http.post(cancel).status_code, house.http.get(url).status_code] == [404, 404]
    assert house.http.get(f"{house.url}/v2/forecast/jobs/none").status_code == 404
    assert ask(house, PLAIN, "/v2/forecast/async", h=25, series=body["series"])[0] == 400


def test_a_base_url_may_have_a_path_and_other_paths_are_refused(house: Server) -> None:
    """`/nixtla` before a path is kept by the client and taken here; training and weights are 501 with the reason."""
    assert house.http.get(f"{house.url}/nixtla/validate_api_key").json()["detail"]
    assert house.http.get(f"{house.url}/nixtla/v2/models").status_code == 200
    refused = {"finetune": "fleetcast train", "finetune/async": "fleetcast train", "explain/async": "not computed"}
    refused |= {"simulate": "/v2/simulate/async", "online_anomaly_detection/async": "jobs of simulate, forecast"}
    for path, words in refused.items():
        answer = house.http.post(f"{house.url}/v2/{path}", content=b"{}")
        assert (answer.status_code, words in answer.json()["detail"]) == (501, True), path
    assert house.http.get(f"{house.url}/v2/forecast").status_code == 405
