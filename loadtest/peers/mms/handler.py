"""A Multi Model Server 1.1 handler, as its users write one: a module with `handle`, eager torch."""
# It runs in the peer's environment, copied beside network.py.
# ruff: noqa: INP001
# mypy: ignore-errors

from typing import Any

import torch
from network import load_network

_networks: list[Any] = []


def handle(data: list[Any] | None, context: Any) -> list[Any] | None:
    """Body {"x": [8][168]} -> {"predictions": [[24][5]]}; the first call has no data and loads the model."""
    if not _networks:
        _networks.append(load_network(context.system_properties["model_dir"]))
    if not data:
        return None
    x = torch.tensor([row["body"]["x"] for row in data], dtype=torch.float32)
    with torch.inference_mode():
        return [{"predictions": [row]} for row in _networks[0](x).tolist()]
