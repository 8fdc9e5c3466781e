"""TorchServe's API on a real server: registering, scaling, versions, archives of every kind, deaths, and metrics."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from botocore.exceptions import EventStreamError

from tests.e2e.models import FORECAST_TCN, pack_forecaster
from tests.e2e.server import Server, run_server
from tests.patience import wait_until
from tests.s3 import S3Server
from tests.server.worker.sandbox.code_archives import is_alive, pack_code

pytestmark = pytest.mark.e2e

HANDLER = """
def handle(data, context):
    if data is None:
        return None
    if data[0].get("body") == "wait":
        import time
        time.sleep(6)
    if context.get_request_header(0, "describe"):
        return [{"by": "the handler"}]
    if data[0].get("body") == "count":
        return [str(len(data)) for _ in data]
    return [f"version {VERSION}" for _ in data]
"""
#: Says its process and folder; `wait`: once the folder has a file `go`.
WAITER = """
import os, time
def handle(data, context):
    if data is None:
        return None
    home = os.environ["HOME"]
    while data[0].get("body") == "wait" and not os.path.exists(home + "/go"):
        time.sleep(0.01)
    return [{"pid": os.getpid(), "home": home}]
"""
WARM = 30  #: requests in a row, after which a front asks a child itself
AT_START = ["url=code/start.mar&model_name=first&initial_workers=1", "url=code/nowhere.mar"]
#: Measures as TorchServe's documentation shows it, and prints what looks like one of TorchServe's lines of metrics.
MEASURING = """
class Dimension:
    def __init__(self, name, value):
        self.name, self.value = name, value

def handle(data, context):
    if data is None:
        return None
    print("[METRICS]Forged.Count:7|#ModelName:measured,Level:Model|#type:COUNTER|#hostname:h,1700000000", flush=True)
    metrics = context.metrics
    metrics.add_counter("Asked", len(data), None, [Dimension("Kind", "text"), Dimension("ModelName", "someone else")])
    metrics.add_time("HandlerTime", 1.5, None, "ms")
    metrics.add_metric("fleetcast_loaded_models", 1e6, "count")
    for i in range(200):
        metrics.add_size("Sized", i, None, "MB", [Dimension("Part", str(i))])
    return ["ok" for _ in data]
"""
#: Answers in parts, the second once its folder has a file `go`.
PARTS = """
import os, time
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    asked = data[0].get("body")
    context.set_response_content_type(0, "text/event-stream")
    context.set_response_header(0, "X-Made-By", "parts")
    send = lambda text: send_intermediate_predict_response([text], context.request_ids, "", 200, context)
    send(os.environ["HOME"] + ";")
    while asked == "wait" and not os.path.exists(os.environ["HOME"] + "/go"):
        time.sleep(0.01)
    if asked == "fail":
        raise ValueError("half way")
    send("x" * (1000000 if asked == "large" else 1))
    return ["end"]
"""
SMALL, FORECASTER = (
    pack_forecaster("au/small.mar", 0),
    pack_forecaster("au/NSW1.mar", 1, config=FORECAST_TCN, forecast=True),
)


@pytest.fixture(scope="module")
def server(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One worker, over code archives that work and one that does not, and two forecasters."""
    folder = tmp_path_factory.mktemp("torchserve-api")
    archives = {
        "code/one.mar": pack_code("VERSION = 1\n" + HANDLER),
        "code/start.mar": pack_code("VERSION = 0\n" + HANDLER),
        "code/two.mar": pack_code("VERSION = 2\n" + HANDLER),
        "code/waits.mar": pack_code(WAITER),
        "code/measured.mar": pack_code(MEASURING),
        "code/parts.mar": pack_code(PARTS),
        "code/broken.mar": pack_code("import nosuch"),
        "code/no-archive.mar": b"no archive",
        **{model.name: model.data for model in (SMALL, FORECASTER)},
    }
    for name, data in archives.items():
        path: Path = folder / "store" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with run_server(s3, folder, str(folder / "store"), allow_code=["code/"], register_models=AT_START) as running:
        yield running


def manage(server: Server, method: str, path: str, **query: Any) -> httpx.Response:
    """A call of the management API."""
    return server.http.request(method, f"{server.addresses['management']}/models{path}", params=query)


def predict(server: Server, path: str, body: bytes = b"{}") -> httpx.Response:
    """A prediction."""
    url, headers = f"{server.url}/predictions/{path}", {"Content-Type": "application/json"}
    return server.http.post(url, content=body, headers=headers)


def test_what_the_settings_name_is_registered_from_the_start(server: Server) -> None:
    """It answers by its name, and is listed; what is not there is in the log."""
    assert predict(server, "first/1.0").text == "version 0"
    (described,) = manage(server, "GET", "/first").json()
    assert (described["loadedAtStartup"], described["minWorkers"]) == (True, 1)
    wait_until(lambda: "not_registered_at_start" in server.said(), "the log says what was not there")
    assert manage(server, "DELETE", "/first").status_code == 200


def test_versions_from_registration_to_removal(server: Server) -> None:
    """Two versions of a name with a slash: which answers, with and without workers; memory and series go with them."""
    for key, version in (("one", "1.0"), ("two", "2.0")):
        query = {"url": f"code/{key}.mar", "model_name": "team/m", "model_version": version}
        registered = manage(server, "POST", "", **query, initial_workers="1", synchronous="true")
        assert registered.json()["status"] == f'Model "team/m" Version: {version} registered with 1 initial workers'
    assert {"code/one.mar", "code/two.mar"} <= server.resident()
    assert [predict(server, path).text for path in ("team/m", "team/m/2.0", "team%2Fm%2F1.0")] == [
        "version 1", "version 2", "version 1"
    ]  # fmt: skip
    assert manage(server, "PUT", "/team/m/2.0/set-default").status_code == 200
    assert predict(server, "team/m").text == "version 2"
    wait_until(lambda: '"verb": "/models/team/m/2.0/set-default"' in server.said(), "it is in the audit log")
    assert server.total("ts_inference_requests_total", model_name="team/m") == 4
    assert "MemoryUtilization" in server.exposition()
    assert manage(server, "PUT", "/team/m/1.0", min_worker="0", synchronous="true").status_code == 200
    assert "code/one.mar" not in server.resident()
    idle = predict(server, "team/m/1.0")
    assert (idle.status_code, "no worker" in idle.json()["message"]) == (503, True)
    scaled = manage(server, "PUT", "/team/m/1.0", min_worker="2", synchronous="true").json()
    assert scaled["status"] == "Workers scaled to 2 for model: team/m, version: 1.0"
    assert predict(server, "team/m/1.0").text == "version 1"
    assert manage(server, "DELETE", "/team/m").status_code == 403
    assert manage(server, "DELETE", "/team/m/1.0").status_code == 200
    assert manage(server, "DELETE", "/team/m").status_code == 200
    assert not {"code/one.mar", "code/two.mar"} & server.resident()
    assert server.total("ts_inference_requests_total", model_name="team/m") == 0
    assert "team/m" not in manage(server, "GET", "").text


def test_what_handlers_measure_is_shown_while_their_model_is_in_memory(server: Server) -> None:
    """Under its own name and the archive's, bounded; a printed line makes no metric, and no name of ours is taken."""
    for _ in range(WARM):
        assert predict(server, "code/measured").text == "ok"
    assert server.total("Asked", ModelName="code/measured", Kind="text", Level="Model") == WARM
    assert server.total("HandlerTime", ModelName="code/measured", Level="Model") == 1.5
    shown = server.exposition()
    for each in ("QueueTime{", "WorkerThreadTime{", "WorkerLoadTime{", 'ModelName="code/measured"', "PredictionTime{"):
        assert each in shown
    assert 0 < sum(line.startswith("Sized{") for line in shown.splitlines()) <= 50
    assert "Forged" not in shown
    assert "someone else" not in shown
    assert server.total("fleetcast_loaded_models") < 1000
    manage(server, "POST", "", url="code/measured.mar", model_name="gone", initial_workers="1", synchronous="true")
    assert manage(server, "DELETE", "/gone").status_code == 200
    assert "code/measured" not in server.exposition()


def ask_parts(server: Server, asked: str) -> httpx.Request:
    """A request to the archive that answers in parts."""
    headers = {"Content-Type": "application/json"}
    return server.http.build_request(
        "POST", f"{server.url}/predictions/code/parts", content=f'"{asked}"'.encode(), headers=headers
    )


def test_an_answer_in_parts_arrives_while_it_is_made(server: Server) -> None:
    """The first part is there while the handler waits, with the handler's headers. All of a large part comes."""
    pytest.importorskip("ts")
    for _ in range(WARM):
        assert server.http.send(ask_parts(server, "now")).text.endswith(";xend")
    answer = server.http.send(ask_parts(server, "wait"), stream=True)
    parts = answer.iter_raw()
    home = next(parts).decode().removesuffix(";")
    assert answer.headers["content-type"] == "text/event-stream"
    assert (answer.headers["x-made-by"], answer.headers["transfer-encoding"]) == ("parts", "chunked")
    (Path(home) / "go").write_text("")
    assert b"".join(parts) == b"xend"
    answer.close()
    large = server.http.send(ask_parts(server, "large"))
    assert large.text.endswith("x" * 1000000 + "end")
    assert server.http.send(ask_parts(server, "now")).text == f"{home};xend"


def test_a_response_stream_has_a_frame_for_each_part(server: Server) -> None:
    """boto3 reads the first while the handler waits, and raises what fails behind it."""
    pytest.importorskip("ts")
    client = server.client()
    wanted = {"EndpointName": "f", "InferenceComponentName": "code/parts.mar", "ContentType": "application/json"}
    answer = client.invoke_endpoint_with_response_stream(Body=b'"wait"', **wanted)
    events = iter(answer["Body"])
    home = next(events)["PayloadPart"]["Bytes"].decode().removesuffix(";")
    assert answer["ContentType"] == "text/event-stream"
    assert answer["ResponseMetadata"]["HTTPHeaders"]["x-made-by"] == "parts"
    (Path(home) / "go").write_text("")
    assert b"".join(event["PayloadPart"]["Bytes"] for event in events) == b"xend"
    with closing(client.invoke_endpoint_with_response_stream(Body=b'"fail"', **wanted)["Body"]) as failing:
        events = iter(failing)
        assert next(events)["PayloadPart"]
        with pytest.raises(EventStreamError, match="ModelStreamError"):
            next(events)
    client.close()


def test_half_of_an_answer_in_parts_is_no_answer(server: Server) -> None:
    """What fails behind the first part cuts the connection. Who leaves, or asks in another protocol, breaks nothing."""
    pytest.importorskip("ts")
    with pytest.raises(httpx.RemoteProtocolError):
        server.http.send(ask_parts(server, "fail"))
    left = server.http.send(ask_parts(server, "large"), stream=True)
    next(left.iter_raw())
    left.close()
    headers = {"Content-Type": "application/json", "X-Amzn-SageMaker-Target-Model": "code/parts.mar"}
    joined = server.http.post(f"{server.url}/invocations", content=b'"now"', headers=headers)
    assert (joined.status_code, joined.text.endswith(";xend")) == (200, True)
    wait_until(lambda: count_leases(server, "code/parts.mar") == 0, "nothing is under way")


def list_pids(server: Server) -> list[int]:
    """The processes of the model `waits`, as TorchServe's clients see them."""
    (described,) = manage(server, "GET", "/waits").json()
    assert len({row["id"] for row in described["workers"]}) == len(described["workers"])
    assert all(row["memoryUsage"] > 0 for row in described["workers"])
    return [row["pid"] for row in described["workers"]]


def count_leases(server: Server, model: str) -> int:
    """How many requests for it are under way."""
    return sum(holder["leases"] for holder in server.models()[model]["holders"])


def test_scaled_code_answers_in_several_processes(server: Server) -> None:
    """One that waits for a file does not block the next, which another process answers; all go with the model."""
    manage(server, "POST", "", url="code/waits.mar", model_name="waits", initial_workers="1", synchronous="true")
    first = predict(server, "waits").json()
    assert list_pids(server) == [first["pid"]]
    scaled = manage(server, "PUT", "/waits", min_worker="2", synchronous="true").json()
    assert scaled["status"] == "Workers scaled to 2 for model: waits"
    pids = list_pids(server)
    assert (len(pids), pids[0]) == (2, first["pid"])
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(predict, server, "waits", b'"wait"')
        wait_until(lambda: count_leases(server, "code/waits.mar") == 1, "the worker has it")
        assert predict(server, "waits").json()["pid"] == pids[1]
        assert not slow.done()
        (Path(first["home"]) / "go").write_text("")
        assert slow.result().json() == first
    most = manage(server, "PUT", "/waits", min_worker="9", synchronous="true").json()["status"]
    assert most == "Workers scaled to 9 for model: waits; 4 of them run, as many as an archive may have (code_replicas)"
    pids = list_pids(server)
    assert len(pids) == 4
    manage(server, "PUT", "/waits", min_worker="1", synchronous="true")
    (left,) = list_pids(server)
    assert [pid for pid in pids if is_alive(pid)] == [left]
    manage(server, "PUT", "/waits", min_worker="2", synchronous="true")
    pids = list_pids(server)
    assert manage(server, "DELETE", "/waits").status_code == 200
    assert (len(pids), any(map(is_alive, pids)), Path(first["home"]).exists()) == (2, False, False)


@pytest.mark.parametrize("wait", ["true", "false"])
def test_failed_load_leaves_nothing_registered(server: Server, wait: str) -> None:
    """Neither a load that is waited for nor one in the background."""
    refused = manage(server, "POST", "", url="code/broken.mar", model_name="b", initial_workers="1", synchronous=wait)
    assert refused.status_code == (500 if wait == "true" else 202)
    if wait == "true":
        assert "nosuch" in refused.json()["message"]
    wait_until(lambda: manage(server, "GET", "/b").status_code == 404, "nothing is registered")
    unreadable = manage(server, "POST", "", url="code/no-archive.mar")
    assert (unreadable.status_code, unreadable.json()["type"]) == (400, "InvalidModelException")


def test_archives_without_code_answer_too(server: Server) -> None:
    """A forecaster by its key, with and without `.mar`, by a registered name, and by KServe's path."""
    question = SMALL.question(1)
    for path in ("au/small", "au/small.mar"):
        question.check(predict(server, path, question.body).content)
    assert manage(server, "POST", "", url="au/small.mar", model_name="prices", initial_workers="1").status_code == 202
    wait_until(lambda: manage(server, "GET", "/prices").json()[0]["workers"][0]["status"] == "READY", "it is loaded")
    question.check(predict(server, "prices/1.0", question.body).content)
    body = FORECASTER.question(2).body
    forecast = server.http.post(f"{server.url}/v1/models/au/NSW1:predict", content=body)
    FORECASTER.question(2).check(forecast.content)
    wrong = predict(server, "prices", b"{}")
    assert (wrong.status_code, wrong.json()["type"]) == (400, "BadRequestException")
    described = manage(server, "GET", "/prices", customized="true")
    assert (described.status_code, "customizedMetadata" in described.text) == (200, False), "it has no code to ask"
    assert manage(server, "DELETE", "/prices").status_code == 200


def test_registrations_outlive_a_front_and_a_worker(server: Server) -> None:
    """A front that starts is told the table; a worker that starts loads what is asked for."""
    manage(server, "POST", "", url="code/one.mar", model_name="stays", initial_workers="1", synchronous="true")
    assert predict(server, "stays").text == "version 1"
    for kind in ("worker", "front"):
        (before,) = server.processes(kind)
        os.kill(before["pid"], signal.SIGKILL)
        wait_until(partial(is_replaced, server, kind, before["pid"]), f"the {kind} is replaced")
        wait_until(lambda: is_answered(server), "the registered model answers")
    assert manage(server, "DELETE", "/stays").status_code == 200


def is_replaced(server: Server, kind: str, pid: int) -> bool:
    """Whether another process has taken the place of this one."""
    return all(row["pid"] not in (None, pid) for row in server.processes(kind))


def is_answered(server: Server) -> bool:
    """Whether the registered model answers."""
    try:
        return predict(server, "stays").text == "version 1"
    except httpx.TransportError:
        return False


def test_batching_of_a_registration(server: Server) -> None:
    """It goes before what the archive says, also where that is loaded already."""
    assert predict(server, "code/one.mar", b'"count"').text == "1"
    query = {"url": "code/one.mar", "model_name": "batched", "batch_size": "2", "max_batch_delay": "60000"}
    assert manage(server, "POST", "", **query, initial_workers="1", synchronous="true").status_code == 200
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: predict(server, "batched", b'"count"').text, range(2)))
    assert answers == ["2", "2"]
    assert manage(server, "GET", "/batched").json()[0]["batchSize"] == 2
    assert manage(server, "DELETE", "/batched").status_code == 200
    assert predict(server, "code/one.mar", b'"count"').text == "1"


def test_response_timeout_of_a_registration(server: Server) -> None:
    """It ends a request before the server's own limits would, as a worker that died."""
    query = {"url": "code/two.mar", "model_name": "slow", "response_timeout": "1", "initial_workers": "1"}
    manage(server, "POST", "", **query, synchronous="true")
    late = predict(server, "slow", b'"wait"')
    assert (late.status_code, late.json()["message"].startswith("Worker died")) == (500, True)
    described = manage(server, "GET", "/slow", customized="true").json()
    assert described[0]["customizedMetadata"] == {"by": "the handler"}, "it waits for its turn"
    assert manage(server, "DELETE", "/slow").status_code == 200
