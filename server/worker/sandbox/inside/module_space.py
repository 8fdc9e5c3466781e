"""The modules of a child: Python's, the installed packages' and the archive's, and none of ours.

An archive may hold a `handler.py`, a `utils.py`, or packages called `server` or `handlers`: each child finds its own,
because it is a process of its own. Ours are in the template's memory and on its path, so that they are removed here.
"""

import functools
import importlib.machinery
import random
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

OURS = ("server", "handlers", "model_store", "loadtest", "fleetcast")
#: Modules that are never forgotten: Python's own, and those that cannot be imported twice.
KEPT = {*sys.stdlib_module_names, "torch", "numpy"}


class OwnNamesFinder:
    """Finds modules of our names in the archive alone, also where our packages are installed beside others."""

    def __init__(self, folders: Sequence[str]) -> None:
        self._folders = list(folders)

    def __repr__(self) -> str:
        """For example `<OwnNamesFinder in ['model']>`."""
        return f"<OwnNamesFinder in {self._folders}>"

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`. Raises ModuleNotFoundError for a name of ours that the archive lacks."""
        if path is not None or name not in OURS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, self._folders, target)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec


def _forget_shadowed(folders: Sequence[str]) -> None:
    """Forget modules of the template that the archive has itself: `utils.py`, or a package called `ts`."""
    own = {entry.name.removesuffix(".py") for folder in folders for entry in Path(folder).iterdir()} - KEPT
    _forget(own)


@functools.cache
def index_modules() -> Mapping[str, Sequence[str]]:
    """The modules that are imported, by the first word of their names.

    It is asked first in the template, when all is imported: a child that looked at thousands of names would copy the
    pages that they lie in.
    """
    found: dict[str, list[str]] = {}
    for name in sys.modules:
        found.setdefault(name.partition(".")[0], []).append(name)
    return found


def _forget(packages: Iterable[str]) -> None:
    for package in packages:
        for name in index_modules().get(package, ()):
            sys.modules.pop(name, None)


@functools.cache
def find_checkout() -> Path | None:
    """The folder that our packages are imported from, where it holds nothing else that a child could need.

    It is asked first in the template, because it imports.
    """
    folder = Path(__file__).parents[4]
    installed = {Path(path) for path in sysconfig.get_paths().values()}
    return None if folder in installed else folder


def enter(model_folder: Path, code_folder: str, packages: str) -> None:
    """Forget our modules; import from the archive first, then from the `packages` that were installed for it.

    `code_folder`: where in the archive its modules lie.
    """
    checkout = find_checkout()
    _forget(OURS)
    folders = list(dict.fromkeys((str(model_folder / code_folder), str(model_folder))))
    _forget_shadowed(folders)
    rest = [path for path in sys.path if Path(path).is_absolute() and Path(path) != checkout]
    sys.path[:] = [*folders, *([packages] if packages else []), *rest]
    sys.meta_path.insert(0, OwnNamesFinder(folders))
    sys.argv[:] = ["handler"]
    sys.modules["__main__"] = ModuleType("__main__")
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # else every child would draw the template's numbers
