"""A TorchServe 0.12 handler, as its users write one: the stages of BaseHandler, eager torch."""
# It runs in the peer's environment, copied beside network.py.
# ruff: noqa: INP001
# mypy: ignore-errors

from typing import Any

import torch
from network import load_network
from ts.torch_handler.base_handler import BaseHandler


class TorchServeHandler(BaseHandler):
    """Body {"x": [8][168]} -> {"predictions": [[24][5]]}; TorchServe has parsed the JSON."""

    def initialize(self, context: Any) -> None:
        """Read the weights beside this file."""
        self.network = load_network(context.system_properties["model_dir"])
        self.initialized = True

    def preprocess(self, data: list[Any]) -> torch.Tensor:
        """One row for each request of the batch."""
        return torch.tensor([row["body"]["x"] for row in data], dtype=torch.float32)

    def inference(self, data: torch.Tensor) -> torch.Tensor:
        """All rows at once."""
        with torch.inference_mode():
            answer: torch.Tensor = self.network(data)
        return answer

    def postprocess(self, data: torch.Tensor) -> list[Any]:
        """One answer for each request of the batch."""
        return [{"predictions": [row]} for row in data.tolist()]
