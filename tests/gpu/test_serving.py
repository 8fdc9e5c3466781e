"""A real server with two workers on one device: every kind of model, a worker that is killed, and its successor.

The other end-to-end tests serve from the CPU, also on a host with GPUs; this is the one that takes a GPU. On the CPU it
proves itself, and that the default of those tests holds where GPUs are to be seen.
"""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from handlers.forecasters import ARCHITECTURES
from tests.e2e.conftest import Serve, serve, store
from tests.e2e.models import Model, Question, onnx_model, pack_fleet, pack_forecaster
from tests.e2e.server import Server, upload
from tests.e2e.test_deaths import is_up
from tests.e2e.test_graph import make_graph_model as graph_model
from tests.gpu.devices import NEEDS_CUDA
from tests.handlers.nets import Dilated, RecurrentNet
from tests.patience import wait_until
from tests.s3 import S3Server
from tests.server.worker.test_exactness import SMALL

__all__ = ["serve", "store"]

pytestmark = pytest.mark.e2e

TIMES = 8  #: how often each is asked at once: more than a graph's captures need


def every_kind() -> list[Model]:
    """All architectures, an ensemble, graphs whose rows run together and one by one, and sessions."""
    configs = {
        name: {field: size for field, size in SMALL.items() if field in architecture.config.__struct_fields__}
        for name, architecture in ARCHITECTURES.items()
    }
    return [
        *pack_fleet("gpu/fleet", 6),
        *(pack_forecaster(f"gpu/{name}.mar", 1, name, config) for name, config in configs.items()),
        pack_forecaster("gpu/ensemble.mar", 1, "mlp", {**configs["mlp"], "members": 3}),
        *(graph_model(f"gpu/graph{seed}.mar", seed, Dilated) for seed in range(2)),
        graph_model("gpu/one-by-one.mar", 1, RecurrentNet),
        *(onnx_model(f"gpu/onnx{seed}.mar", seed) for seed in range(2)),
    ]


def ask_all(server: Server, questions: list[Question]) -> None:
    """Each several times, many at once, so that they share batches; every answer is checked."""
    with ThreadPoolExecutor(16) as pool:
        for answer in [pool.submit(server.ask, question) for question in questions * TIMES]:
            answer.result()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_two_workers_share_a_device_and_one_is_restarted(s3: S3Server, store: str, serve: Serve, device: str) -> None:
    """Right answers before and after, the same device for the new worker, no error and no path that was given up."""
    models = every_kind()
    upload(s3, store, models)
    questions = [model.question(2) for model in models]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    settings = {"environment": {"CUDA_VISIBLE_DEVICES": first or "0"}, "workers": 2, "log_level": "info"}
    on_gpu = {"device": "cuda", "onnx_device": "device", "host_cache_bytes": "64MiB"} if device == "cuda" else {}
    with serve(**settings, **on_gpu) as server:
        ask_all(server, questions)
        before = server.processes("worker")
        assert {row["device"].partition(":")[0] for row in before} == {device}
        assert len({row["device"] for row in before}) == 1
        assert len(before) == 2
        victim = before[0]
        os.kill(victim["pid"], signal.SIGKILL)
        wait_until(partial(is_up, server, "worker", victim["index"], 2), "the worker is back")
        ask_all(server, questions)
        assert [row["device"] for row in server.processes("worker")] == [row["device"] for row in before]
        for trouble in ("runs_without_graph", "out_of_memory", "step_failed", "long_job_failed"):
            assert trouble not in server.said()
