"""The canary through attacks on fronts, loads and management: one server, which lives through all of them.

During each attack the canary is judged (`tests.e2e.canary`): no answer fails, every byte is the same, and the slowest
percent stays within the bound. What an attack leaves behind in memory is far less than docs/memory-bounds.md allows.
Attacks by computing (loops, long contexts, samples, joint calls, large results) are in test_bounded_work.
"""

import gzip
import http.client
import io
import json
import os
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.observe.processes import read_pss
from model_store.archives.archive import open_archive
from tests.archives import make_zip
from tests.e2e.canary import Canary
from tests.e2e.models import FORECAST_TCN, pack_forecaster
from tests.e2e.server import Server, run_server, upload
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MIB = 1024 * 1024
CANARY = pack_forecaster("canary.mar", 1)
ASKED = pack_forecaster("asked.mar", 2, config=FORECAST_TCN, forecast=True)
NAMES = 200
BROKEN = 12
GROWTH = 96 * MIB  #: what a process may keep of an attack: its tables of names, and what malloc does not give back
NOISE = os.urandom(MIB // 4)  #: so that an archive is not refused for how far it unpacks
LATER = 120  #: beats of the canary after an attack: one percent of them is one answer at least


def make_broken(i: int) -> bytes:
    """An archive of 4 MiB whose weights are not those that were packed."""
    spec = {"kind": "onnx", "weights": {"file": "model.onnx", "sha256": "0" * 64}}
    return make_zip({"fleetcast.json": json.dumps(spec).encode(), "model.onnx": bytes([i]) * 16 + os.urandom(4 * MIB)})


def pax_records() -> bytes:
    """A tar of 16 MB of the shortest pax records."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for _ in range(16):
            info = tarfile.TarInfo("x")
            records = b"4 =\n" * (MIB // 4)
            info.type, info.size = tarfile.XHDTYPE, len(records)
            archive.addfile(info, io.BytesIO(records))
        noise = tarfile.TarInfo("noise")
        noise.size = len(NOISE)
        archive.addfile(noise, io.BytesIO(NOISE))
    return gzip.compress(out.getvalue())


def make_varints() -> bytes:
    """An ONNX model of 4 MB of unknown fields, deflated."""
    return make_zip({"model.onnx": b"\x80\x7d\x01" * (4 * MIB // 3), "noise": NOISE}, deflate=True)


def golden_lists() -> bytes:
    """A golden sample of 680,000 empty lists, within the bytes of a record."""
    lists = b'{"request":{"x":[' + b"[]," * (2_000_000 // 3) + b'1]},"response":{}}'
    archive = open_archive(CANARY.data, "canary")
    members = {name: archive.read(name) for name in archive.members}
    spec = {**json.loads(members["fleetcast.json"]), "golden": "golden.json"}
    return make_zip({**members, "golden.json": lists, "fleetcast.json": json.dumps(spec).encode()})


def make_metadata() -> bytes:
    """Weights whose header is 120,000 pairs of metadata."""
    header = ('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(120_000)) + "}}").encode()
    spec = {"kind": "forecaster", "architecture": "tcn", "config": FORECAST_TCN, "weights": {"file": "w"}}
    return make_zip({"fleetcast.json": json.dumps(spec).encode(), "w": len(header).to_bytes(8, "little") + header})


#: Archives whose reading costs more than their bytes -> words of the refusal.
SLOW_TO_READ = {
    "pax.tar.gz": (pax_records, "pax records"),
    "varints.mar": (make_varints, "fields of an ONNX model"),
    "golden.mar": (golden_lists, "values allowed"),
    "metadata.mar": (make_metadata, "fields of tensors and metadata"),
}


@pytest.fixture(scope="module")
def attacked(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One front, one worker."""
    bucket = s3.bucket()
    upload(s3, bucket, [CANARY, ASKED])
    for i in range(BROKEN):
        s3.put(bucket, f"broken/{i}.mar", make_broken(i))
    for name, (make, _) in SLOW_TO_READ.items():
        s3.put(bucket, name, make())
    folder: Path = tmp_path_factory.mktemp("attacked")
    with run_server(s3, folder, f"s3://{bucket}", workers=1) as server:
        server.ask(ASKED.question(0))
        yield server


class Memory:
    """`with Memory(server)`: front and worker keep at most `most` bytes of what happens inside."""

    def __init__(self, server: Server, most: int = GROWTH) -> None:
        self._most = most
        self._pids = [server.processes(kind)[0]["pid"] for kind in ("front", "worker")]

    def __enter__(self) -> None:
        self._before = [read_pss(pid) for pid in self._pids]

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            grown = [read_pss(pid) - before for pid, before in zip(self._pids, self._before, strict=True)]
            assert max(grown) <= self._most, f"front and worker grew by {grown} bytes"


def call(server: Server, body: bytes, **headers: str) -> tuple[int, bytes]:
    """A call for many models."""
    reply = server.http.post(f"{server.url}/v1/forecasts", content=body, headers=headers)
    return reply.status_code, reply.content


def test_made_up_names(attacked: Server) -> None:
    """Hundreds of the longest names, one by one and in one call, are looked up and forgotten."""
    names = [f"{i:04}" + "\N{MATHEMATICAL BOLD CAPITAL A}" * 200 for i in range(NAMES)]
    body = json.dumps({"requests": [{"target_model": f"call/{name}"} for name in names]}).encode()
    with Canary(attacked, CANARY.question(0)) as canary, Memory(attacked):
        statuses = {attacked.post(name).status_code for name in names}
        assert statuses == {400}
        status, answer = call(attacked, body)
        assert (status, json.loads(answer)["failed"]) == (200, NAMES)
        canary.more(LATER)


def test_large_calls_for_many_models(attacked: Server) -> None:
    """Amplified configurations are refused with the numbers; a call of 50 MB is cut, and dense and broken ones refused,
    while the canary is answered by the same front.
    """
    ask = json.loads(ASKED.question(0).body)["instances"][0]
    item = json.dumps({**ask, "target_model": ASKED.name, "ignored": [1.25] * 20_000}).encode()
    bodies = {
        b'{"requests":[' + b",".join([b'{"target_model":"asked.mar"}'] * 10_000) + b'],"configuration":{"x":"'
        + b"y" * 120_000 + b'"}}': (413, b"max_forecasts_bytes"),
        b'{"requests":[' + b",".join([item] * 400) + b"]}": (200, b'"failed":'),
        b'{"requests":[{"target_model":"asked.mar","x":[' + b"[]," * (10 * MIB) + b"1]}]}": (200, b"too_large"),
        b'{"requests":[' + b'{"target_model":"asked.mar"},' * MIB + b"1]}": (400, b"requests, not more"),
        b'{"requests":[{"target_model":"asked.mar"}]' + b" " * 30 * MIB: (400, b"not a call"),
        b"{" + b'"a":1,' * (5 * MIB) + b'"b":1}': (400, b"more than 1000 fields"),
    }  # fmt: skip
    with Canary(attacked, CANARY.question(0)) as canary, Memory(attacked):
        for body, (status, said) in bodies.items():
            found, answer = call(attacked, body)
            assert (found, said in answer) == (status, True), answer[:300]
        packed = gzip.compress(b'{"requests":[' + b",".join([item] * 400) + b"]}", 1)
        assert call(attacked, packed, **{"Content-Encoding": "gzip"})[0] == 200
        canary.more(LATER)


def test_broken_archives_again_and_again(attacked: Server) -> None:
    """576 MiB of them in all: every load says what is wrong, and nothing of an archive is kept.

    What was freed stays with the allocator's arenas, one for each loader thread, of up to 64 MiB.
    """
    with Canary(attacked, CANARY.question(0)) as canary, Memory(attacked, most=5 * 64 * MIB):
        for i in [*range(BROKEN)] * 12:
            reply = attacked.fleet("load", f"broken/{i}.mar")
            assert reply.status_code != 200
            assert "sha256" in reply.text
        canary.more(LATER)


def test_archives_that_are_slow_to_read(attacked: Server) -> None:
    """Each is refused by a count, before it is parsed."""
    with Canary(attacked, CANARY.question(0)) as canary, Memory(attacked):
        for name, (_, said) in SLOW_TO_READ.items():
            reply = attacked.fleet("load", name)
            assert (reply.status_code == 200, said in reply.text) == (False, True), reply.text[:500]
        canary.more(LATER)


def test_hostile_http(attacked: Server) -> None:
    """Bodies behind upgrades, megabytes of trailers, heads without end."""
    head = "POST /invocations HTTP/1.1\r\nHost: fleet\r\nX-Amzn-SageMaker-Target-Model: canary.mar\r\n"
    upgrade = f"{head}Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 60000\r\n\r\n".encode()
    smuggled = (b"GET /ping HTTP/1.1\r\nHost: fleet\r\n\r\n" * 2000)[:60000]
    trailers = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"1\r\n{\r\n0\r\n"
    with Canary(attacked, CANARY.question(0)) as canary, Memory(attacked):
        endless_head = b"GET /ping HTTP/1.1\r\n" + b"a: b\r\n" * 10**6
        for sent in (upgrade + smuggled, trailers + b"a:b\r\n" * 2_000_000, endless_head):
            for _ in range(3):
                assert exchange(attacked, sent).count(b"HTTP/1.1 200") == 0
        canary.more(LATER)


def exchange(server: Server, sent: bytes) -> bytes:
    """What the server says, until it closes the connection or has said its first word."""
    with socket.create_connection(server.address, timeout=PATIENCE_S) as sock:
        try:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            return sock.recv(65536)
        except ConnectionError:
            return b""


def test_hostile_management(attacked: Server) -> None:
    """Names that were rebound, forged origins, made-up verbs and models: refused, and the fleet is as it was."""
    management = attacked.addresses["management"]
    with Canary(attacked, CANARY.question(0)) as canary, Memory(attacked):
        before = attacked.resident()
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            for i in range(30):
                for verb in ("load", "unload", "pin", "release"):
                    url = f"{management}/fleet/{verb}/canary.mar"
                    assert attacked.http.post(url, headers=headers).status_code == http.client.FORBIDDEN
                reply = attacked.http.get(f"{management}/fleet/models", headers=headers, params={"after": "x" * i})
                assert reply.status_code == http.client.FORBIDDEN
        for i in range(100):
            assert attacked.fleet(f"verb{i}", "canary.mar").status_code == http.client.NOT_FOUND
            assert attacked.fleet("load", f"none/{i}" + "x" * 500).status_code != http.client.OK
        canary.more(LATER)
    assert attacked.resident() == before
