"""A table by model name that is bounded in bytes. Pure.

Clients make up names: one has up to 1,024 characters, each of up to four bytes. A bound on the number of entries alone
would let the same table take 10 MB or 400 MB.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")

ENTRY_BYTES = 256  #: of one entry beside its name and its value: string and hash table


def name_bytes(name: str | bytes) -> int:
    """Bytes that a name takes in memory at most: its characters, and its UTF-8 where it is not ASCII.

    A name as it is on the wire (bytes) is counted with the text that it is decoded to.
    """
    text = len(name) if name.isascii() else 8 * len(name)
    return text + len(name) if isinstance(name, bytes) else text


class NameTable(Generic[Value]):
    """Values by name, oldest first. Beyond `max_bytes` the oldest entries are forgotten.

    `value_bytes`: what one value takes at most.
    """

    def __init__(self, max_bytes: int, value_bytes: int = 0) -> None:
        self._max_bytes, self._entry_bytes = max_bytes, ENTRY_BYTES + value_bytes
        self._entries: OrderedDict[str | bytes, Value] = OrderedDict()
        self.used_bytes = 0
        # Those that only read or reorder are the dictionary's own: they are called once or more a request.
        self.get = self._entries.get
        self.has = self._entries.__contains__
        self.touch = self._entries.move_to_end  #: make a name that is in the table the newest

    def __repr__(self) -> str:
        """For example `<NameTable 300 names, 0.1 of 4.0 MB>`."""
        return f"<NameTable {len(self)} names, {self.used_bytes / 1e6:.1f} of {self._max_bytes / 1e6:.1f} MB>"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str | bytes]:
        return iter(self._entries)

    def __reversed__(self) -> Iterator[str | bytes]:
        return reversed(self._entries)

    def items(self) -> Iterable[tuple[str | bytes, Value]]:
        """Names and values, oldest first."""
        return self._entries.items()

    def values(self) -> Iterable[Value]:
        """The values, oldest first."""
        return self._entries.values()

    def put(self, name: str | bytes, value: Value) -> list[Value]:
        """Set the name's value; the name is the newest then. Returns the values that are forgotten for it."""
        self.pop(name)
        self._entries[name] = value
        self.used_bytes += self._entry_bytes + name_bytes(name)
        forgotten: list[Value] = []
        while self.used_bytes > self._max_bytes:
            forgotten.append(self.pop_oldest())
        return forgotten

    def pop_oldest(self) -> Value:
        """Remove the oldest name and return its value. Raises KeyError for an empty table."""
        name, value = self._entries.popitem(last=False)
        self.used_bytes -= self._entry_bytes + name_bytes(name)
        return value

    def pop(self, name: str | bytes) -> Value | None:
        """Remove the name and return its value; None if it was not there."""
        if name not in self._entries:
            return None
        self.used_bytes -= self._entry_bytes + name_bytes(name)
        return self._entries.pop(name)

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
        self.used_bytes = 0
