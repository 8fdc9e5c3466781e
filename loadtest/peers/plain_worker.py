"""The plain two-process path: one ONNX Runtime session a model behind one Unix socket, and nothing else.

It has no cache, no checks, no error handling and no batching across models. `python -m
loadtest.peers.plain_worker MODEL.onnx COUNT SOCKET` serves COUNT sessions of the same graph under the names m0, m1, ...
Frames in: id, name length, body length (u32 little-endian), name, body; frames out: id, length, body.
"""

import asyncio
import struct
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort
import orjson
import uvloop

HEAD = struct.Struct("<III")


class PlainWorker(asyncio.Protocol):
    """The connection of one front; requests run in the callback that reads them."""

    def __init__(self, sessions: dict[str, Any]) -> None:
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
        answer = self._sessions[name].run(None, {"x": x})[0]
        return orjson.dumps({"predictions": answer}, option=orjson.OPT_SERIALIZE_NUMPY)


async def main(model: Path, count: int, path: str) -> None:
    """Build the sessions, then serve until killed."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    graph = model.read_bytes()  # noqa: ASYNC240 -- before anything is served
    sessions = {f"m{i}": ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]) for i in range(count)}
    server = await asyncio.get_running_loop().create_unix_server(lambda: PlainWorker(sessions), path)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
