"""Several servers on this host as the nodes of a cluster, without Ray: who writes the table of nodes is the test."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from server.cluster.addresses import describe_node
from server.front.nodes.membership import NodeTable
from tests.e2e.server import Server, run_server
from tests.s3 import S3Server

SECRET = "a secret of the tests' nodes"


@dataclass
class Nodes:
    """The servers by name, and the table that they follow."""

    file: Path
    servers: dict[str, Server] = field(default_factory=dict)

    def write(self, *names: str) -> None:
        """Have these nodes in the table, at the addresses that they announced."""
        table = NodeTable([describe_node(name, self.servers[name].addresses) for name in names])
        draft = self.file.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(table))
        draft.replace(self.file)

    def holders(self) -> dict[str, set[str]]:
        """The nodes that hold each model."""
        held: dict[str, set[str]] = {}
        for name, server in self.servers.items():
            for model in server.resident():
                held.setdefault(model, set()).add(name)
        return held


@contextmanager
def run_nodes(s3: S3Server, folder: Path, store: str, names: Sequence[str], **settings: Any) -> Iterator[Nodes]:
    """A node for each name, all of them in the table."""
    secret = folder / "secret"
    secret.write_text(SECRET)
    nodes = Nodes(folder / "nodes.json")
    with ExitStack() as stack:
        for name in names:
            own = folder / name
            own.mkdir()
            given = {"node_name": name, "nodes_file": nodes.file, "node_key_file": secret, **settings}
            nodes.servers[name] = stack.enter_context(run_server(s3, own, store, **given))
        nodes.write(*names)
        yield nodes
