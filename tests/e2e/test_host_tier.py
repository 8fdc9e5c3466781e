"""The host memory tier with real processes. On the CPU it duplicates the memory of the device, only for tests."""

import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Serve
from tests.e2e.models import pack_fleet
from tests.e2e.server import upload
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e


def test_an_evicted_model_returns_from_host_memory_alone(
    s3: S3Server, store: str, serve: Serve, tmp_path: Path
) -> None:
    """One slab of models more than fit, asked in turn and then again: the first returns with tier `host` and the right
    numbers, though by then its disk copies are deleted and the store hears nothing.
    """
    models = pack_fleet("shelf", 24)
    upload(s3, store, models)
    with serve(workers=1, slab_bytes=65536, model_cache_bytes=65536, host_cache_bytes=1 << 20) as server:
        for model in models:
            server.ask(model.question(0))
        gone = next(model for model in models if model.name not in server.resident())
        asked = len(s3.seen("GET", store))
        folders = list(tmp_path.rglob("blobs"))
        assert folders
        for blobs in folders:
            shutil.rmtree(blobs)
        answer = server.ask(gone.question(1))
        assert answer.cache == "miss"
        assert 'desc="host"' in answer.headers["server-timing"]
        assert len(s3.seen("GET", store)) == asked
        assert server.total("fleetcast_model_loading_seconds_count", tier="host") == 1
        assert server.total("fleetcast_model_cache_bytes", tier="host") > 0
        assert server.total("fleetcast_model_cache_capacity_bytes", tier="host") == 1 << 20
