"""The operations load, unload, pin, unpin, reload, list and describe, and their effects on clients meanwhile."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore.exceptions import ClientError

from server.sdk.client import Client
from tests.e2e.conftest import Serve
from tests.e2e.models import FORECAST_TCN, SMALL_MLP, Model, pack_fleet, pack_forecaster
from tests.e2e.server import Load, Server, run_server, upload
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

SLAB = 65536
PLACES = 11  #: models of `fleet` in one slab
NAME = "eu/de-lu/day ahead+1 50%~#=.mar"  #: what keys may look like: slashes, space, plus, per cent, hash


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, Model]]]:
    """Two workers, and models with slashes and stranger things in their names."""
    bucket = s3.bucket()
    models = [pack_forecaster("au/nsw1/energy.mar", 0), pack_forecaster(NAME, 2)]
    models.insert(1, pack_forecaster("au/nsw1/raise.mar", 1, config=FORECAST_TCN, forecast=True))
    upload(s3, bucket, models)
    with run_server(s3, tmp_path_factory.mktemp("house"), f"s3://{bucket}", workers=2) as server:
        yield server, {model.name: model for model in models}


def quote_name(name: str) -> str:
    """As a URL's path has it, slashes left alone."""
    return name.replace("%", "%25").replace("#", "%23").replace(" ", "%20")


@pytest.mark.parametrize("name", ["au/nsw1/energy.mar", NAME])
def test_verbs_take_names_with_slashes(house: tuple[Server, dict[str, Model]], name: str) -> None:
    """Load, describe, pin, reload, unpin, unload of one model; each is visible in the description that follows."""
    server, models = house
    path = quote_name(name)
    loaded = server.fleet("load", path).json()
    assert loaded["model"] == name
    assert server.ask(models[name].question(0)).cache == "hit"
    described = server.http.get(f"{server.addresses['management']}/fleet/models/{path}").json()
    (holder,) = described["holders"]
    assert (described["model"], described["pinned"]) == (name, False)
    assert (holder["state"], holder["version"]) == ("ready", loaded["version"])
    assert "forecast" not in holder
    assert server.fleet("pin", path).json() == {**loaded, "pinned": True}
    assert server.models()[name]["pinned"]
    assert server.fleet("reload", path).json() == {**loaded, "holders": 1}
    assert server.fleet("unpin", path).json() == {"model": name, "pinned": False}
    assert server.fleet("unload", path).json() == {
        "model": name,
        "unloaded_from": [holder["worker"]],
    }
    assert name not in server.models()
    missing = server.http.get(f"{server.addresses['management']}/fleet/models/{path}")
    assert missing.status_code == 404
    assert name in missing.json()["error"]["message"]
    assert server.fleet("unload", path).json() == {"model": name, "unloaded_from": []}


def test_escaped_slashes_are_slashes(house: tuple[Server, dict[str, Model]]) -> None:
    """`%2F` in a path and `/` name the same model."""
    server, _ = house
    plain = server.fleet("load", "au/nsw1/raise.mar").json()
    assert server.fleet("load", "au%2Fnsw1%2Fraise.mar").json() == plain


def test_a_description_says_what_a_forecast_needs(house: tuple[Server, dict[str, Model]]) -> None:
    """The clock, the covariates' names and the tails of a resident forecaster."""
    server, _ = house
    server.fleet("load", "au/nsw1/raise.mar")
    described = server.http.get(f"{server.addresses['management']}/fleet/models/au/nsw1/raise.mar").json()
    found = described["holders"][0]["forecast"]
    assert (found["time_zone"], found["origin"], found["dynamic_feat"]) == ("UTC", "any", [])
    assert found["tail"].startswith(("none", "clamp"))


def test_the_examples_of_a_description_work_when_pasted(house: tuple[Server, dict[str, Model]]) -> None:
    """What management, the SDK and `fleetcast invoke --example` show is answered; the list shows no examples."""
    server, _ = house
    name = "au/nsw1/raise.mar"
    server.fleet("load", name)
    described = server.http.get(f"{server.addresses['management']}/fleet/models/{name}").json()
    recipe = described["holders"][0]["forecast"]
    assert {"cat", "dynamic_feat", "history_length", "products", "quantile_levels", "step_s"} <= recipe.keys()
    assert "example" not in server.models(prefix=name)[name]
    command = [sys.executable, "-m", "server.cli.main", "invoke", name, "--example", "--url", server.url]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with Client(server.url) as client:
        for example in (described["example"], client.example(name), json.loads(printed)):
            answer = json.loads(client.invoke(name, json.dumps(example).encode()).body)
            assert len(answer["predictions"][0]["mean"]) == recipe["prediction_length"]


def test_the_list_is_paged_and_filtered(house: tuple[Server, dict[str, Model]]) -> None:
    """`prefix`, `limit` and `after` walk over all names, each once, in order."""
    server, models = house
    for name in models:
        assert server.fleet("load", quote_name(name)).is_success
    assert set(server.models(prefix="au/nsw1/")) == {name for name in models if name.startswith("au/nsw1/")}
    seen: list[str] = []
    after = ""
    while True:
        query = {"limit": "1", "after": after}
        page = server.http.get(f"{server.addresses['management']}/fleet/models", params=query).json()
        seen += [row["model"] for row in page["models"]]
        after = page["next_after"]
        if after is None:
            break
    assert seen == sorted(server.models())
    assert set(models) <= set(seen)


def test_paths_that_are_none_are_told_in_json(house: tuple[Server, dict[str, Model]]) -> None:
    """A wrong path is 404 and a wrong method 405, both in the listener's own error shape."""
    server, _ = house
    for method, path, status in (("GET", "/fleet/nothing", 404), ("GET", "/fleet/load/au/nsw1.mar", 405)):
        answer = server.http.request(method, server.addresses["management"] + path)
        assert answer.status_code == status
        assert path in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("verb", "path", "status"),
    [
        ("load", "au/absent.mar", 404),
        ("pin", "au/absent.mar", 404),
        ("load", "au//nsw1.mar", 400),
        ("load", "au/%2E%2E/nsw1.mar", 400),
        ("load", "au/nsw1%01.mar", 400),
    ],
)
def test_verbs_refuse_what_cannot_be(house: tuple[Server, dict[str, Model]], verb: str, path: str, status: int) -> None:
    """A model that is not in the store, and names that break a rule: status, message, and nothing is pinned."""
    server, _ = house
    answer = server.fleet(verb, path)
    assert answer.status_code == status
    assert "nsw1" in answer.json()["error"]["message"] or "absent" in answer.json()["error"]["message"]
    assert not any(row["pinned"] for row in server.models().values())


def test_unload_waits_for_requests_that_wait(s3: S3Server, store: str, serve: Serve) -> None:
    """Requests wait for a slow load when the operator unloads: they are answered, then the reply comes, and by then the
    model is gone; the next request loads it again.
    """
    (model,) = pack_fleet("busy", 1)
    upload(s3, store, [model])
    with serve() as server, ThreadPoolExecutor(9) as pool, s3.hold(model.name) as loading:
        asked = [pool.submit(server.ask, model.question(i)) for i in range(8)]
        wait_until(lambda: server.total("fleetcast_model_cache_requests_total") == 8, "all requests are waiting")
        unloading = pool.submit(server.fleet, "unload", model.name)
        assert model.name in server.models()
        loading.set()
        reply = unloading.result(PATIENCE_S)
        assert model.name not in server.models()
        assert reply.json()["unloaded_from"] == [0]
        assert sorted(future.result(PATIENCE_S).cache for future in asked) == ["coalesced"] * 7 + ["miss"]
        assert server.ask(model.question(9)).cache == "miss"


def test_unload_under_load_fails_nobody(s3: S3Server, store: str, serve: Serve) -> None:
    """Unloaded again and again while clients keep asking: every request is answered right."""
    (model,) = pack_fleet("busy", 1)
    upload(s3, store, [model])
    with serve() as server:
        with Load(server, [model.question(i) for i in range(5)], pause_s=0.001) as load:
            for _ in range(30):
                load.more(5)
                assert server.fleet("unload", model.name).json()["unloaded_from"] == [0]
        assert [outcome.problem for outcome in load.outcomes if outcome.problem] == []
        assert server.total("fleetcast_model_cache_requests_total", result="miss") >= 30


def test_pins_survive_pressure(s3: S3Server, store: str, serve: Serve) -> None:
    """Three of eleven places pinned, others scanned twice over: the pinned stay hits and were never loaded again."""
    pinned, others = pack_fleet("pinned", 3), pack_fleet("scan", 2 * PLACES, seed=100)
    upload(s3, store, [*pinned, *others])
    settings = {"model_cache_bytes": SLAB, "slab_bytes": SLAB, "pin": [pinned[0].name]}
    with serve(**settings) as server:
        wait_until(lambda: pinned[0].name in server.resident(), "the pin of the settings is loaded at start")
        for model in pinned[1:]:
            assert server.fleet("pin", model.name).is_success
        for model in others * 2:
            server.ask(model.question(0))
        assert server.total("fleetcast_model_evictions_total") > PLACES
        assert [server.ask(model.question(1)).cache for model in pinned] == ["hit"] * 3
        assert all(len(s3.seen("GET", f"{store}/{model.name}")) == 1 for model in pinned)
        assert server.fleet("unpin", pinned[0].name).is_success
        for model in others:
            server.ask(model.question(0))
        assert server.ask(pinned[0].question(2)).cache == "miss", "unpinned, it goes like everyone else"


def test_pins_that_fill_the_budget_refuse_others_clearly(s3: S3Server, store: str, serve: Serve) -> None:
    """All places pinned: another model, of the same family or not, is a ModelError with original status 507 that says
    what to do; nobody is evicted; after an unpin it is served.
    """
    pinned, one_more = pack_fleet("pinned", PLACES), pack_fleet("more", 1, seed=50)[0]
    stranger = pack_forecaster("more/mlp.mar", 1, "mlp", SMALL_MLP)
    upload(s3, store, [*pinned, one_more, stranger])
    with serve(model_cache_bytes=SLAB, slab_bytes=SLAB) as server:
        for model in pinned:
            assert server.fleet("pin", model.name).is_success
        for model in (one_more, stranger):
            with pytest.raises(ClientError) as caught:
                server.ask(model.question(0))
            response = caught.value.response
            assert type(caught.value).__name__ == "ModelError"
            assert response["OriginalStatusCode"] == 507
            assert model.name in response["OriginalMessage"]
            assert "unpin some or raise model_cache_bytes" in response["OriginalMessage"]
        assert server.fleet("load", one_more.name).status_code == 507
        assert server.resident() == {model.name for model in pinned}
        assert server.total("fleetcast_model_evictions_total") == 0
        server.fleet("unpin", pinned[0].name)
        assert server.fleet("load", one_more.name).is_success
        assert server.resident() == {model.name for model in [*pinned[1:], one_more]}
