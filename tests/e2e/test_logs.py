"""The log never decides whether a request is answered: its reader has stopped, or is gone."""

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.models import pack_forecaster
from tests.e2e.server import run_server, upload
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODELS = [pack_forecaster(f"m{i}.mar", seed=i) for i in range(3)]
MADE_UP = 400  #: requests for names that do not exist; a warning each, were they not limited


@pytest.mark.parametrize("reader", ["gone", "stopped"])
def test_a_server_without_a_reader_of_its_log_serves(s3: S3Server, store: str, tmp_path: Path, reader: str) -> None:
    """It starts, loads, refuses, restarts a dead worker and ends."""
    upload(s3, store, MODELS)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    if reader == "gone":
        os.close(reading)
    try:
        with run_server(s3, tmp_path, f"s3://{store}", output=writing) as server:
            server.ask(MODELS[0].question(0))
            with ThreadPoolExecutor(8) as pool:
                refused = pool.map(lambda i: server.post(f"made/up{i}.mar").status_code, range(MADE_UP))
                assert set(refused) == {400}
            server.ask(MODELS[1].question(0))
            (worker,) = server.processes("worker")
            os.kill(worker["pid"], signal.SIGKILL)
            wait_until(
                lambda: [row["pid"] for row in server.processes("worker") if row["up"]] not in ([], [worker["pid"]]),
                "a new worker",
            )
            server.ask(MODELS[2].question(0))
    finally:
        os.close(writing)
        if reader == "stopped":
            os.close(reading)
