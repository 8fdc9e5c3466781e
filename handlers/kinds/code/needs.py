"""What a code archive needs of the environment that it runs in, found by reading its source. Nothing is imported."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

from handlers.kinds.code.entry_point import EntryPoint, list_requirements
from handlers.kinds.code.source_reader import Import, Source, read_source
from model_store.archives.archive import Archive
from model_store.errors import LoadError

MAX_FILES = 64  #: source files that are read
MAX_REQUIREMENTS = 64

#: Where the name of an import is not the name of its package.
_PACKAGES: Mapping[str, str] = {
    "ts": "fleetcast[torchserve]", "mms": "fleetcast[mms]", "sklearn": "scikit-learn", "PIL": "pillow", "cv2":
    "opencv-python-headless", "yaml": "pyyaml", "skimage": "scikit-image", "bs4": "beautifulsoup4", "google":
    "protobuf", "sagemaker_inference": "sagemaker-inference", "sagemaker_pytorch_serving_container":
    "sagemaker-pytorch-inference", "dateutil": "python-dateutil",
}  # fmt: skip
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)")


@dataclass(frozen=True, slots=True)
class Need:
    """A module that is not the archive's own: where it is imported, whether always, whether it is installed."""

    module: str
    file: str
    line: int
    always: bool
    here: bool

    @property
    def package(self) -> str:
        """What to install."""
        return _PACKAGES.get(self.module, self.module)

    def __str__(self) -> str:
        """For example `captum, which text.py imports in line 3: pip install captum`."""
        where = "" if self.always else ", in a function or under a condition"
        return f"{self.module}, which {self.file} imports in line {self.line}{where}: pip install '{self.package}'"


def read_sources(archive: Archive) -> dict[str, Source]:
    """Member -> what it imports and defines, for at most MAX_FILES files of Python; damaged ones are left out."""
    found = {}
    for name in [name for name in archive.members if name.endswith(".py")][:MAX_FILES]:
        try:
            found[name] = read_source(bytes(archive.read(name)))
        except LoadError:
            continue
    return found


def find_needs(sources: Mapping[str, Source], entry: EntryPoint) -> list[Need]:
    """The modules that are neither in the archive nor in Python; each once, those that are always imported first."""
    own = {part for name in sources for part in PurePosixPath(name).with_suffix("").parts}
    imports = [(file, each) for file, source in sources.items() for each in source.imports]
    handlers = [f"ts.torch_handler.{entry.module}"] if entry.from_package else []
    asked = [*handlers, *(each.module for _, each in imports if each.module.startswith("ts.") and each.always)]
    imports += [(file, each) for file, source in _follow_torchserve(asked) for each in source.imports if each.always]
    if handlers:
        imports.insert(0, ("the manifest's handler", Import("ts", 1, always=True)))
    needs: dict[str, Need] = {}
    for file, each in imports:
        name = each.module.partition(".")[0]
        if not name or name in own or name in sys.stdlib_module_names:
            continue
        if name not in needs or (each.always and not needs[name].always):
            needs[name] = Need(name, file, each.line, each.always, _is_here(name))
    return sorted(needs.values(), key=lambda need: not need.always)


def _is_here(name: str) -> bool:
    """Whether a module of this name is installed: looked for in the folders of packages, and not imported."""
    return PathFinder.find_spec(name, [path for path in sys.path if path]) is not None


def _follow_torchserve(modules: Iterable[str]) -> Iterator[tuple[str, Source]]:
    """The files of TorchServe that these modules are in, and those of its own that they import in turn."""
    spec = PathFinder.find_spec("ts", [path for path in sys.path if path])
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(spec.submodule_search_locations[0]).parent
    waiting, seen = list(modules), set[Path]()
    while waiting and len(seen) < MAX_FILES:
        file = root.joinpath(*waiting.pop().split(".")).with_suffix(".py")
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        source = read_source(file.read_bytes())
        yield str(file.relative_to(root)), source
        package = file.relative_to(root).with_suffix("").parts[:-1]
        waiting += [name for each in source.imports if each.always and (name := _resolve(each.module, package))]


def _resolve(module: str, package: tuple[str, ...]) -> str:
    """The absolute name of a module of TorchServe's; empty for one that is not."""
    dots = len(module) - len(module.lstrip("."))
    if not dots:
        return module if module.startswith("ts.") else ""
    return ".".join([*package[: len(package) - dots + 1], module.lstrip(".")])


def read_requirements(archive: Archive) -> list[str]:
    """The lines of its requirements, each with the version that is here; at most MAX_REQUIREMENTS."""
    lines = []
    for name in list_requirements(archive):
        try:
            text = bytes(archive.read(name)[: 64 * 1024]).decode(errors="replace")
        except LoadError:
            continue
        lines += [line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip()]
    return [_compare(line) for line in lines[:MAX_REQUIREMENTS]]


def _compare(line: str) -> str:
    name = _REQUIREMENT.match(line)
    if name is None:
        return line
    try:
        return f"{line} (here: {version(name[1])})"
    except PackageNotFoundError:
        return f"{line} (not here)"
