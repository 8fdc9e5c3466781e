"""Calls in three encodings: a front reads the same of each; what is wrong with an answer as a table is found."""

import io
import json
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from loadtest.driver.call_encodings import Encoding, count_failed, encode_call, find_answer_fault
from loadtest.driver.request_bodies import RequestBody, join_requests
from model_store.names import ModelName
from server.contract import FORECASTS_END_BYTES, JSON, NPY
from server.errors import Refused, Situation
from server.front.call_items import Item
from server.front.columns.answered_table import read_runs, write_arrow
from server.front.columns.npy_writer import write_npy
from server.front.columns.table_calls import read_table_call
from server.front.dialects.forecasts import build_answer, parse_call
from server.front.exchange import Limit
from server.front.fan_out import Prediction
from server.front.inference import InferStats
from server.front.slices import finish_slices
from server.ipc.packed import NumbersBlock, TableRow, write_instance

LIMIT = Limit(10**6, "max_body_bytes")
START = "2026-01-01 00:00:00"
pytest.importorskip("pyarrow")
TABLES = [Encoding.ARROW, Encoding.NPY]
REQUESTS: list[dict[str, Any]] = [
    {"target_model": "a.mar", "start": START, "target": [1.0, None], "dynamic_feat": [[1, 2, 3]], "cat": [7]},
    {"target_model": "b/c.mar", "start": "2026-01-02", "target": [3.5, "NaN"], "dynamic_feat": [[4, 5, 6]], "cat": [8]},
]
STATS = InferStats("hit", 0, None, 0)


def read_items(body: bytes, encoding: Encoding) -> list[tuple[str, dict[str, Any]]]:
    """What a front reads of a call."""
    if encoding is Encoding.JSON:
        call = finish_slices(parse_call(body, LIMIT))
        whole = [json.loads(bytes(cast("Any", each).instance)) for each in call.items]
        return [(each.pop("target_model"), each) for each in whole]
    call = finish_slices(read_table_call(body, LIMIT, encoding.media))
    assert json.loads(call.configuration) == {"quantiles": ["0.1"]}
    items = [each for each in call.items if isinstance(each, Item)]
    return [(each.model, json.loads(write_instance(cast("TableRow", each.instance)))) for each in items]


@pytest.mark.parametrize("encoding", TABLES)
def test_a_front_reads_the_same_of_each(encoding: Encoding) -> None:
    """Models, starts, histories with what is missing, covariates and categories by their names."""
    encoding.check()
    ((name, first), (other, second)) = read_items(
        encode_call(REQUESTS, {"quantiles": ["0.1"]}, encoding, ("load", "region")), encoding
    )
    assert (name, other) == ("a.mar", "b/c.mar")
    assert first == {"start": START, "target": [1.0, None], "dynamic_feat": [[1, 2, 3]], "cat": [7]} | {
        "names": ["load", "region"]
    }
    assert (second["start"], second["target"], second["cat"]) == ("2026-01-02", [3.5, None], [8])
    assert read_items(encode_call(REQUESTS, {}, Encoding.JSON), Encoding.JSON)[1] == (
        "b/c.mar", {key: value for key, value in REQUESTS[1].items() if key != "target_model"}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "names", "says"),
    [
        ({"target": [1.0]}, ("load", "region"), "series of 1 to 2 numbers in 'target'"),
        ({"target": [[1.0, 2.0], [3.0, 4.0]]}, ("load", "region"), "in 'target'"),
        ({}, ("load",), "a --request does not say them"),
    ],
)
def test_what_is_no_table_is_said(change: dict[str, Any], names: tuple[str, ...], says: str) -> None:
    """Histories of two lengths, and covariates without names."""
    with pytest.raises(ValueError, match=says):
        encode_call([REQUESTS[0], {**REQUESTS[1], **change}], {}, Encoding.NPY, names)
    several = {**REQUESTS[0], "target": [[1.0, 2.0], [3.0, 4.0]]}
    with pytest.raises(ValueError, match="several products"):
        encode_call([several], {}, Encoding.NPY, ("load", "region"))


def test_models_of_other_covariates_are_no_table() -> None:
    """JSON has them in one call all the same."""
    body = json.dumps({"instances": [{"start": START, "target": [1.0]}]}).encode()
    asked = {ModelName("a.mar"): RequestBody(body, names=("load",)), ModelName("b.mar"): RequestBody(body)}
    with pytest.raises(ValueError, match="one set of columns"):
        join_requests(asked, Encoding.NPY)
    assert join_requests(asked).content_type == JSON
    same = dict.fromkeys(asked, RequestBody(body))
    assert join_requests(same, Encoding.NPY).content_type == NPY


def write_answer(encoding: Encoding, change: Callable[[list[Any]], None] = lambda _: None) -> bytes:
    """The answer of a server to a call for four forecasts of three steps, of which the third failed."""
    numbers = np.arange(6, dtype=np.float32)
    block = NumbersBlock(START, 3, True, ["0.5"], [numbers.tobytes(), (numbers + 1).tobytes()])
    other = NumbersBlock(START, 3, False, ["0.9"], [numbers[:3].tobytes()])
    found: list[Any] = [
        Prediction(block, STATS),
        Prediction(block, STATS),
        Refused(Situation.NOT_FOUND, "none"),
        Prediction(other, STATS),
    ]
    change(found)
    runs = finish_slices(read_runs([f"{i}.mar" for i in range(len(found))], found))
    write = write_arrow if encoding is Encoding.ARROW else write_npy
    return bytes(finish_slices(write(runs, LIMIT)))


@pytest.mark.parametrize("encoding", TABLES)
def test_a_sound_answer_has_no_fault(encoding: Encoding) -> None:
    """Forecasts of several levels and an error; and what failed is counted."""
    encoding.check()
    answer = write_answer(encoding)
    assert find_answer_fault(answer, encoding, 4) is None
    assert count_failed(answer, encoding) == 1
    all_failed = write_answer(encoding, lambda found: found.__setitem__(slice(None), [found[2]] * 4))
    assert (find_answer_fault(all_failed, encoding, 4), count_failed(all_failed, encoding)) == (None, 4)


def test_json_is_counted_by_its_end() -> None:
    """As it always was."""
    answer = bytes(finish_slices(build_answer([Refused(Situation.NOT_FOUND, "none")])))
    assert find_answer_fault(answer, Encoding.JSON, 1) is None
    assert find_answer_fault(answer, Encoding.JSON, 2) is not None
    assert count_failed(answer[-FORECASTS_END_BYTES:], Encoding.JSON) == 1


@pytest.mark.parametrize("encoding", TABLES)
def test_answers_that_are_no_tables(encoding: Encoding) -> None:
    """Nothing, JSON, a cut table, and one for another number of forecasts."""
    encoding.check()
    answer = write_answer(encoding)
    for body in (b"", b'{"predictions": []}', answer[:200]):
        assert find_answer_fault(body, encoding, 4) is not None
        assert count_failed(body, encoding) is None
    assert "of 4" in str(find_answer_fault(answer, encoding, 5))
    assert find_answer_fault(answer, encoding, 3) is not None
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    assert "columns" in str(find_answer_fault(array.getvalue(), Encoding.NPY, 3))


def change_rows(change: Callable[[Any], Any]) -> bytes:
    """A sound answer as npy, changed."""
    rows = np.load(io.BytesIO(write_answer(Encoding.NPY)))
    file = io.BytesIO()
    changed = change(rows)
    np.save(file, rows if changed is None else changed)
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows["mean"].__setitem__(1, np.nan), "not finite in the column mean"),
        (lambda rows: rows["0.5"].__setitem__(4, np.inf), "not finite in the column 0.5"),
        (lambda rows: rows["0.9"].__setitem__(slice(7, None), np.nan), "no numbers of forecast 3"),
        (lambda rows: rows["step"].__setitem__(1, 2), "steps"),
        (lambda rows: rows["step"].__setitem__(1, -1), "an error beside"),
        (lambda rows: rows["item"].__setitem__(1, 3), "in their order"),
        (lambda rows: rows[::-1], "in their order"),
        (lambda rows: rows[3:], "in their order"),
        (lambda rows: rows[rows["item"] != 1], "in their order"),
        (lambda rows: rows[:0], "columns"),
    ],
)
def test_rows_that_are_wrong_are_noticed(change: Callable[[Any], Any], says: str) -> None:
    """A number that is not finite, a step or a forecast that is missing, twice, or out of order."""
    assert says in str(find_answer_fault(change_rows(change), Encoding.NPY, 4))
