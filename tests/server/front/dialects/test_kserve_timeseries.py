"""KServe's time-series dialect without a worker: its table, and bounds that hold before anything is decoded."""

import asyncio
import json

import pytest

from server.errors import Situation
from server.front.app import App
from server.front.dialects.kserve_timeseries import STATUS
from server.front.forecasting.bodies import MAX_VALUES
from server.metrics import FrontMetrics
from server.settings import Settings
from tests.server.front.answering import Worker, ask, attach

BIG = b'{"model":"m","options":{"horizon":1},"inputs":[{"type":"t","name":"n","frequency":"h","series":['


def test_the_table_has_every_situation() -> None:
    """Nothing but success is missing from it."""
    assert STATUS.keys() == set(Situation) - {Situation.OK}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 422, None),
        (b"[]", 422, None),
        (b"{", 422, None),
        (b'{"model":' + b"[" * 100_000, 422, None),
        (BIG + b"1," * MAX_VALUES + b"1]}]}", 413, None),
        (b'{"model":"m","inputs":[]}', 422, "options"),
        (b'{"model":"m","inputs":[],"options":{"horizon":"x"}}', 422, "options.horizon"),
        (b'{"model":"m","inputs":[],"options":{"horizon":0}}', 422, "options.horizon"),
        (b'{"model":"m","inputs":[],"options":{"horizon":1,"quantiles":[1.5]}}', 422, "options.quantiles"),
        (BIG.replace(b'"model":"m",', b"") + b"1]}]}", 422, "model"),
    ],
)
def test_what_is_no_call_is_refused_unread(body: bytes, status: int, param: str | None) -> None:
    """No worker hears of it, and the error names the field."""
    app = App(Settings.model_validate({"store": "s"}), FrontMetrics())
    worker = Worker(lambda _: b"")
    attach(app.plane, worker)
    reply = asyncio.run(ask(app, "POST", "/v1/timeseries/forecast", body))
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["code"], worker.asked) == (status, str(status), [])
    if param is not None:
        assert error["param"] == param
