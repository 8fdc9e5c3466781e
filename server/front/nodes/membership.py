"""Which nodes share the models: the table that `nodes_file` holds, and the file followed. Runs in a front.

Whoever places the nodes writes the file, as a whole and at once: `server.cluster`, or a program of the operator's. A
file that is missing or wrong changes nothing: a front goes on with what it knows.
"""

from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
from msgspec import Meta, Struct

MAX_NODES = 1024
MAX_FILE_BYTES = 1024 * 1024

Name = Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/-]*$")]
Address = Annotated[str, Meta(max_length=300, pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+):[0-9]{1,5}$")]

log = structlog.get_logger()


class Node(Struct, frozen=True):
    """A server of the cluster. `address`: HOST:PORT of its `node_port`. `name` decides which models it owns.

    INVARIANT: a node that comes again by its old name owns the models that it owned, whatever its address is.
    """

    name: Name
    address: Address
    metrics: str = ""  #: HOST:PORT of its metrics listener, for who scrapes them
    management: str = ""  #: address of its management listener, for operators
    inference: str = ""  #: address of its inference listener

    @property
    def number(self) -> int:
        """The node as the router knows it."""
        return number_node(self.name)


class NodeTable(Struct, frozen=True):
    """The content of `nodes_file`."""

    nodes: Annotated[list[Node], Meta(max_length=MAX_NODES)]


def number_node(name: str) -> int:
    """The 64 bits by which rendezvous hashing knows a node."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def parse_nodes(raw: bytes) -> dict[int, Node]:
    """The nodes by number. Raises ValueError that says what is wrong."""
    nodes = msgspec.json.decode(raw, type=NodeTable).nodes  # its ValidationError is a ValueError
    table = {node.number: node for node in nodes}
    if len(table) < len(nodes):
        raise ValueError("two nodes have one name")
    return table


class NodesFile:
    """The file, read anew when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._complained = ""

    def __repr__(self) -> str:
        """For example `<NodesFile nodes.json>`."""
        return f"<NodesFile {self._path.name}>"

    def read_changes(self) -> dict[int, Node] | None:
        """The nodes, where the file has changed and is right; else None. Why it is not right is logged once."""
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_ino, found.st_size)
            if seen == self._seen:
                return None
            if found.st_size > MAX_FILE_BYTES:
                raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")  # noqa: TRY301 -- one way to say it
            nodes = parse_nodes(self._path.read_bytes())
        except (OSError, ValueError) as error:
            if str(error) != self._complained:
                self._complained = str(error)
                log.warning("nodes_not_read", file=str(self._path), why=str(error)[:500], then="nodes stay as they are")
            return None
        self._seen, self._complained = seen, ""
        return nodes
