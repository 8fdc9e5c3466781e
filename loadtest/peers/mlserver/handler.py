"""An MLServer 1.7 runtime, as its users write one: an MLModel, eager torch."""
# It runs in the peer's environment, copied beside network.py.
# ruff: noqa: INP001
# mypy: ignore-errors

import torch
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from mlserver.utils import get_model_uri
from network import load_network


class MLServerModel(MLModel):
    """Input x [1, 8, 168] -> output predictions [1, 24, 5]."""

    async def load(self) -> bool:
        """Read the weights in the model's folder."""
        self.network = load_network(await get_model_uri(self._settings))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run in the event loop, as every MLServer runtime does without parallel workers."""
        x = torch.from_numpy(NumpyCodec.decode_input(payload.inputs[0])).float()
        with torch.inference_mode():
            answer = self.network(x)
        output = NumpyCodec.encode_output("predictions", answer.numpy())
        return InferenceResponse(model_name=self.name, outputs=[output])
