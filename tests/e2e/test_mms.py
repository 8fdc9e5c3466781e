"""Multi Model Server's clients on the usual listeners: inference on one, management on another."""

import json
from collections.abc import Iterator

import pytest

from tests.e2e.models import pack_fleet
from tests.e2e.server import Server, run_server, upload
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

FLEET = pack_fleet("au", 3)


@pytest.fixture(scope="module")
def server(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A fleet in S3, for clients of Multi Model Server."""
    bucket = s3.bucket()
    upload(s3, bucket, FLEET)
    folder = tmp_path_factory.mktemp("mms")
    with run_server(s3, folder, f"s3://{bucket}", model_server_api="mms", fronts=2) as running:
        yield running


def test_a_forecaster_answers_on_every_path(server: Server) -> None:
    """By its key, and by a name that was registered on the management listener; SageMaker's clients go on beside."""
    models, question = f"{server.addresses['management']}/models", FLEET[0].question(1)
    url, workers = FLEET[0].name, {"initial_workers": "1", "synchronous": "true"}
    registered = server.http.post(models, params={"url": url, "model_name": "nsw", **workers})
    assert (registered.status_code, registered.json()) == (200, {"status": "Workers scaled"})
    for path in ("/predictions/nsw", "/nsw/predict", "/models/nsw/invoke", "/invocations?model_name=nsw"):
        reply = server.http.post(server.url + path, content=question.body, headers={"Content-Type": "application/json"})
        assert reply.is_success, reply.text
        question.check(reply.content)
    by_key = FLEET[1].question(2)
    for name in (by_key.model, by_key.model.removesuffix(".mar")) * 2:
        reply = server.http.post(f"{server.url}/predictions/{name}", content=by_key.body)
        by_key.check(reply.content)
    server.ask(FLEET[2].question(3))
    assert server.http.get(models).json() == {"models": [{"modelName": "nsw", "modelUrl": url}]}
    assert server.http.delete(f"{models}/nsw").is_success
    assert FLEET[0].name not in server.resident()
    assert server.http.post(f"{server.url}/predictions/nsw", content=question.body).status_code == 404


def test_management_is_on_its_own_listener(server: Server) -> None:
    """Who reaches the inference listener alone manages nothing; each listener describes what it has."""
    for method, path in (("GET", "/models"), ("POST", "/models?url=x"), ("DELETE", "/models/nsw")):
        reply = server.http.request(method, server.url + path)
        assert (reply.status_code, reply.json()["type"]) == (404, "ResourceNotFoundException")
    paths = {}
    for listener in ("inference", "management"):
        paths[listener] = set(json.loads(server.http.options(server.addresses[listener] + "/").content)["paths"])
    assert "/models" in paths["management"] - paths["inference"]
    assert "/predictions/{model_name}" in paths["inference"] - paths["management"]


def test_unknown_models_and_paths_are_said_in_their_words(server: Server) -> None:
    """The status is in the body too."""
    for path, kind in (("/predictions/nosuch", "ModelNotFoundException"), ("/nosuch", "ResourceNotFoundException")):
        reply = server.http.post(server.url + path, content=b"{}")
        assert (reply.status_code, reply.json()["code"], reply.json()["type"]) == (404, 404, kind)
