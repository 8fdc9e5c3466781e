"""A Ray Serve 2.60 application as fast as its documentation makes one: ONNX Runtime on one thread, orjson, raw bodies.

The variables of the environment choose HAProxy and the options for throughput. `python handler_best.py MODELS_FOLDER
PORT MODELS_PER_REPLICA TEMP_FOLDER SHAPE` serves until it is ended; each model's folder has its graph as `model.onnx`.
SHAPE: `ingress`, where the deployment that HAProxy reaches has the models, or `behind`, where one behind it has them.
"""
# It runs in the peer's environment.
# ruff: noqa: INP001
# mypy: ignore-errors

import os
import signal
import sys
from typing import Any

import numpy as np
import onnxruntime as ort
import orjson
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

FOLDER, PORT, MODELS, TEMP, SHAPE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]


@serve.deployment(num_replicas=1, max_ongoing_requests=64)
class MultiplexedModel:
    """Body {"x": [8][168]} -> {"predictions": [[24][5]]}, both as bytes."""

    @serve.multiplexed(max_num_models_per_replica=MODELS)
    async def session(self, model: str) -> ort.InferenceSession:
        """Read a model's graph; Ray keeps the most recently used ones."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = os.path.join(FOLDER, model, "model.onnx")  # noqa: PTH118 -- as in Ray's own examples
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    async def answer(self, body: bytes) -> bytes:
        """The request's header or the call's option names the model."""
        session = await self.session(serve.get_multiplexed_model_id())
        x = np.array(orjson.loads(body)["x"], dtype=np.float32)[None]
        return orjson.dumps({"predictions": session.run(None, {"x": x})[0]}, option=orjson.OPT_SERIALIZE_NUMPY)

    async def __call__(self, request: Request) -> Response:
        """Answer a request of HTTP, as the ingress."""
        return Response(await self.answer(await request.body()), media_type="application/json")


@serve.deployment(num_replicas=1, max_ongoing_requests=64)
class Ingress:
    """What HAProxy reaches where the models are behind it: it hands over the untouched body."""

    def __init__(self, models: Any) -> None:
        self.models = models

    async def __call__(self, request: Request) -> Response:
        """The header serve_multiplexed_model_id names the model."""
        handle = self.models.options(multiplexed_model_id=serve.get_multiplexed_model_id())
        return Response(await handle.answer.remote(await request.body()), media_type="application/json")


STORE = 100 * 2**20
ray.init("local", num_cpus=2, include_dashboard=False, _temp_dir=TEMP, log_to_driver=False, object_store_memory=STORE)
serve.start(http_options={"host": "127.0.0.1", "port": PORT})
models = MultiplexedModel.bind()
serve.run(Ingress.bind(models) if SHAPE == "behind" else models, name="forecast", route_prefix="/")
print("ready", flush=True)
signal.pause()
