"""A recording of TorchServe 0.12.0, replayed against a real server: what differs is listed with its reason.

The archives are made of the handlers that answered the recording (`tests/golden/probe`), which are this project's own.
"""

import json
from collections.abc import Iterator

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
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

RECORDING, TABLE = "torchserve_0.12.0.jsonl", "torchserve_differences.toml"
LISTENERS = {"inf": "inference", "mgmt": "management", "met": "metrics"}
MAX_BODY = 65536
TOO_LARGE = 112  #: the exchange of which the recording has only the beginning of the body
ASYNCHRONOUS = 65  #: the registration after which the recording went on at once
DESCRIPTIONS = (3, 4, 22, 25, 58, 89)  #: exchanges that are answered with a description
#: TorchServe lists metrics with every listener although only one has them; and a path that it does not have.
NOT_DESCRIBED = {("/metrics", "get", "query name[]"), ("/prediction/probe", "post")}


def pack_probe(name: str, handler: str, version: str) -> bytes:
    """An archive as torch-model-archiver made it for the recording."""
    manifest = {
        "createdOn": "01/01/2025 00:00:00",
        "runtime": "python",
        "model": {"modelName": name, "handler": handler, "modelVersion": version},
        "archiverVersion": "0.12.0",
    }
    code = (FOLDER / "probe" / handler).read_bytes()
    return make_zip({"MAR-INF/MANIFEST.json": json.dumps(manifest).encode(), handler: code})


@pytest.fixture(scope="module")
def server(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the recording's archives, queue and time-out."""
    folder = tmp_path_factory.mktemp("torchserve")
    store = folder / "store"
    store.mkdir()
    (store / "noop.mar").write_bytes(pack_probe("noop", "noop_handler.py", "1.11"))
    (store / "probe.mar").write_bytes(pack_probe("probe", "probe_handler.py", "1.0"))
    (store / "probe2.mar").write_bytes(pack_probe("probe", "probe_handler.py", "2.0"))
    settings = {"allow_code": ["*"], "queue_per_model": 2, "code_timeout_s": 5, "max_body_bytes": MAX_BODY}
    with run_server(s3, folder, str(store), **settings) as running:
        yield running


def test_recorded_exchanges_are_answered_alike(server: Server) -> None:
    """Statuses, headers and bodies are equal but for what the table lists; the table lists nothing else."""
    table, problems, found = read_table(TABLE), list[str](), list[tuple[int, str]]()
    for number, recorded in enumerate(read_recording(RECORDING)):
        if any(entry.names(number, "") for entry in table.left_out):
            continue
        body = recorded.sent + b" " * MAX_BODY if number == TOO_LARGE else None
        ours = send_again(server.addresses[LISTENERS[recorded.api]], recorded, body)
        differences = find_differences(read_answer(recorded), ours)
        found += ((number, place) for place in differences)
        problems += check_differences(table, number, differences)
        if number in DESCRIPTIONS:  # clients that are made of it find each path, method and parameter
            missing = list_operations(recorded.resp_body or "") - list_operations(ours.body) - NOT_DESCRIBED
            problems += (f"exchange {number}: {operation} is not described" for operation in missing)
        if number == ASYNCHRONOUS:
            wait_until(lambda: "READY" in describe(server, "probe/2.0"), "the second version is loaded")
    problems += find_stale(table, found)
    assert not problems, "\n".join(problems)


def list_operations(description: str) -> set[tuple[str, ...]]:
    """Path, method and parameters of each operation of an OpenAPI description."""
    paths = json.loads(description)["paths"]
    return {
        (path, method, *sorted(f"{each['in']} {each['name']}" for each in operation["parameters"]))
        for path, methods in paths.items()
        for method, operation in methods.items()
    }


def describe(server: Server, model: str) -> str:
    """What the management listener says of a model."""
    return server.http.get(f"{server.addresses['management']}/models/{model}").text
