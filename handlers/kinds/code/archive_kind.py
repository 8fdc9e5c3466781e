"""The kind code: recognised and explained here, run by no process that reads archives."""

from collections.abc import Mapping
from typing import Any, NoReturn

from handlers.base import Shape
from handlers.kinds.code.entry_point import (
    TORCHSERVE_HANDLERS,
    CodeStyle,
    EntryPoint,
    find_entry_point,
    list_requirements,
    recognises_code,
)
from handlers.kinds.models import BuiltModel, Target
from handlers.kinds.onnx import find_onnx_file
from handlers.kinds.packing import ArchiveParts
from model_store.archives.archive import Archive
from model_store.archives.manifest import Kind, Spec
from model_store.errors import ArchiveInvalid, UnsupportedKind

TORCH_FILES = (".pt", ".pth")
PLACE = "only in a child process of a server that was started with --allow-code and the beginning of its key, or '*'"
PACKAGES = {CodeStyle.TORCHSERVE: "torchserve (ts)", CodeStyle.MMS: "multi-model-server (mms)"}


class CodeKind:
    """See ArchiveKind."""

    kind = Kind.CODE

    def recognises(self, archive: Archive) -> bool:
        """By a handler's file, or by what only a handler of TorchServe's own can load."""
        if recognises_code(archive):
            return True
        handler = archive.mar.model.handler if archive.mar else ""
        serialized = archive.mar.model.serialized_file if archive.mar else ""
        torch = handler in TORCHSERVE_HANDLERS or serialized.endswith(TORCH_FILES)
        return torch and find_onnx_file(archive) not in archive.container.members

    def build(self, archive: Archive, target: Target) -> BuiltModel:
        """Raises UnsupportedKind: code never runs in the process that reads the archive."""
        del target
        _refuse(archive)

    def tensor_inputs(self, archive: Archive) -> Mapping[str, Shape]:
        """Raises UnsupportedKind: only the code knows them."""
        _refuse(archive)

    def describe(self, archive: Archive) -> dict[str, Any]:
        """What would run, where, and what it needs. Nothing of the archive is imported. Never raises."""
        try:
            entry = find_entry_point(archive)
        except ArchiveInvalid as error:
            return {"code": {"problem": str(error)}}
        return {
            "code": {
                "style": str(entry.style),
                "entry": str(entry),
                "calls": _say_calls(entry),
                "runs": PLACE,
                "needs": _list_needs(archive, entry),
            }
        }

    def pack(self, parts: ArchiveParts) -> tuple[Spec, Mapping[str, bytes]]:
        """Raises UnsupportedKind."""
        del parts
        raise UnsupportedKind("archives with code are packed by their own tools, such as torch-model-archiver")


def _refuse(archive: Archive) -> NoReturn:
    raise UnsupportedKind(f"{archive.name} is a code archive ({find_entry_point(archive)}): it runs {PLACE}")


def _say_calls(entry: EntryPoint) -> str:
    """What of the module is called."""
    if entry.style is CodeStyle.SAGEMAKER:
        return "model_fn, then transform_fn, or input_fn, predict_fn and output_fn"
    return entry.function or "handle, or initialize and handle of its only class"


def _list_needs(archive: Archive, entry: EntryPoint) -> list[str]:
    """What has to be there beside the archive, as far as its names say."""
    needs = ["torch"]
    package = PACKAGES.get(entry.style)
    if package is not None:
        needs.append(f"{package}{'' if entry.from_package else ', if it imports that'}")
    requirements = list_requirements(archive)
    if requirements:
        needs.append(f"the packages of {', '.join(requirements)}, installed beside the server: pack without it")
    return needs
