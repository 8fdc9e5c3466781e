"""The same input as a request of each kind that servers are asked with. Pure."""

import json
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from loadtest.driver.dialects import HEADER_JSON_BYTES, ClientDialect, encode_npy
from loadtest.driver.request_bodies import BINARY, RequestBody
from server.contract import NPY

Encode = Callable[[npt.NDArray[np.float32], ClientDialect], RequestBody]


def encode_json(x: npt.NDArray[np.float32], dialect: ClientDialect) -> RequestBody:
    """Write JSON as the protocol has it."""
    return RequestBody(dialect.tensor_body(x))


def encode_array(x: npt.NDArray[np.float32], _: ClientDialect) -> RequestBody:
    """Write a .npy file."""
    return RequestBody(encode_npy(x), NPY)


def encode_binary(x: npt.NDArray[np.float32], _: ClientDialect) -> RequestBody:
    """Write a binary tensor of the Open Inference Protocol, which asks that the answer be one too."""
    data = np.ascontiguousarray(x, "<f4").tobytes()
    one = {"name": "x", "shape": [1, *x.shape], "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [one], "parameters": {"binary_data_output": True}}).encode()
    return RequestBody(head + data, BINARY, {HEADER_JSON_BYTES: str(len(head))})
