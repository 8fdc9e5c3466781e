"""Requests and archives that need much more work than their size shows are refused with the numbers, or run apart.

A canary asks one model all the while: its answers stay the same and come in time.
"""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from handlers.evaluation.correlation import estimate_gaussian
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import ForecastSpec, GoldenSample, InputChannel, Kind
from server.ipc.pulse import PulseReader, RunningModel
from tests.archives import pack_tcn
from tests.e2e.canary import Canary
from tests.e2e.models import FORECAST_TCN, LEVELS, pack_forecaster
from tests.e2e.server import Server, is_answered, run_server, upload
from tests.patience import PATIENCE_S, wait_until
from tests.processes import list_descriptors
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

STEPS = 24
CANARY = pack_forecaster("canary.mar", 1)
SAMPLED = pack_forecaster("sampled.mar", 2, config={**FORECAST_TCN, "prediction_length": STEPS}, forecast=True)
CONTEXT, CHANNELS = 10_000, 100
MOST_KILLS = 6  #: of workers, until two of them have died while the model ran
PRODUCTS = [f"p{i}" for i in range(20)]


def rounds_by_request(golden: GoldenSample | None = None) -> bytes:
    """An ONNX model that loops as often as the request's first number says."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["going"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, []), info("v", TensorProto.FLOAT, None)],
        [info("going", TensorProto.BOOL, []), info("w", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["trips"], to=TensorProto.INT64),
        helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body),
    ]
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    return pack_onnx(nodes, [yes], golden)


def large_result() -> bytes:
    """An ONNX model of some 150 bytes that wants 2 GB."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceMax", ["zeros"], ["zero"], keepdims=0),
        helper.make_node("Add", ["x", "zero"], ["y"]),
    ]
    return pack_onnx(nodes, [helper.make_tensor("shape", TensorProto.INT64, [1], [1 << 29])])


def pack_onnx(nodes: list[onnx.NodeProto], constants: list[TensorProto], golden: GoldenSample | None = None) -> bytes:
    """The archive of a model x [n, 1] -> y [n, 1]."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return pack_model(Kind.ONNX, ArchiveParts(program=model.SerializeToString()), model_name="attack", golden=golden)


def long_context() -> bytes:
    """A forecaster of some kilobytes that copies a history of 10,000 steps into 100 channels."""
    config = {**FORECAST_TCN, "features": CHANNELS, "context_length": CONTEXT}
    recipe = ForecastSpec(
        frequency="1h",
        context_length=CONTEXT,
        prediction_length=4,
        quantile_levels=LEVELS,
        inputs=(InputChannel(source="target"),) * CHANNELS,
    )
    return pack_tcn("long", config, 3, recipe)


def pack_correlation() -> bytes:
    """A correlation of PRODUCTS over STEPS."""
    found = estimate_gaussian(np.random.default_rng(0).standard_normal((60, len(PRODUCTS), STEPS)), tuple(PRODUCTS))
    return pack_model(
        Kind.CORRELATION, ArchiveParts(correlation=found.record, tensors=found.tensors), model_name="joint"
    )


def make_instances(count: int, context: int, **configuration: object) -> bytes:
    """A forecast request of so many short series."""
    series = {"start": "2026-01-01 00:00:00", "target": [1] * context}
    return json.dumps({"instances": [series] * count, "configuration": configuration}).encode()


@pytest.fixture(scope="module")
def attacked(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One worker, in which loops are allowed and end after five seconds."""
    bucket = s3.bucket()
    upload(s3, bucket, [CANARY, SAMPLED])
    for name, data in (
        ("loop", rounds_by_request()),
        ("large", large_result()),
        ("joint", pack_correlation()),
        ("long", long_context()),
    ):
        s3.put(bucket, f"{name}.mar", data)
    folder: Path = tmp_path_factory.mktemp("work")
    with run_server(s3, folder, f"s3://{bucket}", workers=1, onnx_control_flow="allow", max_forward_s=5.0) as server:
        yield server


def read_refusal(reply: httpx.Response) -> str:
    """The message of a reply that is no answer."""
    assert reply.status_code in (400, 424), reply.text[:300]
    found: str = json.dumps(reply.json())
    return found


def test_many_instances_of_a_long_context_are_refused_with_the_numbers(attacked: Server) -> None:
    """A small body for a small archive asks for gigabytes of inputs; a few instances are answered."""
    with Canary(attacked, CANARY.question(0)) as canary:
        refused = read_refusal(attacked.post("long.mar", make_instances(40, CONTEXT)))
        assert "max_request_numbers" in refused
        few = attacked.post("long.mar", make_instances(8, CONTEXT))
        assert (few.status_code, len(few.json()["predictions"])) == (200, 8)
        canary.more(20)


def test_many_samples_do_not_stall_others(attacked: Server) -> None:
    """16 instances of 10,000 samples are allowed; they are drawn and written beside the step thread."""
    asked = make_instances(16, 12, output_types=["samples"], num_samples=10_000, seed=7)
    with Canary(attacked, CANARY.question(0)) as canary:
        answers = [attacked.post(SAMPLED.name, asked) for _ in range(3)]
        canary.more(5)
    assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text[:300]
    assert answers[0].content == answers[1].content == answers[2].content
    found = np.array(answers[0].json()["predictions"][15]["samples"])
    assert found.shape == (10_000, STEPS)


def test_a_joint_call_names_a_product_once(attacked: Server) -> None:
    """A product named 10,000 times is refused at once and by name."""
    marginal = {"levels": [0.5], "values": [[[1.0]]]}
    body = {"forecasts": [{"name": "p19", "marginal": marginal}] * 10_000, "num_samples": 100}
    with Canary(attacked, CANARY.question(0)) as canary:
        assert "p19 is named twice" in read_refusal(attacked.post("joint.mar", json.dumps(body).encode()))
        canary.more(20)


def test_a_run_that_wants_too_much_memory_fails_alone(attacked: Server) -> None:
    """2 GB of a 150-byte model: the run fails as the model's, and the worker has not grown."""
    with Canary(attacked, CANARY.question(0)) as canary:
        for _ in range(3):
            assert "ONNX Runtime" in read_refusal(attacked.post("large.mar", b'{"x": [1]}'))
        canary.more(20)


def test_an_endless_run_is_ended_and_its_model_refused_until_an_operator_releases_it(attacked: Server) -> None:
    """The run fails after its limit, the model is in quarantine with the reason, others are served all the while; the
    worker lives on, and after the release a short loop is answered.
    """
    worker = attacked.processes("worker")[0]["pid"]
    assert attacked.post("loop.mar", b'{"x": [3]}').json() == {"predictions": [3.0]}
    with Canary(attacked, CANARY.question(0)) as canary:
        assert "max_forward_s" in read_refusal(attacked.post("loop.mar", b'{"x": [9e18]}'))
        assert "quarantined" in read_refusal(attacked.post("loop.mar", b'{"x": [3]}'))
        canary.more(20)
    row = wait_until(lambda: find_quarantined(attacked), "the supervisor knows")
    assert "max_forward_s" in row["reason"]
    assert attacked.fleet("load", "loop.mar").status_code == 422
    assert attacked.fleet("release", "loop.mar").json() == {"model": "loop.mar", "released": True}
    assert attacked.post("loop.mar", b'{"x": [4]}').json() == {"predictions": [4.0]}
    assert find_quarantined(attacked) == {}
    assert attacked.processes("worker")[0]["pid"] == worker


def test_loops_are_refused_unless_allowed(s3: S3Server, tmp_path: Path, store: str) -> None:
    """By default an archive with a loop does not load."""
    s3.put(store, "loop.mar", rounds_by_request())
    upload(s3, store, [CANARY])
    with run_server(s3, tmp_path, f"s3://{store}") as server, Canary(server, CANARY.question(0)) as canary:
        assert "operator Loop" in read_refusal(server.post("loop.mar", b'{"x": [3]}'))
        canary.more(5)


def test_a_model_that_workers_die_of_twice_is_refused(s3: S3Server, tmp_path: Path, store: str) -> None:
    """Two workers are killed while they run it: it is in quarantine, and the third worker serves the others."""
    s3.put(store, "loop.mar", rounds_by_request())
    upload(s3, store, [CANARY])
    settings: dict[str, Any] = {"workers": 1, "onnx_control_flow": "allow", "max_forward_s": PATIENCE_S}
    with run_server(s3, tmp_path, f"s3://{store}", **settings) as server, ThreadPoolExecutor(2) as clients:
        for _ in range(MOST_KILLS):
            wait_until(lambda: server.processes("worker")[0]["up"], "the worker is up")
            pid = server.processes("worker")[0]["pid"]
            clients.submit(server.post, "loop.mar", b'{"x": [9e18]}')
            wait_until(partial(runs_or_is_refused, server, pid), "the model runs, or is refused")
            if find_quarantined(server):
                break
            # A kill between the request's decoding and the model's run, where no model runs, is no death of the model.
            os.kill(pid, signal.SIGKILL)
            wait_until(partial(is_replaced, server, pid), "the next worker")
        row = wait_until(lambda: find_quarantined(server), "the quarantine")
        assert "2 workers died while it ran" in row["reason"]
        wait_until(lambda: is_answered(server, CANARY), "the third worker serves")
        assert "quarantined" in read_refusal(server.post("loop.mar", b'{"x": [3]}'))


def is_replaced(server: Server, pid: int) -> bool:
    """Whether another worker has been started."""
    return bool(server.processes("worker")[0]["pid"] != pid)


def runs_loop(pid: int) -> bool:
    """Whether this worker notes that it runs loop.mar."""
    for link, target in list_descriptors(pid):
        if "fleetcast-pulse" in target:
            with contextlib.suppress(FileNotFoundError):  # the worker has ended since it was listed
                return RunningModel("loop.mar", "alone") in PulseReader(str(link)).running()
    return False


def runs_or_is_refused(server: Server, pid: int) -> bool:
    """Whether the worker runs loop.mar, or nobody does any more."""
    return runs_loop(pid) or bool(find_quarantined(server))


def find_quarantined(server: Server) -> dict[str, Any]:
    """The row of loop.mar where it is in quarantine; else empty."""
    row: dict[str, Any] = server.models().get("loop.mar", {})
    return row if row.get("state") == "quarantined" else {}
