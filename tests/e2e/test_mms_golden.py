"""A recording of Multi Model Server 1.1.11, replayed against a real server: what differs is listed with its reason.

The archives are made of the handlers that answered the recording (`tests/golden/probe`), which are this project's own,
and of handlers that fail as those of the recording did; as there, some of them are folders.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.archives import make_zip
from tests.e2e.server import Server, run_server
from tests.golden.replay import (
    FOLDER,
    check_differences,
    find_differences,
    find_stale,
    read_answer,
    read_recording,
    read_table,
    send_again,
)
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

RECORDING, TABLE = "mms_1.1.11.jsonl", "mms_differences.toml"
NO_MEMORY_TO_LOAD = "class Service:\n    def initialize(self, context):\n        raise MemoryError\n"
NO_START = "class Service:\n    def initialize(self, context):\n        raise RuntimeError('no start')\n"
NO_MEMORY = "def handle(data, context):\n    if data is None:\n        return None\n    raise MemoryError\n"
HANDLE = "    def handle(self, data, context):\n        return ['OK'] * len(data)\n"


def make_members(name: str, handler: str, code: bytes) -> Mapping[str, bytes]:
    """The files of an archive as the model archiver made it for the recording."""
    model = {"modelName": name, "handler": handler, "modelVersion": "1.0"}
    manifest = {"createdOn": "01/01/2025 00:00:00", "runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    return {"MAR-INF/MANIFEST.json": json.dumps(manifest).encode(), handler: code}


def unpack(folder: Path, members: Mapping[str, bytes]) -> None:
    """The archive as a folder."""
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def server(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the recording's archives, which gives a model workers when its client says so."""
    folder = tmp_path_factory.mktemp("mms")
    store, probe = folder / "store", FOLDER / "probe"
    unpack(store / "noop-v1.0", make_members("noop", "noop_handler.py", (probe / "noop_handler.py").read_bytes()))
    for name, code in (
        ("loading-memory-error", NO_MEMORY_TO_LOAD + HANDLE),
        ("init-error", NO_START + HANDLE),
        ("prediction-memory-error", NO_MEMORY),
    ):
        unpack(store / name, make_members(name, "service.py", code.encode()))
    packed = make_zip(make_members("probe", "probe_handler.py", (probe / "probe_handler.py").read_bytes()))
    (store / "probe.mar").write_bytes(packed)
    settings = {"container": "multi-model", "default_workers_per_model": 0, "allow_code": ["*"]}
    with run_server(s3, folder, str(store), **settings) as running:
        yield running


def test_recorded_exchanges_are_answered_alike(server: Server) -> None:
    """Statuses, headers and bodies are equal but for what the table lists; the table lists nothing else."""
    table, problems, found = read_table(TABLE), list[str](), list[tuple[int, str]]()
    for number, recorded in enumerate(read_recording(RECORDING)):
        ours = send_again(server.addresses["inference"], recorded)
        differences = find_differences(read_answer(recorded), ours)
        found += ((number, place) for place in differences)
        problems += check_differences(table, number, differences)
    problems += find_stale(table, found)
    assert not problems, "\n".join(problems)


def list_operations(description: Mapping[str, Any]) -> dict[tuple[str, str], tuple[str, set[str]]]:
    """What a client can ask: path and method, with the operation's name and its parameters."""
    return {
        (path, method): (operation["operationId"], {parameter["name"] for parameter in operation["parameters"]})
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    }


def test_the_description_has_their_paths(server: Server) -> None:
    """Paths, methods, operations and parameters by OPTIONS; it is an OpenAPI document of the recorded version."""
    theirs = json.loads(read_recording(RECORDING)[2].resp_body or "")
    reply = server.http.options(f"{server.url}/")
    ours = reply.json()
    assert (ours["openapi"], ours["info"]["title"]) == (theirs["openapi"], theirs["info"]["title"])
    assert server.http.get(f"{server.url}/api-description").content == reply.content
    left_out = {
        ("/models", "post"): {"model_url", "preload_model"},  # the first is `url` in truth; all children are forked
        ("/models/{model_name}", "put"): {"number_gpu", "timeout"},
        ("/models/{model_name}", "delete"): {"synchronous", "timeout"},  # the answer is the end in any case
    }
    added = {("/models", "post"): {"url"}}
    expected = {
        place: (name, (parameters - left_out.get(place, set())) | added.get(place, set()))
        for place, (name, parameters) in list_operations(theirs).items()
    }
    assert list_operations(ours) == expected


def test_a_model_is_described_by_options(server: Server) -> None:
    """The description of one model names its path; a model that is not registered has none."""
    assert server.http.post(f"{server.url}/models?url=noop-v1.0&model_name=any").is_success
    described = server.http.options(f"{server.url}/predictions/any").json()
    assert list(described["paths"]) == ["/predictions/any"]
    assert server.http.options(f"{server.url}/predictions/nosuch").status_code == 404
    assert server.http.delete(f"{server.url}/models/any").is_success  # the recording begins without models
