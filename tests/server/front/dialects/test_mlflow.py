"""MLflow's dialect without a worker: its paths, its tables, and bounds that hold before anything is decoded."""

import asyncio
import json

import pytest

from server.errors import Situation
from server.front.app import App
from server.front.dialects.mlflow import STATUS, Endpoint, MLflow, name_error
from server.front.forecasting.bodies import MAX_VALUES
from server.metrics import FrontMetrics
from server.settings import Settings
from tests.server.front.answering import Worker, ask, attach


def test_the_table_has_every_situation() -> None:
    """Nothing but success is missing, and every status has a code of MLflow's."""
    assert STATUS.keys() == set(Situation) - {Situation.OK}
    assert name_error(404) == "RESOURCE_DOES_NOT_EXIST"
    assert (name_error(424), name_error(502)) == ("BAD_REQUEST", "INTERNAL_ERROR")


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/serving-endpoints/m.mar/invocations", "m.mar"),
        ("/serving-endpoints/au/NSW1.mar/invocations", "au/NSW1.mar"),
        ("/serving-endpoints/a/invocations/b/invocations", "a/invocations/b"),
        ("/serving-endpoints", None),
        ("/invocations", None),
    ],
)
def test_the_name_stands_between_the_prefix_and_the_last_word(path: str, model: str | None) -> None:
    """Slashes are part of names; the paths that SageMaker has are its dialect's."""
    found = MLflow(Settings.model_validate({"store": "s"})).match("POST", path)
    assert (found.model if isinstance(found, Endpoint) else None) == model


@pytest.mark.parametrize(
    ("body", "media"),
    [
        (b'{"dataframe_split":{"data":[[' + b"1," * MAX_VALUES + b"1]]}}", "application/json"),
        (b'{"dataframe_records":[' + b"{}," * MAX_VALUES + b"{}]}", "application/json"),
        (b"ds,y\n" + b"1,1\n" * MAX_VALUES, "text/csv"),
        (b'{"inputs":[' + b"[1]," * 2000 + b"[1]]}", "application/json"),
    ],
)
def test_values_are_counted_before_they_are_decoded(body: bytes, media: str) -> None:
    """A frame of too many cells, or too many rows of tensors, is refused, and nothing is inferred."""
    app = App(Settings.model_validate({"store": "s"}), FrontMetrics())
    worker = Worker(lambda _: json.dumps({"inputs": [{"name": "x"}], "outputs": []}).encode())
    attach(app.plane, worker)
    path = "/serving-endpoints/m.mar/invocations"
    reply = asyncio.run(ask(app, "POST", path, body, {"content-type": media}))
    assert reply.status in (400, 413), reply.body
    assert not [each for each in worker.asked if each.body]
    assert app.plane.held.size == 0
