"""The tick's benchmark: the calls that it sends are of equal content, its floor is measured, its table has all."""

import http.client
import json
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from loadtest import record
from loadtest.benchmarks import many_models
from loadtest.benchmarks.call_ways import (
    SIZES,
    CallWay,
    list_market_calls,
    list_tick_calls,
    measure_rate,
    write_market,
)
from loadtest.driver.call_encodings import Encoding
from loadtest.observe.local_server import run_local_server
from server.contract import JSON, NPY
from server.front.call_items import Item
from server.front.columns.table_calls import read_table_call
from server.front.exchange import Limit
from server.front.slices import finish_slices
from server.ipc.packed import TableRow, cast_numbers
from tests.patience import PATIENCE_S


def read_call(way: CallWay) -> list[tuple[str, str, list[Any]]]:
    """Model, start and target of each forecast, as a front reads them."""
    limit = Limit(10**7, "max_body_bytes")
    if way.media == JSON:
        asked = json.loads(way.body)["requests"]
        return [(each["target_model"], each["start"], each["target"]) for each in asked]
    items = finish_slices(read_table_call(way.body, limit, way.media)).items
    rows = [(item.model, item.instance) for item in items if isinstance(item, Item)]
    return [
        (model, row.start, cast_numbers(memoryview(row.series[0]), row.code).tolist())
        for model, row in rows
        if isinstance(row, TableRow)
    ]


def test_all_calls_ask_for_the_same() -> None:
    """Tables have the numbers of the JSON calls, of the tick and of the market."""
    encodings = many_models.list_encodings()
    assert Encoding.NPY in encodings
    names = [f"m{i}.mar" for i in range(max(SIZES))]
    ticks = list(list_tick_calls(names, encodings))
    assert [each.forecasts for each in ticks] == [size for size in SIZES for _ in encodings]
    for at in range(0, len(ticks), len(encodings)):
        first, *others = (read_call(each) for each in ticks[at : at + len(encodings)])
        assert [model for model, _, _ in first] == names[: len(first)]
        assert all(each == first for each in others)
    market = list(list_market_calls(names[:3], encodings))
    first, *others = (read_call(each) for each in market[: len(encodings)])
    assert all(each == first for each in others)
    assert [each.accept for each in market[len(encodings) :]] == [NPY, JSON]


@pytest.mark.e2e
def test_a_server_answers_each_way(tmp_path: Path) -> None:
    """The market's calls and a tick's are answered without a fault; one with an error in it is a fault."""
    products = write_market(tmp_path)
    with run_local_server(str(tmp_path), ["--workers", "1"]) as server:
        connection = http.client.HTTPConnection(urlsplit(server.inference).netloc, timeout=PATIENCE_S)
        with closing(connection):
            for way in list_market_calls(products, many_models.list_encodings()):
                assert measure_rate(connection, way) > 0
            for way in list_market_calls([*products[:-1], "none.mar"], many_models.list_encodings()):
                with pytest.raises(RuntimeError, match=r"1 of 45 forecasts failed|answered 4\d\d"):
                    measure_rate(connection, way)


def test_the_table_has_each_way_and_the_floor() -> None:
    """A row for each way to ask; only the largest calls are compared with the floor of as many."""
    spread = record.summarise_spread([1000.0])
    row = {"per_s": spread, "ratio": spread, "before": spread}
    floor = 64 / many_models.measure_floor(["m"] * 64)
    results = {
        "1000 models, table": row,
        "single calls": {**row},
        "45 x 300 x 5, npy": {"per_s": spread},
        "floor_per_s": floor,
        "beside_commit": "abc",
    }
    table = many_models.build_table(results)
    assert table.row_count == 3
    assert floor > 0
    cells = [list(column.cells) for column in table.columns]
    assert (cells[0], cells[4][1]) == (["1000 models, table", "single calls", "45 x 300 x 5, npy"], "")
    assert (cells[2][2], cells[3][2]) == ("", "")
    assert cells[4][0] == f"{floor / 1000:.1f}"
