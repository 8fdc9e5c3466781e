"""A Mosec 0.9 service of one model, as its users write one for speed: ONNX Runtime on one thread, orjson.

It runs in the peer's environment. PEER_GRAPH is the graph, PEER_BATCH the most requests of a batch, PEER_WAIT_MS how
long an unfilled batch waits, PEER_PROCESSES the number of its workers; the rest are Mosec's own flags.
"""
# mypy: ignore-errors

import os
from typing import Any

import numpy as np
import onnxruntime as ort
import orjson
from mosec import Server, Worker


class Inference(Worker):
    """Body {"x": [8][168]} -> {"predictions": [[24][5]]}."""

    def __init__(self) -> None:
        super().__init__()
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["PEER_GRAPH"], options, providers=["CPUExecutionProvider"])

    def deserialize(self, data: bytes) -> Any:
        """Read the numbers."""
        return np.array(orjson.loads(data)["x"], dtype=np.float32)[None]

    def serialize(self, data: Any) -> bytes:
        """Write the numbers."""
        return orjson.dumps({"predictions": data}, option=orjson.OPT_SERIALIZE_NUMPY)

    def forward(self, data: Any) -> Any:
        """Run one input [1, 8, 168]."""
        return self.session.run(None, {"x": data})[0]


class BatchInference(Inference):
    """The same for a list of inputs, which are run as one batch."""

    def forward(self, data: list[Any]) -> list[Any]:
        """Run inputs [1, 8, 168] together."""
        found = self.session.run(None, {"x": np.concatenate(data)})[0]
        return list(found[:, None])


if __name__ == "__main__":
    batch = int(os.environ["PEER_BATCH"])
    server = Server()
    server.append_worker(
        Inference if batch == 1 else BatchInference,
        num=int(os.environ["PEER_PROCESSES"]),
        max_batch_size=batch,
        max_wait_time=int(os.environ["PEER_WAIT_MS"]),
    )
    server.run()
