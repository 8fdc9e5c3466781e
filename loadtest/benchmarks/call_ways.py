"""The calls of `bench many-models`: a tick of many models and a market's long forecasts, in each encoding.

A market is 45 products x 300 steps: 5 of its 7 quantiles by one call, and 100 joint scenarios by another, from the
archives of `bench scenarios-http`. An answer is checked after it was timed, row by row.
"""

import http.client
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loadtest.benchmarks.scenarios import PRODUCTS, SCENARIOS, SEED, STEPS
from loadtest.benchmarks.scenarios_http import CONTEXT, JOINTLY, write_store
from loadtest.driver.call_encodings import Encoding, count_failed, encode_call, find_answer_fault
from loadtest.driver.dialects import find_fault
from loadtest.driver.market_client import write_turn_bodies
from loadtest.fleets.network_shape import PREDICTION, make_request
from model_store.names import ModelName
from server.contract import FORECASTS_PATH, JSON, NPY

SIZES = (100, 500, 1000)
NAMES: Mapping[Encoding, str] = {Encoding.JSON: "JSON", Encoding.ARROW: "table", Encoding.NPY: "npy"}
MARKET = f"{PRODUCTS} x {STEPS} x"
ASKED = ("0.05", "0.25", "0.5", "0.75", "0.95")


class CallWay(NamedTuple):
    """A call: its name, its body, the forecasts in it, and what finds a fault in its answer."""

    name: str
    body: bytes
    media: str
    accept: str
    forecasts: int
    find_fault: Callable[[bytes], str | None]


def list_tick_calls(names: Sequence[str], encodings: Sequence[Encoding]) -> Iterator[CallWay]:
    """Calls for 100, 500 and 1,000 models, a day of hours each."""
    (instance,) = make_request(SEED)["instances"]
    for size in SIZES:
        for encoding in encodings:
            name = f"{size} models, {NAMES[encoding]}"
            yield _make_table_call(name, _name_each(instance, names[:size]), {}, encoding, PREDICTION)


def write_market(store: Path) -> list[ModelName]:
    """Write the archives of the market's products, and of what they have in common, beside others."""
    return write_store(store, PRODUCTS, STEPS, "product")


def list_market_calls(names: Sequence[str], encodings: Sequence[Encoding]) -> Iterator[CallWay]:
    """The market's quantiles in each encoding, and its scenarios by JSON, answered as npy and as JSON."""
    (instance,) = make_request(SEED, steps=CONTEXT)["instances"]
    requests = _name_each(instance, names)
    asked = {"output_types": ["quantiles"], "quantiles": list(ASKED)}
    for encoding in encodings:
        name = f"{MARKET} {len(ASKED)}, {NAMES[encoding]}"
        yield _make_table_call(name, requests, asked, encoding, STEPS)
    body = write_turn_bodies(requests, JOINTLY, SCENARIOS, SEED).scenarios
    shape = (SCENARIOS, len(names), STEPS)
    name = f"{MARKET} {SCENARIOS} joint"
    yield CallWay(f"{name}, npy", body, JSON, NPY, len(names), partial(_find_scenarios_fault, shape=shape))
    whole = partial(_find_forecasts_fault, encoding=Encoding.JSON, forecasts=len(names))
    yield CallWay(f"{name}, JSON", body, JSON, JSON, len(names), whole)


def measure_rate(connection: http.client.HTTPConnection, way: CallWay) -> float:
    """Measure forecasts a second, from the first byte sent to the last received. Raises RuntimeError for a fault."""
    started = time.perf_counter()
    connection.request("POST", FORECASTS_PATH, way.body, {"Content-Type": way.media, "Accept": way.accept})
    reply = connection.getresponse()
    answer = reply.read()
    seconds = time.perf_counter() - started
    why = way.find_fault(answer) if reply.status == http.HTTPStatus.OK else repr(answer[:300])
    if why is not None:
        raise RuntimeError(f"{way.name}: answered {reply.status}: {why}")
    return way.forecasts / seconds


def _make_table_call(
    name: str, requests: Sequence[Mapping[str, Any]], asked: Mapping[str, Any], encoding: Encoding, steps: int
) -> CallWay:
    body = encode_call(requests, asked, encoding)
    find = partial(_find_forecasts_fault, encoding=encoding, forecasts=len(requests), steps=steps)
    return CallWay(name, body, encoding.media, encoding.media, len(requests), find)


def _name_each(instance: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    return [{"target_model": name, **instance} for name in names]


def _find_forecasts_fault(answer: bytes, encoding: Encoding, forecasts: int, steps: int | None = None) -> str | None:
    if why := find_answer_fault(answer, encoding, forecasts, steps):
        return why
    failed = count_failed(answer, encoding)
    return None if failed == 0 else f"{failed} of {forecasts} forecasts failed"


def _find_scenarios_fault(answer: bytes, shape: tuple[int, ...]) -> str | None:
    if why := find_fault(answer):
        return why
    found = np.load(io.BytesIO(answer), allow_pickle=False).shape
    return None if found == shape else f"scenarios {found}, and {shape} were asked"
