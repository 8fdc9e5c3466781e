"""Parquet bodies, read by real processes: what they hold, and what they may cost."""

import asyncio
import io
import time
from typing import Any

import pytest

from server.errors import Refused, Situation
from server.front.forecasting import parquet
from server.front.forecasting.bodies import MAX_VALUES
from server.front.forecasting.frames import Frame
from server.front.forecasting.parquet import read_parquet
from tests.patience import PATIENCE_S

pa = pytest.importorskip("pyarrow", reason="the extra fleetcast[parquet] is not installed")
pytestmark = pytest.mark.slow


def pack(columns: dict[str, Any], **options: Any) -> bytes:
    """The columns as a Parquet file."""
    from pyarrow import parquet as writer  # noqa: PLC0415 -- only where it is installed

    file = io.BytesIO()
    writer.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def read(body: bytes) -> Frame:
    """The frame of a body."""
    return asyncio.run(read_parquet(body, time.monotonic() + PATIENCE_S))


def test_columns_are_those_of_the_file() -> None:
    """Times are text, what is no number is missing, and lists stay lists."""
    times = pa.array([0, 3_600_000_000], pa.timestamp("us"))
    body = pack({"ds": times, "y": [1.5, float("nan")], "item_id": ["a", None], "n": [1, 2], "l": [[1.0], [2.0, 3.0]]})
    assert read(body) == {
        "ds": ["1970-01-01 00:00:00", "1970-01-01 01:00:00"],
        "y": [1.5, None],
        "item_id": ["a", None],
        "n": [1, 2],
        "l": [[1.0], [2.0, 3.0]],
    }


@pytest.mark.parametrize("body", [b"", b"x" * 100, b"PAR1" + bytes(1000) + b"PAR1", pack({"y": [1.0] * 100})[:-20]])
def test_what_is_no_parquet_is_refused(body: bytes) -> None:
    """It is 400, with the library's reason, and the process has ended."""
    with pytest.raises(Refused, match="not a Parquet file") as refused:
        read(body)
    assert refused.value.situation is Situation.BAD_REQUEST
    assert parquet._Places.taken == 0


def test_values_are_counted_before_they_are_decoded() -> None:
    """A small body of many values, and lists that hold as many, are refused by the file's own counts."""
    for columns in ({"y": [0.0] * (MAX_VALUES + 1)}, {"y": [[0.0] * (MAX_VALUES + 1)]}):
        with pytest.raises(Refused, match=f"has {MAX_VALUES + 1} values") as refused:
            read(pack(columns, compression="zstd"))
        assert refused.value.situation is Situation.TOO_LARGE


def test_a_body_that_unpacks_to_more_than_its_process_may_have_ends_that_process_alone() -> None:
    """One text of a gibibyte and a half, in a body under the limit of bodies, is 413."""
    body = pack({"y": pa.array(["x" * (3 * 2**29)], pa.large_string())}, compression="zstd", use_dictionary=False,
                write_statistics=False)  # fmt: skip
    assert len(body) < 6 * 1024 * 1024
    with pytest.raises(Refused) as refused:
        read(body)
    assert refused.value.situation in (Situation.TOO_LARGE, Situation.BAD_REQUEST)
    assert parquet._Places.taken == 0


def test_only_so_many_are_read_at_a_time() -> None:
    """One more is told to come again."""

    async def scenario() -> None:
        body, deadline = pack({"y": [1.0]}), time.monotonic() + PATIENCE_S
        reads = (read_parquet(body, deadline) for _ in range(parquet.PLACES + 1))
        *found, last = await asyncio.gather(*reads, return_exceptions=True)
        assert found == [{"y": [1.0]}] * parquet.PLACES
        assert isinstance(last, Refused)
        assert last.situation is Situation.OVERLOADED

    asyncio.run(scenario())
