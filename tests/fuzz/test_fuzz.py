"""Every reader of untrusted bytes under mutated inputs: it answers or raises its own error, in a bounded CPU time.

`make test` runs some hundred inputs a target, the same ones every time. `make fuzz` sets FLEETCAST_FUZZ_S and goes on
for that many seconds a target, from a seed of its own (FLEETCAST_FUZZ_SEED repeats one). A failure says the seed, and
leaves the input in a file.
"""

import io
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from handlers.codecs.codec import FamilyCodec
from handlers.codecs.deepar import DeepAr
from handlers.errors import RequestError
from handlers.forecasters import build_family, random_tensors
from handlers.kinds import ArchiveParts, build_model, describe_kind, pack_model, prove_model
from handlers.kinds.graph.export import export_graph
from model_store.archives.archive import Limits, open_archive
from model_store.archives.manifest import Kind
from model_store.errors import LoadError
from server.contract import NPY
from server.errors import Refused
from server.front import json_cutter
from server.front.columns.table_calls import read_table_call
from server.front.dialects.forecasts import parse_call
from server.front.exchange import Limit
from server.front.json_cutter import NotJson, cut_fields
from server.front.raw_json import extract_prediction, split_samples
from server.front.slices import AT_ONCE, finish_slices
from server.ipc.frames import Cancel, Credit, Data, FrameReader, Request, WireError, append_frame
from tests.archives import FORECAST, make_forecaster, make_tar_gz
from tests.e2e.canary import Canary
from tests.e2e.models import SMALL_TCN, pack_forecaster
from tests.e2e.server import request_bytes, run_server, upload
from tests.fuzz.mutations import mutate
from tests.handlers.kinds.test_onnx import make_doubling
from tests.handlers.nets import SHAPE, Dilated, make_module
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

FUZZ_S = float(os.environ.get("FLEETCAST_FUZZ_S", "0"))
SEED = int(os.environ.get("FLEETCAST_FUZZ_SEED", str(time.time_ns() % 10**9 if FUZZ_S else 0)))
INPUTS = 150  #: of a target in `make test`
CPU_S = 20.0  #: of one input: far above what any bound allows on a slow machine, far below an endless loop
LIMITS = Limits(max_archive_bytes=8 << 20, max_unpacked_bytes=16 << 20)


def draw_seeds() -> Iterator[int]:
    """One a input; in `make fuzz` for FUZZ_S seconds, with a line on standard error every ten."""
    if not FUZZ_S:
        yield from range(SEED, SEED + INPUTS)
        return
    started, said, seed = time.monotonic(), 0.0, SEED
    while (spent := time.monotonic() - started) < FUZZ_S:
        if spent - said > 10:
            said = spent
            sys.stderr.write(f"{spent:5.0f} of {FUZZ_S:.0f} s, {seed - SEED} inputs from seed {SEED}\n")
        yield seed
        seed += 1


def fuzz(sound: Sequence[bytes], target: Callable[[bytes], object], expected: tuple[type[Exception], ...]) -> None:
    """Feed mutated inputs to the target. Only `expected` may be raised."""
    for seed in draw_seeds():
        data, began = mutate(sound, seed), time.thread_time()
        try:
            target(data)
        except expected:
            pass
        except BaseException as error:
            kept = Path(f"fuzz-{seed}.bin").resolve()
            kept.write_bytes(data)
            raise AssertionError(f"seed {seed}: {error!r}; the input is in {kept.name}") from error
        spent = time.thread_time() - began
        assert spent < CPU_S, f"seed {seed}: {len(data)} bytes took {spent:.1f} s of CPU"


def sound_archives() -> list[bytes]:
    """One of every kind and container."""
    tcn = build_family("tcn", SMALL_TCN)
    graph, tensors = export_graph(make_module(Dilated, 1, SHAPE), {"x": SHAPE})
    return [
        make_forecaster(),
        pack_model(
            Kind.FORECASTER,
            ArchiveParts(tensors=random_tensors(tcn, 1), architecture="tcn", config=SMALL_TCN),
            model_name="m",
        ),
        pack_model(Kind.GRAPH, ArchiveParts(program=graph, tensors=tensors), model_name="m"),
        pack_model(Kind.ONNX, ArchiveParts(program=make_doubling("n", 2)), model_name="m"),
        make_tar_gz({"model.onnx": make_doubling("n", 2)}),
    ]


@pytest.mark.slow
def test_archives() -> None:
    """Opened, described, built and proved as a worker does: a LoadError at most."""

    def load(data: bytes) -> None:
        archive = open_archive(data, "fuzz.mar", LIMITS)
        archive.golden()
        describe_kind(archive)
        prove_model(archive, build_model(archive))

    fuzz(sound_archives(), load, (LoadError,))


def test_bodies_of_one_model() -> None:
    """DeepAR JSON, JSON Lines, tensors and npy for one model: a RequestError at most."""
    instance: dict[str, Any] = {"start": "2026-01-01 00:00:00", "target": [41.5, None, "NaN"] * 8}
    body = msgspec.json.encode(
        {"instances": [instance], "configuration": {"num_samples": 3, "quantiles": ["0.1", "0.5"]}}
    )
    lines = b"\n".join([msgspec.json.encode(instance)] * 3)
    deepar = DeepAr(FORECAST)
    fuzz([body, lines], deepar.decode, (RequestError,))
    fuzz([body, lines], deepar.decode_lines, (RequestError,))
    family = build_family("tcn", SMALL_TCN)
    tensors = msgspec.json.encode({"x": np.ones(family.input_shape).tolist()})
    npy = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (3, 12), }".ljust(128) + bytes(144)
    codec = FamilyCodec(family)
    for media in ("application/json", "application/x-npy", "application/jsonlines", ""):
        fuzz([tensors, npy, lines], lambda data, media=media: codec.decode(data, media, ""), (RequestError,))  # type: ignore[misc]


def test_calls_for_many_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a front reads of a call, and of workers' answers: Refused or a msgspec error at most."""
    call = (
        b'{"requests":[{"target_model":"a/b.mar","start":"2026-01-01","target":[1,2]},{"target_model":"c.mar"}],'
        b'"configuration":{"joint":true,"correlation":"j.mar","num_samples":5,"output_types":["samples"]}}'
    )
    answer = b'{"predictions":[{"mean":[1.5,2],"marginal":{"levels":[0.5],"values":[[[1]]]}}]}'
    samples = b'{"samples":[[1.5,2],[3,4]]}'
    limit = Limit(6 * 2**20, "max_body_bytes")
    for at_once in (AT_ONCE, 0):  # read by msgspec, and cut by the cutter as larger ones are
        monkeypatch.setattr(json_cutter, "AT_ONCE", at_once)
        fuzz([call], lambda data: finish_slices(parse_call(data, limit)), (Refused,))
        for read in (extract_prediction, cut_fields, split_samples):
            fuzz([answer, samples], lambda data, read=read: finish_slices(read(data)), (Refused, NotJson, KeyError))  # type: ignore[misc]


def test_calls_as_files_of_numpy() -> None:
    """Members and rows with fields: Refused at most, for the call or for rows alone."""
    rows, members, limit = io.BytesIO(), io.BytesIO(), Limit(6 * 2**20, "max_body_bytes")
    fields = [("model", "U5"), ("start", "M8[s]"), ("target", "f4", (3,)), ("load", "i4", (2,)), ("zone", "i8")]
    np.save(rows, np.zeros(3, fields))
    np.savez(members, model=["a.mar"], target=np.ones((1, 3), order="F"), start="2026-01-01", configuration="{}")
    sound = [rows.getvalue(), members.getvalue()]
    fuzz(sound, lambda data: finish_slices(read_table_call(data, limit, NPY)), (Refused,))


def test_frames() -> None:
    """Bytes of the sockets between our processes, in pieces: frames or a WireError."""
    stream = bytearray()
    for frame in (Request(7, 10**18, "a/b.mar", "application/json", "", 5, b"hello"), Data(7, b"x" * 300),
                  Credit(7, 4096), Cancel(7)):  # fmt: skip
        append_frame(stream, frame)

    def read(data: bytes) -> None:
        reader = FrameReader()
        for at in range(0, len(data), 50):
            list(reader.feed(data[at : at + 50]))

    fuzz([bytes(stream)], read, (WireError,))


@pytest.mark.e2e
def test_http_beside_a_canary(s3: S3Server, tmp_path: Path) -> None:
    """Mutated requests on sockets of their own: each is answered or cut off, and one client's answers do not change."""
    model = pack_forecaster("fuzz/a.mar", 1)
    store = s3.bucket()
    upload(s3, store, [model])
    question = model.question(1)
    chunked = (
        b"POST /v1/forecasts HTTP/1.1\r\nHost: fleet\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n"
        b"10\r\n" + b'{"requests":[1]}' + b"\r\n0\r\nx: y\r\n\r\n"
    )
    probe = b"GET /ping HTTP/1.1\r\nHost: fleet\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n"
    with run_server(s3, tmp_path, f"s3://{store}", client_timeout_s=2) as server, Canary(server, question) as canary:

        def send(data: bytes) -> None:
            with socket.create_connection(server.address, timeout=PATIENCE_S) as sock:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass

        fuzz([request_bytes(question), chunked, probe], send, (ConnectionError,))
        canary.more(20)
