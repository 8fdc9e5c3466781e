"""Exports the weights that all servers get as ONNX graphs, for the peers that run ONNX Runtime or OpenVINO."""

import warnings
from pathlib import Path

import torch

SHAPE = (1, 8, 168)


def export_graph(network: torch.nn.Module, path: Path, *, any_rows: bool = False) -> Path:
    """Export a network of x [1, 8, 168] -> predictions, or of x [n, 8, 168] where a server makes batches."""
    axes = {"x": {0: "n"}, "predictions": {0: "n"}} if any_rows else None
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the old exporter, whose graph ONNX Runtime runs fastest, warns that it is deprecated
        torch.onnx.export(
            network,
            (torch.zeros(SHAPE),),
            path,
            dynamo=False,
            input_names=["x"],
            output_names=["predictions"],
            dynamic_axes=axes,
            verbose=False,
        )
    return path
