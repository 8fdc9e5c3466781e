"""A Ray Serve 2.60 application with model multiplexing, as its users write one: eager torch, one replica.

`python handler.py MODELS_FOLDER PORT MODELS_PER_REPLICA TEMP_FOLDER [TRIGGER]` serves until it is ended. Once there
is a file TRIGGER, an application of one model without multiplexing takes its place, and TRIGGER.runs is written. With
PEER_STORE, the address of a bucket, weights are read from there.
"""
# It runs in the peer's environment, copied beside network.py.
# ruff: noqa: INP001
# mypy: ignore-errors

import asyncio
import os
import signal
import sys
import tempfile
import time
import urllib.request
from typing import Any

import ray
import torch
from network import PlainTcn, load_network
from ray import serve
from starlette.requests import Request

FOLDER, PORT, MODELS, TEMP, *TRIGGERS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
STORE_URL = os.environ.get("PEER_STORE", "")


def fetch_network(model: str) -> PlainTcn:
    """Read a model's weights from the folder, or from the bucket."""
    if not STORE_URL:
        return load_network(os.path.join(FOLDER, model))  # noqa: PTH118 -- as in Ray's own examples
    with tempfile.TemporaryDirectory() as folder:
        url = f"{STORE_URL}/{model}/weights.safetensors"
        urllib.request.urlretrieve(url, os.path.join(folder, "weights.safetensors"))  # noqa: PTH118, S310
        return load_network(folder)


@serve.deployment(num_replicas=1, max_ongoing_requests=64)
class MultiplexedModel:
    """Body {"x": [8][168]} -> {"predictions": [[24][5]]}."""

    def __init__(self) -> None:
        self.loads = 0

    @serve.multiplexed(max_num_models_per_replica=MODELS)
    async def network(self, model: str) -> PlainTcn:
        """Read a model's weights; Ray keeps the most recently used ones."""
        self.loads += 1
        return await asyncio.to_thread(fetch_network, model)

    async def __call__(self, request: Request) -> Any:
        """The header serve_multiplexed_model_id names the model; without it the answer counts the loads so far."""
        model = serve.get_multiplexed_model_id()
        if not model:
            return {"loads": self.loads}
        network = await self.network(model)
        x = torch.tensor((await request.json())["x"], dtype=torch.float32)
        with torch.inference_mode():
            return {"predictions": network(x[None]).tolist()}


@serve.deployment(num_replicas=1, max_ongoing_requests=64)
class BareModel:
    """The same answers of one model, whichever is named."""

    def __init__(self) -> None:
        self.network = load_network(os.path.join(FOLDER, "m0"))  # noqa: PTH118 -- as in Ray's own examples

    async def __call__(self, request: Request) -> Any:
        """Answer by the one network."""
        x = torch.tensor((await request.json())["x"], dtype=torch.float32)
        with torch.inference_mode():
            return {"predictions": self.network(x[None]).tolist()}


STORE = 100 * 2**20
ray.init("local", num_cpus=2, include_dashboard=False, _temp_dir=TEMP, log_to_driver=False, object_store_memory=STORE)
serve.start(http_options={"host": "127.0.0.1", "port": PORT})
serve.run(MultiplexedModel.bind(), name="forecast", route_prefix="/")
print("ready", flush=True)
for trigger in TRIGGERS:
    while not os.path.exists(trigger):  # noqa: PTH110
        time.sleep(0.2)
    serve.delete("forecast")
    serve.run(BareModel.bind(), name="bare", route_prefix="/")
    open(trigger + ".runs", "w").close()  # noqa: PTH123
signal.pause()
