"""Joint scenarios in one call, against real processes: forecasters, a correlation archive, `POST /v1/forecasts`."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from handlers.evaluation.correlation import estimate_gaussian
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import Kind
from server.contract import HEADER_QUALITY, HEADER_WARNING
from tests.e2e.models import Model, pack_forecaster
from tests.e2e.server import Server, run_server, upload
from tests.e2e.test_many import TCN, make_item
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

NAMES = [f"au/m{i}.mar" for i in range(4)]
STEPS = TCN["prediction_length"]


def make_correlation(names: Sequence[str]) -> bytes:
    """An archive in which the first two products move together and the others by themselves."""
    numbers = np.random.default_rng(5)
    errors = numbers.standard_normal((200, len(names), STEPS))
    errors[:, 1] = 0.98 * errors[:, 0] + 0.2 * errors[:, 1]
    found = estimate_gaussian(errors, tuple(names))
    return pack_model(
        Kind.CORRELATION, ArchiveParts(correlation=found.record, tensors=found.tensors), model_name="joint"
    )


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, list[Model]]]:
    """Three workers, the products of `joint.mar` and then one that it does not know; `unasked.mar` is sound as well."""
    bucket = s3.bucket()
    fleet = [pack_forecaster(name, i, config=TCN, forecast=True) for i, name in enumerate([*NAMES, "au/new.mar"])]
    upload(s3, bucket, fleet)
    for name in ("joint.mar", "unasked.mar"):
        s3.put(bucket, name, make_correlation(NAMES))
    with run_server(s3, tmp_path_factory.mktemp("joint"), f"s3://{bucket}", workers=3, fronts=2) as server:
        yield server, fleet


def ask(
    server: Server, models: Sequence[Model], headers: Mapping[str, str] | None = None, **configuration: object
) -> httpx.Response:
    """A joint call; 100 scenarios by seed 7 unless said otherwise."""
    configuration = {"joint": True, "correlation": "joint.mar", "num_samples": 100, "seed": 7, **configuration}
    body = {
        "requests": [make_item(model, sum(model.name.encode())) for model in models],
        "configuration": configuration,
    }
    return httpx.post(f"{server.url}/v1/forecasts", json=body, headers=headers, timeout=PATIENCE_S)


def read_samples(reply: httpx.Response) -> np.ndarray[Any, Any]:
    """The scenarios of all predictions [N, S, T]."""
    assert reply.status_code == 200, reply.text
    return np.array([prediction["samples"] for prediction in reply.json()["predictions"]], np.float32)


def test_one_call_for_joint_scenarios(house: tuple[Server, list[Model]]) -> None:
    """Margins are the models' own, what moves together does so, JSON and npy agree, on any worker and in any order."""
    server, (*fleet, _) = house
    first = ask(server, fleet)
    found = read_samples(first)
    assert found.shape == (4, 100, STEPS)
    assert first.json()["failed"] == 0
    assert set(first.json()["predictions"][0]) == {"start", "time_zone", "warnings", "samples"}
    assert first.json()["predictions"][0]["warnings"] == ["narrow-levels"]
    assert first.headers[HEADER_WARNING] == "narrow-levels=4"
    assert HEADER_QUALITY not in first.headers
    ranks = found.argsort(axis=1).argsort(axis=1)
    moving = np.asarray(np.corrcoef(ranks[:, :, 2]))
    assert moving[0, 1] > 0.9
    assert abs(moving[0, 2]) < 0.4

    more = ask(server, fleet, output_types=["mean", "quantiles", "samples"]).json()["predictions"]
    for prediction, scenarios in zip(more, found, strict=True):
        np.testing.assert_array_equal(np.array(prediction["samples"], np.float32), scenarios)
        median = np.array(prediction["quantiles"]["0.5"])
        np.testing.assert_allclose(np.median(scenarios, axis=0), median, rtol=0.02, atol=0.02)
        np.testing.assert_allclose(scenarios.mean(axis=0), prediction["mean"], rtol=0.02, atol=0.02)

    npy = ask(server, fleet, {"Accept": "application/x-npy"})
    assert npy.headers["content-type"] == "application/x-npy"
    array = np.load(io.BytesIO(npy.content))
    np.testing.assert_array_equal(array, found.transpose(1, 0, 2))
    assert "hit=4" in npy.headers["x-fleetcast-cache"]

    backwards = ask(server, fleet[::-1])
    np.testing.assert_array_equal(read_samples(backwards)[::-1], found)
    assert (read_samples(ask(server, fleet, seed=8)) != found).any()
    unseeded = read_samples(ask(server, fleet, seed=None))
    assert (unseeded != read_samples(ask(server, fleet, seed=None))).any()
    assert "joint.mar" in server.resident()


def test_what_cannot_be_joint(house: tuple[Server, list[Model]]) -> None:
    """A failed item fails alone in JSON and stops npy; an unknown product, no such correlation, a bad count: 4xx."""
    server, (*fleet, stranger) = house
    missing = Model("au/none.mar", b"", fleet[0].network, fleet[0].shape, forecast=True)
    partly = ask(server, [fleet[0], missing, fleet[1]])
    answer = partly.json()
    assert (partly.status_code, answer["failed"]) == (200, 1)
    assert answer["predictions"][1]["error"]["code"] == "not_found"
    assert len(answer["predictions"][2]["samples"]) == 100
    as_npy = ask(server, [fleet[0], missing], {"Accept": "application/x-npy"})
    assert (as_npy.status_code, as_npy.json()["error"]["instance"]) == (400, 1)

    unknown = ask(server, [missing, fleet[0], stranger])
    assert (unknown.status_code, unknown.json()["error"]["instance"]) == (400, 2)
    assert "au/new.mar" in unknown.json()["error"]["message"]
    nowhere = ask(server, fleet, correlation="none.mar")
    assert "none.mar" in nowhere.json()["error"]["message"]
    assert nowhere.status_code in (400, 404)
    wrong = ask(server, fleet, correlation=NAMES[0])
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "bad_request")
    assert ask(server, fleet, num_samples=1).json()["error"]["field"] == "configuration.num_samples"
    assert ask(server, fleet, correlation=None).json()["error"]["field"] == "configuration.correlation"
    direct = httpx.post(
        f"{server.url}/invocations",
        json={"forecasts": []},
        headers={"X-Amzn-SageMaker-Target-Model": "joint.mar"},
    )
    assert direct.status_code == 400
    assert ask(server, fleet[:1]).status_code == 200


def test_forecasts_of_different_days_are_not_joint(house: tuple[Server, list[Model]]) -> None:
    """Two days were answered 200 with a correlation between them; now both models and their starts are named."""
    server, (one, other, *_) = house
    requests = [make_item(one, 1), {**make_item(other, 2), "start": "2031-05-05 00:00:00"}]
    configuration = {"joint": True, "correlation": "joint.mar", "num_samples": 100}
    call = {"requests": requests, "configuration": configuration}
    reply = httpx.post(f"{server.url}/v1/forecasts", json=call, timeout=PATIENCE_S)
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert all(part in message for part in (one.name, other.name, "ends before", "2031-05-0"))


def test_a_joint_call_of_models_without_answers(house: tuple[Server, list[Model]]) -> None:
    """When no model answers there is nothing to draw: the errors are the answer, and no correlation is asked."""
    server, (one, *_) = house
    absent = [Model(f"nz/{i}.mar", b"", one.network, one.shape, forecast=True) for i in range(4)]
    answer = ask(server, absent, correlation="unasked.mar")
    assert (answer.status_code, answer.json()["failed"]) == (200, 4)
    assert [each["error"]["code"] for each in json.loads(answer.content)["predictions"]] == ["not_found"] * 4
    assert "unasked.mar" not in server.resident()
