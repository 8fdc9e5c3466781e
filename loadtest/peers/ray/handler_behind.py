"""A Ray Serve 2.60 application in its best shape: the models are multiplexed on a deployment behind the ingress.

The ingress hands over the untouched body, which orjson reads where ONNX Runtime runs it on one thread; the variables of
the environment choose HAProxy and the options for throughput. `python handler_behind.py MODELS_FOLDER PORT
MODELS_PER_REPLICA TEMP_FOLDER` serves until it is ended; each model's folder has its graph as `model.onnx`.
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

FOLDER, PORT, MODELS, TEMP = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]


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

    async def __call__(self, body: bytes) -> bytes:
        """The call's option names the model."""
        session = await self.session(serve.get_multiplexed_model_id())
        x = np.array(orjson.loads(body)["x"], dtype=np.float32)[None]
        return orjson.dumps({"predictions": session.run(None, {"x": x})[0]}, option=orjson.OPT_SERIALIZE_NUMPY)


@serve.deployment(num_replicas=1, max_ongoing_requests=64)
class Ingress:
    """What HAProxy reaches: it hands requests to the deployment that has the models."""

    def __init__(self, models: Any) -> None:
        self.models = models

    async def __call__(self, request: Request) -> Response:
        """The header serve_multiplexed_model_id names the model."""
        handle = self.models.options(multiplexed_model_id=serve.get_multiplexed_model_id())
        return Response(await handle.remote(await request.body()), media_type="application/json")


STORE = 100 * 2**20
ray.init("local", num_cpus=2, include_dashboard=False, _temp_dir=TEMP, log_to_driver=False, object_store_memory=STORE)
serve.start(http_options={"host": "127.0.0.1", "port": PORT})
serve.run(Ingress.bind(MultiplexedModel.bind()), name="forecast", route_prefix="/")
print("ready", flush=True)
signal.pause()
