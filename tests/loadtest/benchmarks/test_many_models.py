"""The tick's benchmark: the calls that it sends are of equal content, its floor is measured, its table has all."""

import json

from loadtest import record
from loadtest.benchmarks import many_models
from loadtest.fleets.network_shape import make_request


def test_both_calls_ask_for_the_same() -> None:
    """The table has the numbers of the JSON call."""
    request, names = make_request(1), ["a.mar", "b.mar"]
    asked = json.loads(many_models.write_call(request, names))["requests"]
    body = many_models.write_table(request, names)
    assert [each["target_model"] for each in asked] == names
    if body is not None:
        import pyarrow as pa  # noqa: PLC0415 -- an extra

        table = pa.ipc.open_stream(body).read_all()
        assert table["target"].to_pylist() == [each["target"] for each in asked]
        assert table["model"].to_pylist() == names
        assert table.schema.metadata[b"start"].decode() == asked[0]["start"]


def test_the_table_has_each_way_and_the_floor() -> None:
    """A row for each way to ask; only the largest calls are compared with the floor of as many."""
    spread = record.summarise_spread([1000.0])
    row = {"per_s": spread, "ratio": spread, "before": spread}
    floor = 64 / many_models.measure_floor(["m"] * 64)
    results = {"1000 models, table": row, "single calls": {**row}, "floor_per_s": floor, "beside_commit": "abc"}
    table = many_models.build_table(results)
    assert table.row_count == 2
    assert floor > 0
    cells = [list(column.cells) for column in table.columns]
    assert (cells[0], cells[4][1]) == (["1000 models, table", "single calls"], "")
    assert cells[4][0] == f"{floor / 1000:.1f}"
