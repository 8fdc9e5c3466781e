"""ONNX archives: which they are and where they run (`archive_kind`), what a file may hold (`scan`), how a session is
opened (`session`), how a model runs (`model`), what ends a run that takes too long (`watchdog`), and CUDA (`cuda`).
"""

from handlers.kinds.onnx.archive_kind import OnnxKind, find_onnx_file, place_session
from handlers.kinds.onnx.model import OnnxModel
from handlers.kinds.onnx.session import Provider

__all__ = ["OnnxKind", "OnnxModel", "Provider", "find_onnx_file", "place_session"]
