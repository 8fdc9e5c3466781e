"""Modules of users, packed as graphs, served by a real server and requested by an unmodified boto3 client."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from botocore.exceptions import ClientError
from torch import nn

from handlers.base import Shape
from handlers.kinds import ArchiveParts, pack_model
from handlers.kinds.graph.export import export_graph
from model_store.archives.manifest import ForecastSpec, GoldenSample, InputChannel, Kind, Scaler
from tests.archives import repack
from tests.e2e.models import CENTER, LEVELS, SCALE, Model
from tests.e2e.server import Server, run_server, upload
from tests.handlers.nets import SHAPE, Attending, Dilated, RecurrentNet, make_module
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

FORECAST = ForecastSpec(
    frequency="1h",
    context_length=12,
    prediction_length=4,
    quantile_levels=LEVELS,
    inputs=(InputChannel(source="target"),),
    scaler=Scaler(kind="linear", center=CENTER, scale=SCALE),
)


def make_graph_model(
    name: str,
    seed: int,
    build: Callable[[], nn.Module],
    shape: Shape = SHAPE,
    *,
    forecast: bool = False,
    off: float = 0,
) -> Model:
    """A graph archive with a golden sample, which is wrong by `off`; with `forecast` it is asked by DeepAR JSON."""
    network = make_module(build, seed, shape)
    raw, tensors = export_graph(network, {"x": shape})
    found = Model(name, b"", network, shape, forecast)
    x = np.ones(shape, np.float32)
    golden = GoldenSample(request={"x": x.tolist()}, response={"predictions": (found.run(x) + off).tolist()})
    data = pack_model(
        Kind.GRAPH,
        ArchiveParts(program=raw, tensors=tensors, forecast=FORECAST if forecast else None),
        model_name="m",
        golden=golden,
    )
    return Model(name, data, network, shape, forecast)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """Twelve of one family, and one each of others."""
    fleet = [make_graph_model(f"own/{seed:02}.mar", seed, Dilated) for seed in range(12)]
    others = [
        make_graph_model("own/encoder.mar", 20, lambda: Attending(norm_first=False)),
        make_graph_model("own/gru.mar", 21, RecurrentNet),
        make_graph_model("own/forecast.mar", 22, lambda: Dilated(features=1), (1, 12), forecast=True),
        make_graph_model("own/wrong.mar", 23, Dilated, off=0.5),
    ]
    return {each.name: each for each in [*fleet, *others]}


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory, models: dict[str, Model]) -> Iterator[Server]:
    """A server of these models."""
    bucket = s3.bucket()
    hostile = json.dumps(
        {
            "input": {"name": "x", "shape": [3, 12]},
            "parameters": {},
            "nodes": [{"name": "n", "op": "aten.full.default", "args": [[1 << 40], 1.0]}],
            "output": "n",
        }
    )
    bomb = Model("own/bomb.mar", repack(models["own/00.mar"].data, graph_json=hostile.encode()), nn.Identity(), SHAPE)
    upload(s3, bucket, [*models.values(), bomb])
    with run_server(s3, tmp_path_factory.mktemp("graphs"), f"s3://{bucket}", model_cache_bytes="64MiB") as server:
        yield server


@pytest.mark.parametrize("name", ["own/00.mar", "own/encoder.mar", "own/gru.mar", "own/forecast.mar"])
def test_boto3_asks_a_graph(house: Server, models: dict[str, Model], name: str) -> None:
    """Loaded on first use and then resident, tensors or a forecast: the numbers are the module's own."""
    house.fleet("unload", name)
    assert house.ask(models[name].question(1)).cache == "miss"
    assert house.ask(models[name].question(2)).cache == "hit"


def test_many_models_at_once(house: Server, models: dict[str, Model]) -> None:
    """Requests for models of one graph and of others, from many threads: each its own answer, several in a step."""
    names = [name for name in models if name != "own/wrong.mar"] * 20
    client = house.client()
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda pair: house.ask(models[pair[1]].question(pair[0]), client), enumerate(names)))
    assert house.total("fleetcast_inference_batch_models_bucket", le="1.0") < house.total(
        "fleetcast_inference_batch_models_count"
    ), "no step had two models"


def test_operators_see_how_a_graph_runs(house: Server, models: dict[str, Model]) -> None:
    """One family for equal graphs; what runs one by one says why, in the description and in the log."""
    for name in ("own/00.mar", "own/01.mar", "own/gru.mar"):
        house.ask(models[name].question(0))
    holders = {name: row["holders"][0] for name, row in house.models().items() if row["holders"]}
    assert holders["own/00.mar"]["family"] == holders["own/01.mar"]["family"]
    assert holders["own/00.mar"]["family"].startswith("graph-")
    assert "one_by_one" not in holders["own/00.mar"]
    assert "aten::gru" in holders["own/gru.mar"]["one_by_one"]
    for runs in ('"batched"', "one by one: "):
        wait_until(partial(has_logged, house, "graph_family", runs), f"the log has a family that runs {runs}")


def has_logged(server: Server, *texts: str) -> bool:
    """Whether a line of the log has all these."""
    return any(all(text in line for text in texts) for line in server.said().splitlines())


@pytest.mark.parametrize(
    ("name", "said"),
    [("own/bomb.mar", "1099511627776 numbers in its results"), ("own/wrong.mar", "golden sample is not reproduced")],
)
def test_a_bad_graph_costs_nobody_else(house: Server, models: dict[str, Model], name: str, said: str) -> None:
    """A memory bomb and a graph that answers otherwise are refused with their reason; the others go on."""
    with pytest.raises(ClientError, match=said) as caught:
        house.ask(Model(name, b"", models["own/00.mar"].network, SHAPE).question(0))
    assert caught.value.response["Error"]["Code"] == "ModelError"
    house.ask(models["own/00.mar"].question(3))
