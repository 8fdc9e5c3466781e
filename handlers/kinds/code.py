"""Archives of kind code: a Python handler of the user's, as TorchServe and SageMaker have them. Not run yet."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NoReturn

from handlers.base import Shape
from handlers.kinds.models import BuiltModel, Target
from handlers.kinds.onnx import find_onnx_file
from handlers.kinds.packing import ArchiveParts
from model_store.archives.archive import Archive
from model_store.archives.container import quote_name
from model_store.archives.manifest import Kind, Spec
from model_store.errors import UnsupportedKind

TORCHSERVE_HANDLERS = ("image_classifier", "image_segmenter", "object_detector", "text_classifier")
TORCH_FILES = (".pt", ".pth")
RUNS_LATER = (
    "this version runs forecaster, graph and onnx archives, and a later version of Fleetcast runs code in forked child "
    "processes where the operator allows it"
)


class CodeKind:
    """See ArchiveKind."""

    kind = Kind.CODE

    def recognises(self, archive: Archive) -> bool:
        """By a handler's file, or by what only a handler of TorchServe's own can load."""
        names = archive.container.members
        handler = archive.mar.model.handler if archive.mar else ""
        module = handler.partition(":")[0].removesuffix(".py") + ".py"  # `service.py:handle`, `service:handle`
        if module in names or any(_is_sagemaker_code(name) for name in names):
            return True
        serialized = archive.mar.model.serialized_file if archive.mar else ""
        torch = handler in TORCHSERVE_HANDLERS or serialized.endswith(TORCH_FILES)
        return torch and find_onnx_file(archive) not in names

    def build(self, archive: Archive, target: Target) -> BuiltModel:
        """Raises UnsupportedKind."""
        del target
        _refuse(archive)

    def tensor_inputs(self, archive: Archive) -> Mapping[str, Shape]:
        """Raises UnsupportedKind."""
        _refuse(archive)

    def describe(self, archive: Archive) -> dict[str, Any]:
        """Nothing: code is not read."""
        del archive
        return {}

    def pack(self, parts: ArchiveParts) -> tuple[Spec, Mapping[str, bytes]]:
        """Raises UnsupportedKind."""
        del parts
        raise UnsupportedKind("archives with code are packed by their own tools, such as torch-model-archiver")


def _refuse(archive: Archive) -> NoReturn:
    handler = f" (handler {quote_name(archive.mar.model.handler)})" if archive.mar and archive.mar.model.handler else ""
    raise UnsupportedKind(f"{archive.name} is a code archive{handler}; {RUNS_LATER}")


def _is_sagemaker_code(name: str) -> bool:
    path = PurePosixPath(name)
    return name == "inference.py" or (path.suffix == ".py" and path.parts[0] == "code")
