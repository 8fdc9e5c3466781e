"""Parquet bodies as frames. Runs in a front.

Each is read by a process of its own, `server.front.forecasting.parquet_reader`.
"""

import asyncio
import contextlib
import importlib.util
import os
import sys
import time
from pathlib import Path

import msgspec

from server.errors import Refused, Situation
from server.front.forecasting import parquet_reader
from server.front.forecasting.bodies import MAX_VALUES, decode_body
from server.front.forecasting.frames import Cell, Frame, make_frame

MEDIA = "application/vnd.apache.parquet"
PLACES = 2  #: bodies that a front has read at a time
LONGEST_S = 30.0
MOST_ANSWER_BYTES = 16 * 1024 * 1024
NOT_INSTALLED = f"{MEDIA} is not read by this server: its operator installs fleetcast[parquet]; send text/csv or JSON"
_columns = msgspec.json.Decoder(dict[str, list[Cell]])


class _Places:
    """How many bodies this front has read just now."""

    taken = 0


async def read_parquet(body: bytes, deadline: float) -> Frame:
    """The columns of a Parquet file. Raises Refused."""
    if importlib.util.find_spec("pyarrow") is None:
        raise Refused(Situation.UNSUPPORTED_CODING, NOT_INSTALLED, field="content-type")
    if _Places.taken >= PLACES:
        raise Refused(Situation.OVERLOADED, f"{PLACES} Parquet bodies are being read by this front; try again")
    _Places.taken += 1
    try:
        async with asyncio.timeout(min(LONGEST_S, deadline - time.monotonic())):
            code, said = await _run_reader(body)
    except TimeoutError:
        raise Refused(Situation.DEADLINE, "the Parquet body was not read in time") from None
    finally:
        _Places.taken -= 1
    if code == parquet_reader.TOO_MANY:
        message = (
            f"the body has {said.decode()} values, {MAX_VALUES} are the most of one call; send fewer series in one"
        )
        raise Refused(Situation.TOO_LARGE, message)
    if code == parquet_reader.NOT_READ:
        raise Refused(Situation.BAD_REQUEST, f"not a Parquet file that can be read: {said.decode(errors='replace')}")
    if code:
        message = "the Parquet body needs more memory or time than one may have; send fewer rows, or CSV"
        raise Refused(Situation.TOO_LARGE, message)
    columns = decode_body(_columns, said)
    return make_frame(list(columns), list(zip(*columns.values(), strict=True)), "the row")


async def _run_reader(body: bytes) -> tuple[int, bytes]:
    """The reader's exit code and what it has written. However this ends, the process has ended."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", str(Path(parquet_reader.__file__)), str(MAX_VALUES),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"}, limit=MOST_ANSWER_BYTES,
    )  # fmt: skip
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    try:
        with contextlib.suppress(ConnectionError):  # it ended before it had read all: its code says why
            process.stdin.write(body)
            await process.stdin.drain()
            process.stdin.close()
        said = await process.stdout.read(MOST_ANSWER_BYTES)
        while more := await process.stdout.read(MOST_ANSWER_BYTES):
            said += more
            if len(said) > MOST_ANSWER_BYTES:
                process.kill()
                break
        return await process.wait(), said
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
