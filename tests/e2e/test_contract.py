"""The SageMaker runtime contract as boto3 and plain HTTP clients see it: errors, headers, bodies, deadlines, keys."""

import contextlib
import io
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from botocore.exceptions import ClientError

from tests.e2e.conftest import Serve
from tests.e2e.models import FORECAST_TCN, SMALL_TCN, Model, Question, onnx_model, pack_fleet, pack_forecaster
from tests.e2e.server import PROMTOOL, Server, invoke, lint, run_server, upload
from tests.patience import PATIENCE_S, repeat_in_stalls, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MIB = 1 << 20
WIDE = {"features": 100, "context_length": 12_000, "prediction_length": 4, "quantiles": 3, "hidden": 1}
LONG = {"features": 1, "context_length": 4, "prediction_length": 10_000, "quantiles": 20, "hidden": 2}
NPY = "application/x-npy"


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """One of each kind, by a short name."""
    return {
        "small": pack_forecaster("au/nsw1/energy.mar", 1, "tcn", SMALL_TCN),
        "forecast": pack_forecaster("au/nsw1/forecast.mar", 2, "tcn", FORECAST_TCN, forecast=True),
        "onnx": onnx_model("au/nsw1/dense.mar", 3),
        "wide": pack_forecaster("au/wide.mar", 4, "mlp", WIDE),
        "long": pack_forecaster("au/long.mar", 5, "mlp", LONG),
    }


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory, models: dict[str, Model]) -> Iterator[Server]:
    """A server with a model of each kind."""
    bucket = s3.bucket()
    upload(s3, bucket, list(models.values()))
    folder = tmp_path_factory.mktemp("contract")
    with run_server(s3, folder, f"s3://{bucket}", slab_bytes=8 * MIB, model_cache_bytes=64 * MIB) as server:
        yield server


def catch_error(client: Any, **arguments: Any) -> tuple[str, dict[str, Any]]:
    """The name of boto3's exception class and its response."""
    given = {"EndpointName": "fleet", "ContentType": "application/json", "Body": b"{}", **arguments}
    with pytest.raises(ClientError) as caught:
        client.invoke_endpoint(**given)
    return type(caught.value).__name__, caught.value.response


# --- what is answered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["small", "forecast", "onnx"])
def test_an_answer_says_what_happened(house: Server, models: dict[str, Model], kind: str) -> None:
    """Right numbers, and on every answer: content type, production variant, cache, version, times, request id."""
    answer = house.ask(models[kind].question(0))
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-amzn-invoked-production-variant"] == "AllTraffic"
    assert answer.cache in ("hit", "miss")
    assert answer.version
    assert "inference;dur=" in answer.headers["server-timing"]
    assert answer.headers["x-request-id"]


def test_any_endpoint_name_and_the_bare_path_are_served(house: Server, models: dict[str, Model]) -> None:
    """Endpoint names are free within SageMaker's rule; `/invocations` needs none; other paths are 404."""
    question = models["small"].question(1)
    for name in ("a", "prices-2026", "A" * 63):
        question.check(invoke(house.client(), question.model, question.body, EndpointName=name).body)
    headers = {"X-Amzn-SageMaker-Target-Model": question.model}
    question.check(house.http.post(f"{house.url}/invocations", content=question.body, headers=headers).content)
    for path in ("/endpoints//invocations", "/model", "/v3/models"):
        answer = house.http.post(f"{house.url}{path}", content=question.body, headers=headers)
        assert answer.status_code == 404
        assert path in answer.json()["message"]
    assert house.http.get(f"{house.url}/invocations", headers=headers).status_code == 405


def test_custom_attributes_and_request_ids_come_back(house: Server, models: dict[str, Model]) -> None:
    """On answers and on refusals alike; without one, each request gets an id of its own."""
    model = models["small"]
    question = model.question(2)
    reply = house.client().invoke_endpoint(
        EndpointName="fleet",
        TargetModel=question.model,
        ContentType="application/json",
        Body=question.body,
        CustomAttributes="trace=17,tenant=a",
    )
    assert reply["CustomAttributes"] == "trace=17,tenant=a"
    assert reply["InvokedProductionVariant"] == "AllTraffic"
    reply["Body"].close()
    sent = {"X-Amzn-SageMaker-Custom-Attributes": "trace=18", "X-Request-Id": "ours-18"}
    for target, body in ((question.model, question.body), (question.model, b"{"), ("absent.mar", b"{}"), (None, b"")):
        answer = house.post(target, body, sent)
        assert answer.headers["x-amzn-sagemaker-custom-attributes"] == "trace=18"
        assert answer.headers["x-request-id"] == "ours-18"
    ids = {house.post(question.model, question.body).headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


@pytest.mark.parametrize("kind", ["small", "onnx"])
@pytest.mark.parametrize(("sends", "accepts"), [("json", "npy"), ("npy", "npy"), ("npy", "json"), ("npy", "")])
def test_npy_in_and_out(house: Server, models: dict[str, Model], kind: str, sends: str, accepts: str) -> None:
    """An npy body and `Accept: application/x-npy`, in all combinations; without Accept the answer is as the body."""
    model = models[kind]
    x = np.random.default_rng(5).normal(size=model.shape).astype(np.float32)
    raw = io.BytesIO()
    np.save(raw, x)
    types = {"json": "application/json", "npy": NPY}
    body = raw.getvalue() if sends == "npy" else json.dumps({"x": x.tolist()}).encode()
    arguments = {"Accept": types[accepts]} if accepts else {}
    answer = invoke(house.client(), model.name, body, ContentType=types[sends], **arguments)
    assert answer.headers["content-type"] == types[accepts or sends]
    if (accepts or sends) == "npy":
        np.testing.assert_allclose(np.load(io.BytesIO(answer.body)), model.run(x), rtol=1e-4, atol=1e-5)
    else:
        Question(model.name, body, model.run(x)).check(answer.body)


@pytest.mark.parametrize("sends", ["json", "npy"])
def test_a_body_of_five_megabytes_arrives_whole(house: Server, models: dict[str, Model], sends: str) -> None:
    """1.2 million numbers, each with a weight of its own: the answer is that of the reference."""
    model = models["wide"]
    x = (np.random.default_rng(6).integers(-99, 99, model.shape) / 10).astype(np.float32)
    raw = io.BytesIO()
    np.save(raw, x)
    rows = ",".join("[" + ",".join(f"{number:.1f}" for number in row) + "]" for row in x)
    body = raw.getvalue() if sends == "npy" else f'{{"x":[{rows}]}}'.encode()
    assert 4.5 * MIB < len(body) < 6 * MIB
    kind = NPY if sends == "npy" else "application/json"
    answer = invoke(house.client(), model.name, body, ContentType=kind, Accept="application/json")
    Question(model.name, body, model.run(x)).check(answer.body)


def test_large_answers_arrive_whole_side_by_side(house: Server, models: dict[str, Model]) -> None:
    """Eight clients take answers of 2 MB, in many chunks each, at the same time: all 200,000 numbers are right."""
    questions = [models["long"].question(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(house.ask, questions))
    assert min(len(answer.body) for answer in answers) > 1.5e6


def test_a_model_name_is_any_text_that_the_rules_allow(s3: S3Server, store: str, serve: Serve) -> None:
    """Slashes, spaces, per cent, plus, umlauts (as UTF-8): the key under the store's prefix."""
    names = ["a/b c.mar", "50%/a+b=c~d#e?.mar", "eu/zürich.mar", "a" * 200 + ".mar"]
    models = [pack_forecaster(name, seed) for seed, name in enumerate(names)]
    upload(s3, store, models)
    with serve() as server:
        for model in models:
            question = model.question(0)
            answer = server.post(model.name, question.body, {"Content-Type": "application/json"})
            assert answer.status_code == 200, answer.text
            question.check(answer.content)
        assert set(server.models()) == set(names)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_no_target_is_a_validation_error(house: Server) -> None:
    """Without TargetModel boto3 sends no header: its ValidationError, 400, that names the header."""
    name, response = catch_error(house.client())
    assert (name, response["ResponseMetadata"]["HTTPStatusCode"]) == ("ValidationError", 400)
    assert "X-Amzn-SageMaker-Target-Model" in response["Error"]["Message"]


@pytest.mark.parametrize("target", ["/abs.mar", "a//b.mar", "a/../b.mar", "./a.mar", "a\\b.mar", "a/", "x" * 1025])
def test_bad_names_are_refused_before_any_store_is_asked(s3: S3Server, house: Server, target: str) -> None:
    """400 ValidationError that quotes the rule; no store request but those that watch resident models (HEAD)."""
    before = [request for request in s3.requests if request[0] != "HEAD"]
    answer = house.post(target)
    assert answer.status_code == 400
    assert answer.headers["x-amzn-errortype"] == "ValidationError"
    assert "model name" in answer.json()["message"]
    assert [request for request in s3.requests if request[0] != "HEAD"] == before


def test_an_absent_model_is_a_validation_error_that_names_the_key(house: Server) -> None:
    """As SageMaker does: ValidationError, 400."""
    name, response = catch_error(house.client(), TargetModel="au/absent.mar")
    assert (name, response["ResponseMetadata"]["HTTPStatusCode"]) == ("ValidationError", 400)
    assert "au/absent.mar" in response["Error"]["Message"]


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("small", b'{"x": [[1, 2', ("JSON",)),
        ("small", b'{"y": 1}', ("the model takes x [3, 12]",)),
        ("small", b'{"x": [[1, 2], [3, 4], [5, 6]]}', ("x[0]", "a list of 12, not of 2")),
        ("forecast", b'{"instances": [{"start": "2026-01-01", "target": [1, 2]}]}', ("target", "12")),
        ("forecast", b'{"instances": [{"start": "yesterday", "target": []}]}', ("start",)),
        ("onnx", b'{"x": "many"}', ("x",)),
    ],
)
def test_a_wrong_body_is_told_its_place(
    house: Server, models: dict[str, Model], kind: str, body: bytes, words: tuple[str, ...]
) -> None:
    """400 ValidationError whose message says what is wrong; where there is a place, `error` has instance and field."""
    answer = house.post(models[kind].name, body, {"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.headers["x-amzn-errortype"] == "ValidationError"
    said = answer.text
    for word in words:
        assert word in said
    if b"instances" in body:
        assert answer.json()["error"]["instance"] == 0


def test_a_bad_instance_does_not_hide_its_number(house: Server, models: dict[str, Model]) -> None:
    """The third of three instances is short: the error says instance 2 and field target."""
    request = json.loads(models["forecast"].question(0).body)
    good = request["instances"][0]
    bad = {**good, "target": good["target"][:5]}
    body = json.dumps({"instances": [good, good, bad]}).encode()
    error = house.post(models["forecast"].name, body, {"Content-Type": "application/json"}).json()["error"]
    assert (error["instance"], error["field"]) == (2, "target")


def test_more_than_six_mebibytes_are_413(house: Server, models: dict[str, Model]) -> None:
    """Announced or not (chunked), and through boto3: 413 that names the limit; 6 MiB themselves are read."""
    name = models["small"].name
    too_many = bytes(6 * MIB + 1)
    _, response = catch_error(house.client(), TargetModel=name, Body=too_many)
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 413
    assert str(6 * MIB) in response["Error"]["Message"]
    parts = (too_many[at : at + MIB] for at in range(0, len(too_many), MIB))
    headers = {"X-Amzn-SageMaker-Target-Model": name}
    assert house.http.post(f"{house.url}/invocations", content=parts, headers=headers).status_code == 413
    assert house.post(name, bytes(6 * MIB)).status_code == 400


@pytest.mark.parametrize("filler", [b"X-Many: value\r\n", b"x" * 1000], ids=["many headers", "one endless header"])
def test_a_head_without_end_is_431(house: Server, filler: bytes) -> None:
    """Headers that go on and on, or one that does, are cut off after 64 KiB; the memory is not theirs to fill."""
    with socket.create_connection(house.address, timeout=PATIENCE_S) as client:
        client.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nX-Long: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                client.sendall(filler * (4096 // len(filler)))
        assert client.recv(4096).startswith(b"HTTP/1.1 431 ")


def test_many_requests_on_one_connection_are_not_one_long_head(house: Server, models: dict[str, Model]) -> None:
    """What bounds a head is per request: a megabyte of small requests, pipelined and not, is served."""
    name = models["small"].name
    request = f"POST /invocations HTTP/1.1\r\nHost: x\r\nX-Amzn-SageMaker-Target-Model: {name}\r\nX-Fill: {'y' * 2000}"
    whole = (request + "\r\nContent-Length: 2\r\n\r\n{}").encode()
    with socket.create_connection(house.address, timeout=PATIENCE_S) as client:
        answers = client.makefile("rb")
        for burst in (1, 1, 50, 1, 200, 250):
            client.sendall(whole * burst)
            for _ in range(burst):
                assert answers.readline().startswith(b"HTTP/1.1 400 ")
                length = 0
                while (line := answers.readline()) != b"\r\n":
                    length = int(line.split()[1]) if line.lower().startswith(b"content-length") else length
                answers.read(length)


@pytest.mark.parametrize("value", ["0", "-5", "soon", "1e3", ""])
def test_a_deadline_is_a_positive_number(house: Server, models: dict[str, Model], value: str) -> None:
    """Anything else is 400, not ignored."""
    answer = house.post(models["small"].name, b"{}", {"X-Request-Timeout-Ms": value})
    assert answer.status_code == 400
    assert "X-Request-Timeout-Ms" in answer.json()["message"]


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian package prometheus)")
def test_metrics_pass_promtool(house: Server, models: dict[str, Model]) -> None:
    """With answers, refusals and failures counted, `promtool check metrics` has nothing to say."""
    for kind in ("small", "forecast", "onnx", "long"):
        house.ask(models[kind].question(0))
    house.post("absent.mar")
    house.post(None)
    assert lint(house.exposition()) == ""


# --- time and room --------------------------------------------------------------------------------------------------


def test_a_passed_deadline_is_a_model_error_of_original_status_504(s3: S3Server, store: str, serve: Serve) -> None:
    """The store does not answer, the client has one second: ModelError 424 with original 504, not before that time
    and not retried by boto3, while the load goes on; its model answers the next client.
    """

    def ask_in_a_hurry(trial: int) -> None:
        (model,) = pack_fleet(f"late{trial}", 1)
        upload(s3, store, [model])
        with serve() as server:
            client = server.client(attempts=None)
            client.meta.events.register("before-sign.sagemaker-runtime.InvokeEndpoint", _hurry)
            with s3.hold(model.name):  # as long as it is held, no answer can come of a load
                started = time.monotonic()
                name, response = catch_error(client, TargetModel=model.name, Body=model.question(0).body)
                assert time.monotonic() - started >= HURRY_S
            assert (name, response["OriginalStatusCode"]) == ("ModelError", 504)
            assert response["ResponseMetadata"]["RetryAttempts"] == 0
            assert model.name in response["OriginalMessage"], "the front answers where the worker stands still"
            answer = server.ask(model.question(0))
            assert answer.cache in ("coalesced", "hit")
            assert len(s3.seen("GET", f"{store}/{model.name}")) == 1

    repeat_in_stalls(ask_in_a_hurry)


HURRY_S = 1.0  #: the worker should have begun the load by then


def _hurry(request: Any, **_: Any) -> None:
    request.headers["X-Request-Timeout-Ms"] = f"{HURRY_S * 1e3:.0f}"


def test_a_full_queue_is_503_and_boto3_comes_back(s3: S3Server, store: str, serve: Serve) -> None:
    """Two wait for a slow model, the third is refused at once with both retry headers; boto3 with its own retries, and
    other models, are answered.
    """
    slow, other = pack_fleet("queue", 2)
    upload(s3, store, [slow, other])
    with serve(queue_per_model=2) as server, s3.hold(slow.name) as loading, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(server.ask, slow.question(i)) for i in range(2)]
        wait_until(lambda: server.total("fleetcast_model_cache_requests_total") == 2, "two are waiting")
        refused = server.post(slow.name, slow.question(2).body)
        assert (refused.status_code, refused.headers["x-amzn-errortype"]) == (503, "ServiceUnavailable")
        assert int(refused.headers["x-amz-retry-after"]) > 0
        assert int(refused.headers["retry-after"]) >= 1
        assert "queue_per_model" in refused.json()["message"]
        assert server.ask(other.question(0)).cache == "miss"
        patient = pool.submit(_count_retries, server, slow.question(3))
        wait_until(lambda: server.total("fleetcast_inference_requests_total", code="503") >= 2, "it is refused too")
        loading.set()
        assert patient.result(PATIENCE_S) >= 1
        for future in waiting:
            future.result(PATIENCE_S)


def _count_retries(server: Server, question: Question) -> int:
    """Ask with boto3's own retries, more of them than it comes with; how often it had to come back."""
    reply = server.client(attempts=20).invoke_endpoint(
        EndpointName="fleet", TargetModel=question.model, ContentType="application/json", Body=question.body
    )
    question.check(reply["Body"].read())
    return int(reply["ResponseMetadata"]["RetryAttempts"])


def test_overload_can_be_429(s3: S3Server, store: str, serve: Serve) -> None:
    """`overload_status = 429`: boto3's own ModelNotReadyException."""
    (slow,) = pack_fleet("queue", 1)
    upload(s3, store, [slow])
    with (
        serve(queue_per_worker=1, overload_status=429) as server,
        ThreadPoolExecutor(1) as pool,
        s3.hold(slow.name) as loading,
    ):
        waiting = pool.submit(server.ask, slow.question(0))
        wait_until(lambda: server.total("fleetcast_model_cache_requests_total") == 1, "one is waiting")
        name, response = catch_error(server.client(), TargetModel=slow.name, Body=slow.question(1).body)
        assert (name, response["ResponseMetadata"]["HTTPStatusCode"]) == ("ModelNotReadyException", 429)
        assert "queue_per_worker" in response["Error"]["Message"]
        loading.set()
        waiting.result(PATIENCE_S)


def test_ping_answers_while_models_load(s3: S3Server, store: str, serve: Serve) -> None:
    """Eight loads are under way, more than there are loader threads: `/ping` and `/ready` wait for none of them."""
    models = pack_fleet("ping", 8)
    upload(s3, store, models)
    with serve(loader_threads=2) as server, ThreadPoolExecutor(8) as pool, s3.hold(f"{store}/", 8) as loading:
        asked = [pool.submit(server.ask, model.question(0)) for model in models]
        wait_until(lambda: server.total("fleetcast_model_cache_requests_total") == 8, "all loads are under way")
        for path in ["/ping", "/ready"] * 20:
            assert server.http.get(f"{server.url}{path}").status_code == 200
        assert not any(future.done() for future in asked)
        loading.set()
        for future in asked:
            future.result(PATIENCE_S)


# --- keys -----------------------------------------------------------------------------------------------------------


def test_where_keys_are_configured_requests_must_be_signed_with_one(s3: S3Server, store: str, serve: Serve) -> None:
    """boto3 with the right secret is answered, odd names and large bodies included; a wrong secret, an unknown key and
    no signature are 403, and no model is loaded for them.
    """
    model, odd = pack_forecaster("au/nsw1.mar", 1), pack_forecaster("a b+c%/d=e.mar", 2)
    upload(s3, store, [model, odd])
    with serve(access_keys={"AKIAFLEET": "wJalr/secret+key", "AKIAOTHER": "other"}) as server:
        wrong = {
            "unknown key": server.client(key="AKIANOBODY", secret="wJalr/secret+key"),
            "wrong secret": server.client(key="AKIAFLEET", secret="other"),
        }
        for client in wrong.values():
            _, response = catch_error(client, TargetModel=model.name, Body=model.question(0).body)
            assert response["ResponseMetadata"]["HTTPStatusCode"] == 403
            assert response["Error"]["Code"] == "AccessDeniedException"
        assert server.post(model.name, model.question(0).body).status_code == 403
        assert server.models() == {}
        right = server.client(key="AKIAFLEET", secret="wJalr/secret+key")
        server.ask(model.question(0), right, CustomAttributes="signed=too", Accept="application/json")
        server.ask(odd.question(0), right)
        server.ask(model.question(1), server.client(key="AKIAOTHER", secret="other"))
        _, response = catch_error(right, TargetModel=model.name, Body=bytes(5 * MIB))
        assert response["ResponseMetadata"]["HTTPStatusCode"] == 400, "signed rightly, but no JSON"
