"""A recording of Triton 2.51.0, replayed against a real server: what differs is listed with its reason.

The archives are what answered the recording, made anew: `ident` and `addsub` as ONNX models, `fail` as an archive with
code.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from onnx import TensorProto, helper

from tests.e2e.models import pack_identity, pack_onnx
from tests.e2e.server import Server, run_server
from tests.golden.open_inference import (
    find_differences,
    find_stale,
    find_unnamed,
    read_answer,
    read_recording,
    read_table,
    send_again,
)
from tests.s3 import S3Server
from tests.server.worker.sandbox.code_archives import pack_code

pytestmark = pytest.mark.e2e

NAMES = ("ident", "addsub", "fail")
FAILING = """
def handle(data, context):
    if data is None:
        return None
    context.set_response_status(code=500, phrase="failed")
    return ["no luck"] * len(data)
"""


def pack_addsub() -> bytes:
    """The sum and the difference of [rows, 4] int32."""
    names = ("A", "B", "SUM", "DIFF")
    shape: list[str | int | None] = ["n", 4]
    a, b, total, difference = (helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name in names)
    nodes = [helper.make_node("Add", ["A", "B"], ["SUM"]), helper.make_node("Sub", ["A", "B"], ["DIFF"])]
    return pack_onnx(nodes, [a, b], [total, difference])


@pytest.fixture(scope="module")
def server(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has loaded the recording's models, and whose clients may load and unload."""
    bucket, settings = s3.bucket(), {"allow_code": ["fail"], "repository_control": "on"}
    for name, archive in zip(
        NAMES, (pack_identity(TensorProto.FLOAT, "IN", "OUT"), pack_addsub(), pack_code(FAILING)), strict=True
    ):
        s3.put(bucket, name, archive)
    folder = tmp_path_factory.mktemp("triton")
    with run_server(s3, folder, f"s3://{bucket}", model_cache_bytes="256MiB", **settings) as running:
        for name in NAMES:
            assert running.http.get(f"{running.url}/v2/models/{name}/ready").status_code == 200
        yield running


def test_the_recording(server: Server) -> None:
    """Statuses, shapes and values are those that were recorded, but for what the table lists."""
    table, found = read_table(), dict[int, dict[str, Any]]()
    for number, recorded in enumerate(read_recording()):
        if recorded.was_sent:
            found[number] = find_differences(read_answer(recorded), send_again(server.address, recorded))
    unnamed = [said for number, places in found.items() for said in find_unnamed(table, number, places)]
    assert not unnamed, "\n".join(unnamed)
    assert list(find_stale(table, found)) == []
