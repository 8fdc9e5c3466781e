"""Doubtful histories against a real server: each dialect marks them, the fallback answers, metrics count."""

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from model_store.archives.manifest import Fallback, HistoryRules
from server.contract import HEADER_QUALITY, HEADER_TARGET_MODEL
from tests.e2e.forecasters import HISTORY, LEVELS, pack_hourly
from tests.e2e.server import Server, run_server
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

RULED, PLAIN = "au/NSW1.mar", "au/old.mar"
SOUND = [50.0 + i % 24 + 0.01 * i for i in range(HISTORY)]
FLAT = [*SOUND[:-10], *[SOUND[-11]] * 10]
EMPTY = [None] * HISTORY
STEPS = tuple(-2.0 + i for i in range(len(LEVELS)))
RULES = HistoryRules(
    flat_steps=6, stale_steps=12, low=-500, high=500, fallback=Fallback(near=STEPS, far=STEPS, usual=(STEPS,))
)


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one model with rules and a fallback, and of one without either."""
    bucket = s3.bucket()
    with closing(s3.client()) as client:
        client.put_object(Bucket=bucket, Key=RULED, Body=pack_hourly(1, history=RULES))
        client.put_object(Bucket=bucket, Key=PLAIN, Body=pack_hourly(1))
    with run_server(s3, tmp_path_factory.mktemp("quality"), f"s3://{bucket}", model_cache_bytes="64MiB") as server:
        yield server


def post(house: Server, path: str, body: Any, **headers: str) -> httpx.Response:
    """One call, answered with 200."""
    answer = house.http.post(f"{house.url}{path}", json=body, headers=headers, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return answer


def instance(target: Any, **more: Any) -> dict[str, Any]:
    """One series."""
    return {"start": "2026-01-01 00:00:00", "target": target, **more}


def test_each_dialect_marks_what_is_doubtful(house: Server) -> None:
    """The header says how many predictions there are of each kind, and where a body has room, which."""
    model, flat = {HEADER_TARGET_MODEL: RULED}, "flat=1, fallback=1"
    for path, headers in (("/invocations", model), (f"/predictions/{RULED}", {}), (f"/models/{RULED}/invoke", {})):
        answer = post(house, path, {"instances": [instance(SOUND), instance(FLAT)]}, **headers)
        sound, doubtful = answer.json()["predictions"]
        assert answer.headers[HEADER_QUALITY] == flat
        assert "quality" not in sound
        assert doubtful["quality"] == ["flat", "fallback"]
    answer = post(house, "/invocations", {"instances": [instance(SOUND)]}, **model)
    assert HEADER_QUALITY not in answer.headers
    requests = [instance(each, target_model=RULED) for each in (FLAT, SOUND, FLAT)]
    answer = post(house, "/v1/forecasts", {"requests": requests})
    assert answer.headers[HEADER_QUALITY] == "flat=2, fallback=2"
    assert [each.get("quality", []) for each in answer.json()["predictions"]][1] == []
    given = {"name": "n", "type": "univariate_time_series", "series": FLAT, "frequency": "H"}
    given["start_timestamp"] = "2026-01-01T00:00:00Z"
    answer = post(house, "/v1/timeseries/forecast", {"model": RULED, "inputs": [given], "options": {"horizon": 24}})
    assert answer.headers[HEADER_QUALITY] == flat
    series = {"y": FLAT, "sizes": [HISTORY]}
    answer = post(house, "/v2/forecast", {"model": RULED, "freq": "h", "h": 24, "series": series})
    assert answer.headers[HEADER_QUALITY] == flat
    text = json.dumps({"instances": [instance(FLAT)]})
    asked = {"inputs": [{"name": "request", "shape": [1], "datatype": "BYTES", "data": [text]}]}
    answer = post(house, f"/v2/models/{RULED}/infer", asked)
    assert answer.headers[HEADER_QUALITY] == flat
    lines = "\n".join(json.dumps(instance(each)) for each in (SOUND, FLAT))
    headers = {**model, "content-type": "application/jsonlines"}
    answer = house.http.post(f"{house.url}/invocations", content=lines, headers=headers, timeout=PATIENCE_S)
    assert answer.headers[HEADER_QUALITY] == flat


def test_the_fallback_answers_and_is_counted(house: Server) -> None:
    """Without any value it is the band of all prices; an archive of before answers as it did, and says so."""
    answer = post(house, "/invocations", {"instances": [instance(EMPTY)]}, **{HEADER_TARGET_MODEL: RULED})
    (found,) = answer.json()["predictions"]
    assert answer.headers[HEADER_QUALITY] == "empty=1, fallback=1"
    assert [row[0] for row in found["quantiles"].values()] == [60 + 20 * step for step in STEPS]
    answer = post(house, "/invocations", {"instances": [instance(EMPTY)]}, **{HEADER_TARGET_MODEL: PLAIN})
    assert answer.headers[HEADER_QUALITY] == "empty=1"
    counted = [
        line for line in house.exposition().splitlines() if line.startswith("fleetcast_doubtful_histories_total")
    ]
    codes = {line.partition('code="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in counted}
    assert codes["empty"] >= 1
    assert codes["fallback"] >= codes.get("flat", 0)
    assert set(codes) <= {"filled", "missing", "empty", "short", "flat", "stale", "shifted", "range", "fallback"}
