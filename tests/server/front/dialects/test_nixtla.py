"""Nixtla's dialect without a worker: its paths, its table, and bounds that hold before anything is decoded."""

import asyncio
import json
from typing import Any

import pytest

from model_store.names import ModelName
from server.errors import Refused, Situation
from server.front.app import App
from server.front.dialects.nixtla import STATUS, Nixtla
from server.front.forecasting.bodies import MAX_VALUES
from server.front.forecasting.calls import MOST_FORECASTERS
from server.metrics import FrontMetrics
from server.settings import Settings
from tests.server.front.answering import Answered, Asked, Worker, ask, attach

RECIPE = {
    "frequency": "1h",
    "time_zone": "UTC",
    "history_length": 4,
    "prediction_length": 2,
    "dynamic_feat": [],
    "quantile_levels": [0.1, 0.9],
    "products": ["price"],
    "needs_start": False,
}
PREDICTION = {"predictions": [{"mean": [1.0, 2.0], "quantiles": {"0.1": [0.0, 0.5], "0.9": [3.0, 4.0]}}]}


def answer(request: Asked) -> bytes:
    """What a worker gives: a description, or the one prediction."""
    if request.content_type.endswith("describe"):
        return json.dumps({"inputs": [], "outputs": [], "parameters": {"forecast": RECIPE}}).encode()
    return json.dumps(PREDICTION).encode()


def post(body: Any, path: str = "/v2/forecast", **chosen: Any) -> tuple[Answered, Worker]:
    """One request to an app of one worker."""
    app = App(Settings.model_validate({"store": "s", **chosen}), FrontMetrics())
    worker = Worker(answer)
    attach(app.plane, worker)
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = asyncio.run(ask(app, "POST", path, sent))
    assert app.plane.held.size == 0
    return reply, worker


def make_body(**changed: Any) -> dict[str, Any]:
    """A sound request of one series."""
    return {"model": "m.mar", "freq": "h", "h": 2, "series": {"y": [1, None, 3, 4], "sizes": [4]}, **changed}


def test_the_table_has_every_situation() -> None:
    """None is left to a default; none that a repetition does not heal has a status that the client repeats."""
    assert set(STATUS) == set(Situation) - {Situation.OK}
    repeated = {situation for situation, status in STATUS.items() if status in (408, 409, 429, 502, 503, 504)}
    healed = {Situation.STORE_FAILED, Situation.OVERLOADED, Situation.NOT_READY, Situation.WORKER_LOST}
    assert repeated == healed | {Situation.SLOW_CLIENT}


@pytest.mark.parametrize(
    "path", ["/v2/models/m.mar", "/v2/models/m.mar/infer", "/v2", "/v2/health/live", "/v1/forecasts"]
)
def test_the_paths_of_other_dialects_are_not_its_own(path: str) -> None:
    """Open Inference's paths begin with `/v2` too."""
    assert Nixtla(Settings.model_validate({"store": "s"})).match("POST", path) is None


def test_a_wrong_method_is_refused() -> None:
    """A path of this dialect with another method is no other dialect's."""
    with pytest.raises(Refused, match="asked by POST, not GET"):
        Nixtla(Settings.model_validate({"store": "s"})).match("GET", "/v2/forecast")


def test_instances_and_levels_are_those_of_section_five() -> None:
    """A series is one instance, a level two quantiles in decimals, each once; keys repeat the level as it was sent."""
    reply, worker = post(make_body(level=[80, 0, 80]))
    sent = json.loads(worker.asked[1].body)
    assert sent["instances"] == [{"start": "1970-01-01 00:00:00", "target": [1.0, None, 3.0, 4.0]}]
    assert sent["configuration"] == {"output_types": ["mean", "quantiles"], "quantiles": ["0.1", "0.9", "0.5"]}
    assert reply.status == 424, "the worker gave no 0.5"
    found = json.loads(post(make_body(level=[80]))[0].body)
    assert found["intervals"] == {"lo-80": [0.0, 0.5], "hi-80": [3.0, 4.0]}
    assert (found["mean"], found["weights_x"]) == ([1.0, 2.0], None)


def test_values_are_counted_before_they_are_decoded() -> None:
    """A body of more values than the bound is 413, and no worker hears of it; so is an answer that would have more."""
    reply, worker = post(b'{"series":{"y":[' + b"1," * MAX_VALUES + b"1]}}")
    assert (reply.status, worker.asked) == (413, [])
    series = {"y": [1] * 80_000, "sizes": [8] * 10_000}
    reply, worker = post(make_body(series=series, level=list(range(1, 20))))
    assert (reply.status, len(worker.asked)) == (413, 1)
    assert "the answer has" in json.loads(reply.body)["detail"]


def test_windows_are_counted_before_they_are_made() -> None:
    """Many windows of many series are refused, however short each is."""
    series = {"y": [1] * 200_000, "sizes": [200] * 1000}
    reply, worker = post(make_body(series=series, n_windows=90, step_size=1), "/v2/cross_validation")
    assert (reply.status, len(worker.asked)) == (413, 1)
    assert "90000 windows" in json.loads(reply.body)["detail"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"series":' + b"[" * 100_000])
def test_what_is_no_request_is_400(body: bytes) -> None:
    """Nothing that a stranger sends is a bug's 500."""
    reply, worker = post(body)
    assert (reply.status, worker.asked) == (400, [])


def test_covariates_never_reach_into_the_next_series() -> None:
    """Columns without their future are refused in a forecast: what follows a series is another series' past."""
    RECIPE["dynamic_feat"] = ["demand"]
    try:
        series = {"y": [1] * 8, "sizes": [4, 4], "X": [[1] * 8]}
        reply, worker = post(make_body(series=series))
    finally:
        RECIPE["dynamic_feat"] = []
    assert (reply.status, len(worker.asked)) == (400, 1)
    assert "X_df" in json.loads(reply.body)["detail"]


def test_the_operator_says_what_the_clients_default_stands_for() -> None:
    """`timegpt-...` is asked as it is, or as `default_model`."""
    assert post(make_body(model="timegpt-2.1"))[1].asked[0].model == "timegpt-2.1"
    assert post(make_body(model="timegpt-2.1"), default_model="au/NSW1.mar")[1].asked[0].model == "au/NSW1.mar"


def test_so_many_forecasters_are_remembered() -> None:
    """Those that are asked are listed by name; a full table takes no more, and the models are answered all the same."""
    app = App(Settings.model_validate({"store": "s"}), FrontMetrics())
    attach(app.plane, Worker(answer))

    async def ask_all() -> tuple[Answered, Answered]:
        body = json.dumps(make_body()).encode()
        await ask(app, "POST", "/v2/forecast", body)
        listed = await ask(app, "GET", "/v2/models")
        app.plane.forecasters.update({ModelName(f"{i}.mar"): None for i in range(MOST_FORECASTERS)})
        return listed, await ask(app, "POST", "/v2/forecast", body.replace(b"m.mar", b"n.mar"))

    listed, late = asyncio.run(ask_all())
    assert json.loads(listed.body) == {"models": [{"name": "m.mar"}]}
    assert late.status == 200
    assert "n.mar" not in app.plane.forecasters


def test_simulations_have_no_times() -> None:
    """The client sends none, so that a model by the clock is refused with what to do, and not told to upgrade."""
    body = make_body(n_paths=2)
    assert "simulate sends no times" in json.loads(post_for(body, needs_start=True, paths=4).body)["detail"]
    assert "draws 4 paths" in json.loads(post_for(make_body(n_paths=5), paths=4).body)["detail"]
    assert post_for(make_body(n_paths=5)).status == 501


def post_for(body: Any, **recipe: Any) -> Answered:
    """The answer to a simulation of a model with this recipe."""
    described = {"inputs": [], "outputs": [], "parameters": {"forecast": {**RECIPE, **recipe}}}
    app = App(Settings.model_validate({"store": "s"}), FrontMetrics())
    attach(app.plane, Worker(lambda _: json.dumps(described).encode()))
    return asyncio.run(ask(app, "POST", "/v2/simulate/async", json.dumps(body).encode()))
