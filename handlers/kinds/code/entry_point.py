"""What a code archive runs, and what it needs for that: read from its manifest and the names of its members. Pure.

The rules are those of the servers that the archives were made for:

1. A MAR's manifest names a handler: `handler.py`, `handler`, `handler.py:function` or `folder/handler.py`. Multi Model
   Server always has the function, and says `modelServerVersion` in its manifest.
2. A MAR may name a handler of TorchServe's own, such as `text_classifier`, which is in the package `torchserve`.
3. SageMaker's toolkits run `code/inference.py`, or `inference.py` beside the model.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath

from model_store.archives.archive import Archive, list_names
from model_store.archives.container import quote_name
from model_store.archives.manifest import MAR_MANIFEST
from model_store.errors import ArchiveInvalid, UnsupportedKind

#: Handlers in the package `torchserve`; `base_handler` has the class that others derive from, and runs as it is.
TORCHSERVE_HANDLERS = ("base_handler", "image_classifier", "image_segmenter", "object_detector", "text_classifier")
SAGEMAKER_FOLDER, SAGEMAKER_PROGRAM = "code", "inference.py"
MOST_FOLDERS = 2  #: parts of the path of a script that SAGEMAKER_PROGRAM or SAGEMAKER_SUBMIT_DIRECTORY may name
REQUIREMENTS = "requirements.txt"


class CodeStyle(StrEnum):
    """Whose rules the code follows: how it is found, called, and fails."""

    TORCHSERVE = "torchserve"
    MMS = "mms"
    SAGEMAKER = "sagemaker"


CALLS = {
    CodeStyle.TORCHSERVE: "TorchServe handler",
    CodeStyle.MMS: "Multi Model Server handler",
    CodeStyle.SAGEMAKER: "SageMaker script",
}


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """The module that is imported, and where it lies.

    `function`: named by the manifest; empty: `handle`, or the module's only class, or SageMaker's functions. `folder`:
    of the archive, from which the module is imported; empty: the top. `from_package`: the module is none of the
    archive's but one of `ts.torch_handler`.
    """

    style: CodeStyle
    module: str
    function: str = ""
    folder: str = ""
    from_package: bool = False

    def __str__(self) -> str:
        """For example `TorchServe handler 'handler.py', function 'handle'`."""
        file = self.module if self.from_package else str(PurePosixPath(self.folder, f"{self.module}.py"))
        function = f", function {quote_name(self.function)}" if self.function else ""
        return f"{CALLS[self.style]} {quote_name(file)}{function}"


def recognises_code(archive: Archive) -> bool:
    """Whether an archive without `fleetcast.json` has code of its own to run."""
    found = _find_in_mar(archive)
    is_own = found is not None and not found.from_package
    return is_own or any(_is_sagemaker_code(name, archive) for name in archive.container.members)


def find_entry_point(archive: Archive, program: str = SAGEMAKER_PROGRAM) -> EntryPoint:
    """What the archive runs. `program`: the script of SageMaker's archives, in `code` or at the top.

    Raises ArchiveInvalid that says what it would have to hold.
    """
    found = _find_in_mar(archive)
    if found is not None:
        return found
    for folder in (SAGEMAKER_FOLDER, ""):
        script = PurePosixPath(folder, program)
        if str(script) in archive.container.members:
            parent = "" if str(script.parent) == "." else str(script.parent)
            return EntryPoint(CodeStyle.SAGEMAKER, script.stem, folder=parent)
    handler = archive.mar.model.handler if archive.mar else ""
    said = f"{MAR_MANIFEST} names the handler {quote_name(handler)}, but " if handler else ""
    scripts = list_names(quote_name(name) for name in archive.members if name.endswith(".py"))
    raise ArchiveInvalid(
        f"{archive.name}: {said}it has neither a handler that its manifest names, nor a handler's name of "
        f"TorchServe's ({', '.join(TORCHSERVE_HANDLERS)}), nor code/{program}; its scripts: {scripts or 'none'}"
    )


def list_requirements(archive: Archive) -> list[str]:
    """The members that name packages to be installed."""
    return [name for name in archive.members if name in (REQUIREMENTS, f"{SAGEMAKER_FOLDER}/{REQUIREMENTS}")]


def refuse_requirements(archive: Archive) -> None:
    """Raises UnsupportedKind that says what to do, if the archive names packages to be installed."""
    found = list_requirements(archive)
    if found:
        raise UnsupportedKind(
            f"{archive.name}: {list_names(map(quote_name, found))} names packages, and this server installs none for "
            f"an archive: install them beside the server (pip install -r {REQUIREMENTS}), and pack the archive without "
            "it; or let the server install them (--code-requirements install)"
        )


def _find_in_mar(archive: Archive) -> EntryPoint | None:
    """The handler that a MAR's manifest names; None where it names none that could be imported."""
    if archive.mar is None or not archive.mar.model.handler:
        return None
    file, _, function = archive.mar.model.handler.partition(":")
    style = CodeStyle.MMS if archive.mar.model_server_version else CodeStyle.TORCHSERVE
    named = PurePosixPath(file.removesuffix(".py"))
    for module in (named, PurePosixPath(named.name)):  # torch-model-archiver packs handlers without their folder
        if f"{module}.py" in archive.container.members:
            folder = "" if str(module.parent) == "." else str(module.parent)
            return EntryPoint(style, module.name, function, folder)
    from_package = file.removesuffix(".py") in TORCHSERVE_HANDLERS
    return EntryPoint(CodeStyle.TORCHSERVE, named.name, function, from_package=True) if from_package else None


def _is_sagemaker_code(name: str, archive: Archive) -> bool:
    """A script is in the folder `code`, or is the usual one; of a tar without a manifest it may be any script."""
    path = PurePosixPath(name)
    is_any = archive.mar is None and len(path.parts) <= MOST_FOLDERS
    return name == SAGEMAKER_PROGRAM or (path.suffix == ".py" and (path.parts[0] == SAGEMAKER_FOLDER or is_any))
