"""JSON Lines and archives of several products, asked of real processes by an unmodified boto3 client."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from botocore.exceptions import ClientError
from msgspec.structs import replace
from torch import nn

from handlers.base import Float32
from handlers.forecasters import build_family, random_tensors
from handlers.kinds import ArchiveParts, pack_model
from handlers.kinds.graph.export import export_graph
from model_store.archives.manifest import ForecastSpec, GoldenSample, InputChannel, Kind, Scaler
from tests.e2e.models import ABSOLUTE, CENTER, LEVELS, RELATIVE, SCALE, Model, pack_forecaster
from tests.e2e.server import ROOT, Server, invoke, run_server, upload
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

LINES = "application/jsonlines"
START = "2026-01-01 00:00:00"
TCN = {"features": 1, "context_length": 20, "prediction_length": 6, "quantiles": 3, "channels": 4, "layers": 2}
PRODUCTS = ("energy", "reserve")
SCALERS = (Scaler(kind="linear", center=CENTER, scale=SCALE), Scaler(kind="linear", center=5, scale=2))
SEVERAL = ForecastSpec(
    frequency="5min",
    context_length=20,
    prediction_length=6,
    quantile_levels=LEVELS,
    products=PRODUCTS,
    scalers=SCALERS,
    inputs=(InputChannel(source="target"), InputChannel(source="target", product=1)),
    tail="clamp",
)


def make_history(seed: int, steps: int = 20) -> list[list[float]]:
    """Prices of both products [D][T]."""
    drawn = np.random.default_rng(seed).normal(size=(2, steps))
    return [(scaler.center + scaler.scale * row).round(2).tolist() for scaler, row in zip(SCALERS, drawn, strict=True)]


def compute_expected(network: nn.Module, target: Sequence[Sequence[float]]) -> dict[str, Float32]:
    """Quantiles [D, prediction] by level, by the plain network alone."""
    x = np.stack([(np.array(row) - scaler.center) / scaler.scale for row, scaler in zip(target, SCALERS, strict=True)])
    with torch.inference_mode():
        out = network(torch.from_numpy(x.astype(np.float32))[None])[0].numpy().reshape(6, 2, 3)
    prices = [np.sort(out[:, d]) * scaler.scale + scaler.center for d, scaler in enumerate(SCALERS)]
    return {str(level): np.stack([each[:, i] for each in prices]) for i, level in enumerate(LEVELS)}


def check(prediction: dict[str, Any], network: nn.Module, target: Sequence[Sequence[float]]) -> None:
    """The prediction's quantiles are the network's."""
    right = compute_expected(network, target)
    assert list(prediction["quantiles"]) == list(right)
    for level, rows in right.items():
        np.testing.assert_allclose(prediction["quantiles"][level], rows, rtol=RELATIVE, atol=ABSOLUTE)


def make_golden(network: nn.Module) -> GoldenSample:
    """What the archive proves itself by at every load."""
    target = make_history(99)
    right = {level: rows.tolist() for level, rows in compute_expected(network, target).items()}
    request = {
        "instances": [{"start": START, "target": target}],
        "configuration": {"output_types": ["quantiles"]},
    }
    return GoldenSample(
        request=request, response={"predictions": [{"start": "2026-01-01 01:40:00", "quantiles": right}]}
    )


def make_market(name: str, seed: int) -> Model:
    """Both products by one `tcn`, which puts their levels side by side: [6, 2 * 3]."""
    config = {**TCN, "features": 2, "quantiles": 6}
    family = build_family("tcn", config)
    tensors = random_tensors(family, seed)
    network = family.reference()
    network.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    data = pack_model(
        Kind.FORECASTER,
        ArchiveParts(tensors=tensors, architecture="tcn", config=config, forecast=SEVERAL),
        model_name="m",
        golden=make_golden(network),
    )
    return Model(name, data, network, family.input_shape, forecast=True)


def own_market(name: str) -> Model:
    """Both products by a module of one's own with an axis for them: [6, 2, 3]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = nn.Sequential(nn.Flatten(), nn.Linear(40, 36), nn.Unflatten(1, (6, 2, 3))).eval()
    raw, tensors = export_graph(network, {"input": (2, 20)})
    return Model(
        name,
        pack_model(
            Kind.GRAPH,
            ArchiveParts(program=raw, tensors=tensors, forecast=SEVERAL),
            model_name="m",
            golden=make_golden(network),
        ),
        network,
        (2, 20),
    )


@pytest.fixture(scope="module")
def fleet() -> dict[str, Model]:
    """One of one product, two of several, and one whose record promises more products than its network has."""
    one = pack_forecaster("au/one.mar", 1, config=TCN, forecast=True)
    both, own = make_market("au/both.mar", 2), own_market("au/own.mar")
    family = build_family("tcn", TCN)
    wrong = pack_model(
        Kind.FORECASTER,
        ArchiveParts(
            tensors=random_tensors(family, 3),
            architecture="tcn",
            config=TCN,
            forecast=replace(SEVERAL, inputs=(InputChannel(source="target"),)),
        ),
        model_name="m",
    )
    return {each.name: each for each in (one, both, own, Model("au/wrong.mar", wrong, nn.Identity(), (1, 20)))}


@pytest.fixture(scope="module")
def bucket(s3: S3Server, fleet: dict[str, Model]) -> str:
    """Their bucket."""
    name = s3.bucket()
    upload(s3, name, list(fleet.values()))
    return name


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory, bucket: str) -> Iterator[Server]:
    """A server of them."""
    with run_server(s3, tmp_path_factory.mktemp("forecasts"), f"s3://{bucket}", workers=1) as server:
        yield server


def read_lines(*each: object) -> bytes:
    """JSON Lines."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in each)


def test_json_lines(house: Server, fleet: dict[str, Model]) -> None:
    """Every line in its place, each the answer a call of its own would get; bad lines are errors there."""
    model = fleet["au/one.mar"]
    questions = [model.question(seed) for seed in range(30)]
    instances = [json.loads(each.body)["instances"][0] for each in questions]
    wish = {"configuration": {"output_types": ["mean"]}}
    body = read_lines(*instances, {**instances[0], **wish}, {**instances[0], "target": [1.0]}) + b"no json\n"
    answer = invoke(house.client(), model.name, body, ContentType=LINES)
    assert answer.headers["content-type"] == LINES
    found = [json.loads(line) for line in answer.body.splitlines()]
    assert len(found) == 33
    for question, prediction in zip(questions, found, strict=False):
        question.check(json.dumps({"predictions": [prediction]}).encode())
    assert set(found[30]) == {"start", "time_zone", "mean"}
    assert found[30]["mean"] == found[0]["mean"]
    assert found[31]["error"]["field"] == "target"
    assert found[32]["error"]["code"] == "bad_request"


@pytest.mark.parametrize("name", ["au/both.mar", "au/own.mar"])
def test_several_products(house: Server, fleet: dict[str, Model], name: str) -> None:
    """Quantiles [D][T] of the plain network, mean and samples beside them; the same by JSON Lines."""
    network, targets = fleet[name].network, [make_history(seed) for seed in (1, 2)]
    instances = [{"start": START, "target": target, "item_id": i} for i, target in enumerate(targets)]
    wish = {"output_types": ["mean", "quantiles", "samples"], "num_samples": 7, "seed": 1}
    body = json.dumps({"instances": instances, "configuration": wish}).encode()
    predictions = json.loads(invoke(house.client(), name, body).body)["predictions"]
    for i, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        assert prediction["item_id"] == i
        assert prediction["start"] == "2026-01-01 01:40:00"
        check(prediction, network, target)
        assert np.shape(prediction["mean"]) == (2, 6)
        assert np.shape(prediction["samples"]) == (7, 2, 6)
    by_line = invoke(house.client(), name, read_lines(*instances), ContentType=LINES)
    for line, prediction in zip(by_line.body.splitlines(), predictions, strict=True):
        del prediction["samples"]
        assert prediction.pop("warnings") == ["narrow-levels"]  # of the samples, which the lines do not have
        assert json.loads(line) == prediction


def test_wrong_requests_name_the_product(house: Server) -> None:
    """Through boto3: [T] where [D][T] is needed, and rows of different lengths."""
    for target, words in (
        ([1.0] * 20, "2 products (energy, reserve)"),
        ([[1.0] * 20, [1.0] * 19], "19 steps of reserve"),
    ):
        body = json.dumps({"instances": [{"start": START, "target": target}]}).encode()
        with pytest.raises(ClientError) as caught:
            invoke(house.client(), "au/both.mar", body)
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
        assert words in str(caught.value)


def test_a_network_of_fewer_products_is_refused_at_load(house: Server) -> None:
    """The archive is wrong, not the request."""
    body = json.dumps({"instances": [{"start": START, "target": make_history(1)}]}).encode()
    with pytest.raises(ClientError) as caught:
        invoke(house.client(), "au/wrong.mar", body)
    assert caught.value.response["Error"]["Code"] == "ModelError"
    assert "quantile_levels times products says 6" in str(caught.value)


def test_many_models_in_one_call(house: Server, fleet: dict[str, Model]) -> None:
    """Archives of one and of several products side by side, each item as its archive takes it."""
    (plain,) = json.loads(fleet["au/one.mar"].question(3).body)["instances"]
    items = [
        {"target_model": "au/one.mar", **plain},
        {"target_model": "au/both.mar", "start": START, "target": make_history(4)},
        {"target_model": "au/both.mar", **plain},
    ]
    body = {"requests": items, "configuration": {"output_types": ["quantiles"]}}
    answer = httpx.post(f"{house.url}/v1/forecasts", json=body, timeout=PATIENCE_S).json()
    one, both, wrong = answer["predictions"]
    fleet["au/one.mar"].question(3).check(json.dumps({"predictions": [one]}).encode())
    check(both, fleet["au/both.mar"].network, make_history(4))
    assert (answer["failed"], wrong["error"]["field"]) == (1, "target")


def test_commands(s3: S3Server, bucket: str, tmp_path: Path, fleet: dict[str, Model]) -> None:
    """`fleetcast verify` takes the archives, and `fleetcast batch` answers a file of both products."""
    for name in ("both.mar", "own.mar"):
        (tmp_path / name).write_bytes(fleet[f"au/{name}"].data)
    asked: list[dict[str, Any]] = [
        {"target_model": "au/both.mar", "start": START, "target": make_history(seed)} for seed in range(3)
    ]
    (tmp_path / "in.jsonl").write_bytes(read_lines(*asked))
    environment = {**os.environ, **s3.env, "PYTHONPATH": str(ROOT), "FLEETCAST_DISK_CACHE": str(tmp_path / "cache")}
    for arguments in (
        ["verify", "both.mar", "own.mar"],
        ["inspect", "both.mar"],
        ["batch", "in.jsonl", "out.jsonl", "--models", f"s3://{bucket}"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "server.cli.main", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if arguments[0] == "inspect":
            assert "product 1" in done.stdout
    for line, request in zip((tmp_path / "out.jsonl").read_bytes().splitlines(), asked, strict=True):
        check(json.loads(line), fleet["au/both.mar"].network, request["target"])
