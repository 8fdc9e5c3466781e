"""The kind code: recognised and explained here, run by no process that reads archives."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NoReturn

from handlers.kinds.code.batch_settings import explain_batches, read_batch_settings
from handlers.kinds.code.entry_point import (
    TORCHSERVE_HANDLERS,
    CodeStyle,
    EntryPoint,
    find_entry_point,
    recognises_code,
)
from handlers.kinds.code.model_file import find_model_files
from handlers.kinds.code.needs import find_needs, read_requirements, read_sources
from handlers.kinds.code.source_reader import Source
from handlers.kinds.models import BuiltModel, Target, TensorInput
from handlers.kinds.onnx import find_onnx_file
from handlers.kinds.packing import ArchiveParts
from model_store.archives.archive import Archive, list_names
from model_store.archives.manifest import Kind, Spec
from model_store.errors import ArchiveInvalid, UnsupportedKind

TORCH_FILES = (".pt", ".pth")
PLACE = "only in a child process of a server that was started with --allow-code and the beginning of its key, or '*'"
SCRIPT_FUNCTIONS = ("model_fn", "input_fn", "predict_fn", "output_fn", "transform_fn")


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

    def tensor_inputs(self, archive: Archive) -> Mapping[str, TensorInput]:
        """Raises UnsupportedKind: only the code knows them."""
        _refuse(archive)

    def describe(self, archive: Archive) -> dict[str, Any]:
        """What would run, where, and what it needs. Nothing of the archive is imported. Never raises."""
        try:
            entry = find_entry_point(archive)
        except ArchiveInvalid as error:
            return {"code": {"problem": str(error)}}
        sources = read_sources(archive)
        needs = find_needs(sources, entry)
        return {
            "code": {
                "style": str(entry.style),
                "entry": str(entry),
                "calls": _say_calls(entry, sources),
                "batches": _say_batches(archive, entry),
                "model_files": find_model_files(archive),
                "runs": PLACE,
                "needs": sorted({"torch", *(need.module for need in needs if need.here)}),
                "missing": [str(need) for need in needs if not need.here],
                "requirements": read_requirements(archive),
                "flags": ["--allow-code", archive.name],
            }
        }

    def pack(self, parts: ArchiveParts) -> tuple[Spec, Mapping[str, bytes]]:
        """Raises UnsupportedKind."""
        del parts
        raise UnsupportedKind("archives with code are packed by their own tools, such as torch-model-archiver")


def _refuse(archive: Archive) -> NoReturn:
    raise UnsupportedKind(f"{archive.name} is a code archive ({find_entry_point(archive)}): it runs {PLACE}")


def _say_calls(entry: EntryPoint, sources: Mapping[str, Source]) -> str:
    """What of the module is called, as far as it says by names at its top."""
    file = str(PurePosixPath(entry.folder, f"{entry.module}.py"))
    defines = sources[file].defines if file in sources else []
    if entry.style is CodeStyle.SAGEMAKER:
        own = [name for name in SCRIPT_FUNCTIONS if name in defines]
        rest = [] if "transform_fn" in own else [name for name in SCRIPT_FUNCTIONS[1:-1] if name not in own]
        words = [f"{', '.join(own)} of the script"] * bool(own) + [f"{', '.join(rest)} of the toolkit's kind"] * bool(
            rest
        )
        return "; ".join(words)
    function = entry.function or "handle"
    if entry.from_package or function in defines or not defines:
        return (
            function if entry.function or function in defines else "handle, or initialize and handle of its only class"
        )
    classes = [name for name in defines if name[:1].isupper()]
    return f"initialize and handle of {list_names(classes) or 'its only class'}"


def _say_batches(archive: Archive, entry: EntryPoint) -> str:
    if entry.style is CodeStyle.SAGEMAKER:
        return "one by one"
    return explain_batches(read_batch_settings(archive))
