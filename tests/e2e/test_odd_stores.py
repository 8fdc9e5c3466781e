"""Stores as they come: names of any characters through the whole server, and folders that are swapped under it."""

import json
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.e2e.models import FORECAST_TCN, pack_forecaster
from tests.e2e.server import run_server, upload
from tests.model_store.stores.test_s3_store import CHARACTERS
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("kind", ["s3", "folder"])
def test_names_of_any_characters_are_served(s3: S3Server, store: str, tmp_path: Path, kind: str) -> None:
    """Through boto3, as items of a call for many models, by management's paths, and from disk after an unload."""
    models = [pack_forecaster(name, seed, config=FORECAST_TCN, forecast=True) for seed, name in enumerate(CHARACTERS)]
    where = f"s3://{store}" if kind == "s3" else str(tmp_path / "models")
    if kind == "s3":
        upload(s3, store, models)
    else:
        for model in models:
            (tmp_path / "models" / model.name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "models" / model.name).write_bytes(model.data)
    with run_server(s3, tmp_path, where) as server:
        for model in models:
            assert server.ask(model.question(0)).cache == "miss"
            assert server.fleet("unload", quote(model.name)).json()["unloaded_from"] == [0]
            assert server.ask(model.question(1)).cache == "miss"
        assert server.resident() == set(CHARACTERS)
        requests = [{"target_model": model.name, **_get_instance(model.question(2).body)} for model in models]
        found = server.http.post(f"{server.url}/v1/forecasts", json={"requests": requests}).json()
        assert found["failed"] == 0


def _get_instance(body: bytes) -> dict[str, object]:
    """The one instance of a DeepAR request."""
    instance: dict[str, object] = json.loads(body)["instances"][0]
    return instance


def test_a_folder_is_swapped_under_the_server(s3: S3Server, tmp_path: Path) -> None:
    """The store is a link, as git-sync makes one: after the swap a reload takes the new archive, and new ones load."""
    old, new, other = pack_forecaster("a.mar", 1), pack_forecaster("a.mar", 2), pack_forecaster("b.mar", 3)
    for revision, models in (("rev1", [old]), ("rev2", [new, other])):
        (tmp_path / revision).mkdir()
        for model in models:
            (tmp_path / revision / model.name).write_bytes(model.data)
    (tmp_path / "current").symlink_to("rev1")
    with run_server(s3, tmp_path, str(tmp_path / "current"), revalidate_s=0.01) as server:
        server.ask(old.question(0))
        (tmp_path / "new").symlink_to("rev2")
        (tmp_path / "new").replace(tmp_path / "current")
        shutil.rmtree(tmp_path / "rev1")
        assert server.fleet("reload", "a.mar").is_success
        server.ask(new.question(0))
        server.ask(other.question(0))
