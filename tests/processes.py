"""What the kernel says of processes; what ends between its listing and its reading is left out."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def list_descriptors(pid: int) -> Iterator[tuple[Path, str]]:
    """Each open descriptor of the process, as a path below /proc, and what it is open on. None where it has ended."""
    with suppress(FileNotFoundError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                yield link, str(link.readlink())


def list_threads(pid: int | str = "self") -> dict[int, int]:
    """The niceness of each thread of the process, by the thread's number."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the one while it is opened, the other while it is read
            found[int(task.name)] = int(task.joinpath("stat").read_text().rpartition(")")[2].split()[16])
    return found
