"""The plain two-process path: one session a model behind one Unix socket, and nothing else.

It has no cache, no checks, no error handling and no batching across models. `python plain_worker.py MODEL.onnx COUNT
SOCKET ENGINE` serves COUNT sessions of the same graph under the names m0, m1, ...; the engine is onnxruntime or
openvino, each on one thread. It imports nothing of Fleetcast, because each engine has an environment of its own.
Frames in: id, name length, body length (u32 little-endian), name, body; frames out: id, length, body.
"""

import asyncio
import importlib
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import uvloop

HEAD = struct.Struct("<III")
#: Settings of OpenVINO.
OPENVINO = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_NUM_THREADS": 1,
    "NUM_STREAMS": 1,
    "INFERENCE_PRECISION_HINT": "f32",
}
Run = Callable[[Any], Any]  #: x [1, 8, 168] -> predictions [1, 24, 5]


def build_onnxruntime(graph: bytes, count: int) -> list[Run]:
    """Build sessions of ONNX Runtime."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = [ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]) for _ in range(count)]

    def make_run(session: Any) -> Run:
        return lambda x: session.run(None, {"x": x})[0]

    return [make_run(session) for session in sessions]


def build_openvino(graph: bytes, count: int) -> list[Run]:
    """Build compiled models of OpenVINO for the least latency, each with one request whose arrays are not copied.

    Its default precision is bfloat16 on processors that have it, whose answers are not those of the weights.
    """
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    models = [core.compile_model(core.read_model(graph), "CPU", OPENVINO) for _ in range(count)]

    def make_run(request: Any) -> Run:
        return lambda x: request.infer([x], share_inputs=True, share_outputs=True)[0]

    return [make_run(model.create_infer_request()) for model in models]


ENGINES: Mapping[str, Callable[[bytes, int], list[Run]]] = {
    "onnxruntime": build_onnxruntime,
    "openvino": build_openvino,
}


class PlainWorker(asyncio.Protocol):
    """The connection of one front; requests run in the callback that reads them."""

    def __init__(self, sessions: Mapping[str, Run]) -> None:
        self._sessions = sessions
        self._buffer = bytearray()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A front has connected."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer every whole request in the buffer, in one write."""
        self._buffer += data
        buffer, at, out = self._buffer, 0, []
        while len(buffer) - at >= HEAD.size:
            ident, name_bytes, body_bytes = HEAD.unpack_from(buffer, at)
            end = at + HEAD.size + name_bytes + body_bytes
            if len(buffer) < end:
                break
            name = bytes(buffer[at + HEAD.size : end - body_bytes]).decode()
            reply = self._run(name, bytes(buffer[end - body_bytes : end]))
            out.append(struct.pack("<II", ident, len(reply)) + reply)
            at = end
        del buffer[:at]
        if out:
            self._transport.write(b"".join(out))

    def _run(self, name: str, body: bytes) -> bytes:
        x = np.array(orjson.loads(body)["x"], dtype=np.float32)[None]
        answer = self._sessions[name](x)
        return orjson.dumps({"predictions": answer}, option=orjson.OPT_SERIALIZE_NUMPY)


async def main(model: Path, count: int, path: str, engine: str) -> None:
    """Build the sessions, then serve until killed."""
    built = ENGINES[engine](model.read_bytes(), count)  # noqa: ASYNC240 -- before anything is served
    sessions = {f"m{i}": run for i, run in enumerate(built)}
    server = await asyncio.get_running_loop().create_unix_server(lambda: PlainWorker(sessions), path)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]))
