"""Many models in one call, against real processes: `POST /v1/forecasts`."""

import io
import json
import os
import re
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.conftest import Serve
from tests.e2e.models import Model, pack_forecaster
from tests.e2e.server import Server, run_server, upload
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

TCN = {"features": 1, "context_length": 20, "prediction_length": 6, "quantiles": 3, "channels": 4, "layers": 2}
ARROW, NPY = "application/vnd.apache.arrow.stream", "application/x-npy"
CONFIGURATION = {"output_types": ["quantiles"]}


@pytest.fixture(scope="module")
def one_worker(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server of one worker, and its bucket; each test has models of its own."""
    bucket = s3.bucket()
    folder = tmp_path_factory.mktemp("many")
    with run_server(s3, folder, f"s3://{bucket}", workers=1, max_forecasts_bytes=100_000) as server:
        yield server, bucket


def make_models(count: int, market: str = "au") -> list[Model]:
    """Forecasters that are asked by DeepAR JSON."""
    return [pack_forecaster(f"{market}/m{i}.mar", i, config=TCN, forecast=True) for i in range(count)]


def count_answered(server: Server, code: str) -> float:
    """How many items of calls have been answered so."""
    return server.total("fleetcast_inference_requests_total", protocol="forecasts", code=code)


def make_item(model: Model, seed: int = 1) -> dict[str, Any]:
    """A model's part of a call."""
    (instance,) = json.loads(model.question(seed).body)["instances"]
    return {"target_model": model.name, **instance}


def call(server: Server, items: Sequence[object], headers: Mapping[str, str] | None = None) -> httpx.Response:
    """The call as a client sends it."""
    body = {"requests": items, "configuration": CONFIGURATION}
    return httpx.post(f"{server.url}/v1/forecasts", json=body, headers=headers, timeout=PATIENCE_S)


def test_a_tick_in_one_call(s3: S3Server, store: str, serve: Serve) -> None:
    """A hundred models over three workers, some twice: in order, right, and to the last digit what a call of its own
    gives; the cache counts per item, and a second call finds all of them.
    """
    fleet = make_models(100)
    upload(s3, store, fleet)
    asked = [*fleet, *fleet[:10]]
    with serve(workers=3, fronts=2) as server:
        before = server.total("fleetcast_model_cache_requests_total")
        reply = call(server, [make_item(model, seed) for seed, model in enumerate(asked)])
        assert reply.status_code == 200
        answer = reply.json()
        assert answer["failed"] == 0
        for seed, (model, prediction) in enumerate(zip(asked, answer["predictions"], strict=True)):
            question = model.question(seed)
            single = server.ask(question)
            assert json.loads(single.body)["predictions"] == [prediction]
            question.check(json.dumps({"predictions": [prediction]}).encode())
        counted = dict(part.split("=") for part in reply.headers["x-fleetcast-cache"].split(", "))
        assert sum(map(int, counted.values())) == 110
        assert int(counted["miss"]) == 100
        assert server.total("fleetcast_model_cache_requests_total") == before + 220
        assert count_answered(server, "200") == 110
        again = call(server, [make_item(model) for model in fleet])
        assert again.headers["x-fleetcast-cache"] == "hit=100"
        assert "inference;dur=" in again.headers["server-timing"]


def test_an_item_that_fails_fails_alone(s3: S3Server, one_worker: tuple[Server, str]) -> None:
    """No such model, a broken archive, too short a history, no model named: errors in their places."""
    server, bucket = one_worker
    good = make_models(1, "fails")[0]
    upload(s3, bucket, [good])
    s3.put(bucket, "broken.mar", b"no archive")
    short = {**make_item(good), "target": [1.0, 2.0]}
    items = [
        make_item(good),
        {**make_item(good), "target_model": "none.mar"},
        {**make_item(good), "target_model": "broken.mar"},
    ]
    items += [short, {"start": "2026-01-01"}, make_item(good)]
    refused, failed = count_answered(server, "400"), count_answered(server, "424")
    reply = call(server, items, {"X-Request-Id": "tick-7"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (200, "tick-7")
    answer = reply.json()
    assert answer["failed"] == 4
    first, missing, broken, history, nameless, last = answer["predictions"]
    assert first == last
    assert missing["error"]["code"] == "not_found"
    assert broken["error"]["code"] == "archive_failed"
    assert history["error"]["code"] == "bad_request"
    assert "2" in history["error"]["message"]
    assert nameless["error"]["field"] == "target_model"
    assert count_answered(server, "400") == refused + 3
    assert count_answered(server, "424") == failed + 1


def test_limits_and_bad_calls(s3: S3Server, one_worker: tuple[Server, str]) -> None:
    """A body that is no call, too large a one, a GET, a passed deadline: errors in one shape, and the server goes on.

    Neither answers nor errors carry headers of SageMaker's.
    """
    server, bucket = one_worker
    fleet = make_models(2, "limits")
    upload(s3, bucket, fleet)
    url = f"{server.url}/v1/forecasts"
    got = httpx.get(url)
    assert (got.status_code, got.json()["error"]["code"]) == (405, "bad_method")
    bad = httpx.post(url, content=b'{"requests": 1}')
    assert (bad.status_code, set(bad.json())) == (400, {"error"})
    assert bad.json()["error"]["code"] == "bad_request"
    assert bad.json()["error"]["message"].startswith("requests: expected a list")
    large = httpx.post(url, content=b" " * 100_001)
    assert (large.status_code, "max_forecasts_bytes" in large.json()["error"]["message"]) == (413, True)
    good = call(server, [make_item(fleet[0])])
    for reply in (got, bad, large, good):
        assert not [name for name in reply.headers if name.startswith("x-am")]
        assert reply.headers["x-request-id"]
    with s3.hold("limits/m1.mar"):
        late = call(server, [make_item(model) for model in fleet], {"X-Request-Timeout-Ms": "6000"}).json()
    assert late["failed"] == 1
    assert late["predictions"][1]["error"]["code"] == "deadline"
    many = [make_item(fleet[0])] * 300  # 300 answers of some hundred bytes are below the limit, samples are not
    body = {"requests": many, "configuration": {"output_types": ["samples"], "num_samples": 100}}
    answers = httpx.post(url, json=body, timeout=PATIENCE_S)
    assert (answers.status_code, "answers" in answers.json()["error"]["message"]) == (413, True)
    wait_until(lambda: call(server, [make_item(fleet[0])]).json()["failed"] == 0, "it goes on")


def test_a_client_that_leaves_is_not_worked_for(s3: S3Server, one_worker: tuple[Server, str]) -> None:
    """Its items are cancelled: they are counted as the client's going, and nothing is kept."""
    server, bucket = one_worker
    fleet = make_models(20, "leaves")
    upload(s3, bucket, fleet)
    gone, good = count_answered(server, "499"), count_answered(server, "200")
    asked = partial(server.total, "fleetcast_model_cache_requests_total")
    before = asked()
    body = json.dumps({"requests": [make_item(model) for model in fleet]}).encode()
    with s3.hold("leaves/", 20):
        with socket.create_connection(server.address) as client:
            head = f"POST /v1/forecasts HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            wait_until(lambda: asked() > before, "the first load has begun")
        wait_until(lambda: count_answered(server, "499") == gone + 1, "the client is seen to have gone")
    assert count_answered(server, "200") == good


def test_a_worker_that_dies_costs_no_item(s3: S3Server, store: str, serve: Serve) -> None:
    """SIGKILL while a call is under way: its items are asked of another worker, and all are answered."""
    fleet = make_models(40)
    upload(s3, store, fleet)
    with serve(workers=2) as server, s3.hold("au/", 8) as loading:
        body = json.dumps({"requests": [make_item(model) for model in fleet], "configuration": CONFIGURATION}).encode()
        with socket.create_connection(server.address) as client:
            head = f"POST /v1/forecasts HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            asked = partial(server.total, "fleetcast_model_cache_requests_total")
            wait_until(lambda: all(asked(worker=str(i)) for i in range(2)), "both workers load")
            os.kill(server.processes("worker")[0]["pid"], signal.SIGKILL)
            loading.set()
            client.settimeout(PATIENCE_S)
            received = b"".join(iter(lambda: client.recv(65536), b""))
        answer = json.loads(received.partition(b"\r\n\r\n")[2])
        assert answer["failed"] == 0
        for model, prediction in zip(fleet, answer["predictions"], strict=True):
            model.question(1).check(json.dumps({"predictions": [prediction]}).encode())


def test_a_call_as_a_table(s3: S3Server, one_worker: tuple[Server, str]) -> None:
    """Thirty models by Arrow: the numbers of single calls, an error in its row, and each item is counted."""
    pa = pytest.importorskip("pyarrow")
    server, bucket = one_worker
    fleet = make_models(30, "table")
    upload(s3, bucket, fleet)
    items = [make_item(model, seed) for seed, model in enumerate(fleet)]
    items[7] = {**items[7], "target_model": "table/none.mar"}
    items[9] = {**items[9], "target": [1.0, 2.0]}
    columns = {"model": [each["target_model"] for each in items], "target": [each["target"] for each in items]}
    asked = pa.table({**columns, "start": [each["start"] for each in items]})
    asked = asked.replace_schema_metadata({"configuration": json.dumps(CONFIGURATION)})
    body = io.BytesIO()
    with pa.ipc.new_stream(body, asked.schema) as stream:
        stream.write_table(asked)
    before = count_answered(server, "200")
    reply = httpx.post(f"{server.url}/v1/forecasts", content=body.getvalue(), headers={"Content-Type": ARROW})
    assert (reply.status_code, reply.headers["content-type"]) == (200, ARROW), reply.text
    answer = pa.ipc.open_stream(reply.content).read_all()
    answer.validate(full=True)
    rows = answer.to_pylist()
    assert count_answered(server, "200") == before + 28
    for seed, model in enumerate(fleet):
        mine = [row for row in rows if row["item"] == seed]
        if seed in (7, 9):
            assert [(row["step"], row["error"].split(":")[0]) for row in mine] == [
                (None, "not_found" if seed == 7 else "bad_request")
            ]
            continue
        (single,) = json.loads(server.ask(model.question(seed)).body)["predictions"]
        assert {row["start"] for row in mine} == {single["start"]}
        for level, values in single["quantiles"].items():
            assert np.array_equal(np.array([row[level] for row in mine], np.float32), np.array(values, np.float32))
    wrong = httpx.post(f"{server.url}/v1/forecasts", content=b"no arrow", headers={"Content-Type": ARROW})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "bad_request")


def test_a_call_as_a_file_of_numpy(s3: S3Server, one_worker: tuple[Server, str]) -> None:
    """Thirty models as .npz and as .npy: the numbers of single calls, an error in its row; JSON may come or go too."""
    server, bucket = one_worker
    fleet = make_models(30, "npy")
    upload(s3, bucket, fleet)
    items = [make_item(model, 3) for model in fleet]
    names = [each["target_model"] for each in items]
    names[7] = "npy/none.mar"
    targets = np.array([each["target"] for each in items])
    body, url = io.BytesIO(), f"{server.url}/v1/forecasts"
    np.savez(body, model=names, target=targets, start=items[0]["start"], configuration=json.dumps(CONFIGURATION))
    before = count_answered(server, "200")
    reply = httpx.post(url, content=body.getvalue(), headers={"Content-Type": NPY})
    assert (reply.status_code, reply.headers["content-type"]) == (200, NPY), reply.text
    table = np.load(io.BytesIO(reply.content), allow_pickle=False)
    assert count_answered(server, "200") == before + 29
    for seed, model in enumerate(fleet):
        mine = table[table["item"] == seed]
        if seed == 7:
            assert (mine["step"].tolist(), mine["error"][0].split(":")[0]) == ([-1], "not_found")
            continue
        (single,) = json.loads(server.ask(model.question(3)).body)["predictions"]
        assert set(mine["start"].tolist()) == {np.datetime64(single["start"]).astype("M8[s]").item()}
        for level, values in single["quantiles"].items():
            assert np.array_equal(mine[level], np.array(values, np.float32))
    rows = np.zeros(30, [("model", "U20"), ("start", "M8[s]"), ("target", "f8", targets.shape[1:])])
    rows["model"], rows["start"], rows["target"] = names, items[0]["start"], targets
    file = io.BytesIO()
    np.save(file, rows)
    by_rows = httpx.post(url, content=file.getvalue(), headers={"Content-Type": NPY})
    again = np.load(io.BytesIO(by_rows.content), allow_pickle=False)
    for name in set(table.dtype.names or ()) - {"mean", "start"}:  # by its defaults a model answers its mean as well
        assert np.array_equal(again[name], table[name], equal_nan=name.startswith("0."))
    sent = [{**each, "target_model": name} for each, name in zip(items, names, strict=True)]
    from_json = call(server, sent, {"Accept": NPY})
    assert from_json.content == reply.content
    as_json = httpx.post(url, content=body.getvalue(), headers={"Content-Type": NPY, "Accept": "application/json"})
    assert as_json.json() == call(server, sent).json()


def test_files_of_numpy_that_are_no_call(one_worker: tuple[Server, str]) -> None:
    """Pickled objects, samples of all, a type that is nearly one: refused as a whole, with what to do."""
    server, _ = one_worker
    url, file, joint = f"{server.url}/v1/forecasts", io.BytesIO(), io.BytesIO()
    np.save(file, np.array([{"model": "a.mar"}]), allow_pickle=True)
    wrong = httpx.post(url, content=file.getvalue(), headers={"Content-Type": NPY})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "bad_request")
    assert "pickles are never read" in wrong.json()["error"]["message"]
    np.savez(joint, model=["a.mar"], target=np.ones((1, 9)), start="2026-01-01", configuration='{"joint": true}')
    refused = httpx.post(url, content=joint.getvalue(), headers={"Content-Type": NPY})
    assert (refused.status_code, refused.json()["error"]["field"]) == (400, "configuration.joint")
    near = httpx.post(url, content=joint.getvalue(), headers={"Content-Type": "application/x-npz"})
    assert (near.status_code, "x-npy" in near.json()["error"]["message"]) == (415, True)


def test_the_examples_of_the_page(
    s3: S3Server, one_worker: tuple[Server, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The programs of docs/tables.md run as they are written; by HTTP they print a first step for both models."""
    pytest.importorskip("pyarrow")
    server, bucket = one_worker
    upload(s3, bucket, [pack_forecaster(name, 1, config=TCN, forecast=True) for name in ("au/NSW1.mar", "au/VIC1.mar")])
    page = (Path(__file__).parents[2] / "docs/tables.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    told = list[str]()
    for program in programs:
        exec(compile(program.replace("http://127.0.0.1:8080", server.url), "docs/tables.md", "exec"), {})
        told.append(capsys.readouterr().out)
    by_arrow, of_columns, by_numpy, of_rows = told
    for each in (by_arrow, by_numpy):
        assert each.count("au/NSW1.mar") == each.count("au/VIC1.mar") == 1
    assert "error: [[null,null]]" in "".join(by_arrow.split()).replace("error:", "error: ")
    assert of_columns.count("au/NSW1.mar") == of_rows.count("au/NSW1.mar") == 2
