"""A model of Triton 2.51's Python backend, as its users write one: ONNX Runtime on one thread, all requests in one run.

It runs in a process of the backend, copied into the model's folder as `model.py` beside `model.onnx`.
"""
# mypy: ignore-errors

import os
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Input x [n, 8, 168] -> output predictions [n, 24, 5]."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the graph in the model's folder."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")  # noqa: PTH118
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the requests that Triton's dynamic batcher hands over together as one batch."""
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        x = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        found = self.session.run(None, {"x": x})[0]
        responses, at = [], 0
        for each in inputs:
            output = pb_utils.Tensor("predictions", found[at : at + len(each)])
            responses.append(pb_utils.InferenceResponse([output]))
            at += len(each)
        return responses
