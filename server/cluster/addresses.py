"""Where a replica's server is reached from other hosts, made of the addresses that it announces. Pure."""

from collections.abc import Mapping
from urllib.parse import urlsplit

from server.front.nodes.membership import Node

EVERYWHERE = ("0.0.0.0", "[::]")  # noqa: S104 -- hosts of sockets that are bound to every address; none is bound here


def describe_node(name: str, addresses: Mapping[str, str]) -> Node:
    """The node by the addresses of its listeners, by name.

    One that listens on all addresses of its host is known by that at which other nodes reach the host: 0.0.0.0 would
    lead each reader to itself.
    """
    host = urlsplit(addresses["node"]).netloc.rpartition(":")[0]

    def locate(listener: str) -> str:
        parts = urlsplit(addresses[listener])
        bound, _, port = parts.netloc.rpartition(":")
        return f"{parts.scheme}://{host if bound in EVERYWHERE else bound}:{port}"

    def place(listener: str) -> str:
        return locate(listener).partition("://")[2]

    return Node(name, place("node"), place("metrics"), locate("management"), locate("inference"))
