"""What a replica's server has to do, asked by the link that other nodes have: its metrics may need a token."""

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec

from server.cluster.autoscaling import MeanUnderWay
from server.front.nodes.handshake import NotProven, read_secret
from server.front.nodes.membership import Node
from server.front.nodes.node_link import connect_to_node, make_client_context
from server.front.nodes.node_views import ask_node

ASK_S = 5.0  #: Ray gives up after 10


class OwnLoad:
    """Of one server, from its start to its end."""

    def __init__(self, node: Node, secret: Path, certificate: Path | None) -> None:
        self._node, self._secret = node, secret
        self._tls = make_client_context(certificate)
        self._mean = MeanUnderWay()

    def __repr__(self) -> str:
        return f"<OwnLoad of {self._node.name}>"

    async def count_under_way(self) -> float | None:
        """Requests that clients have asked this server, and that were under way, on average since it was asked last.

        None where that is not known: the first time, and while the server does not answer.
        """
        try:
            async with asyncio.timeout(ASK_S):
                said = await self._ask()
        except (OSError, NotProven):  # a TimeoutError is an OSError
            return None
        return None if said is None else self._mean.look(said["request_seconds"]["sum"], said["at"])

    async def _ask(self) -> dict[str, Any] | None:
        secret = read_secret(self._secret)
        link = await connect_to_node(self._node.address, self._node.number, secret, self._tls, lambda _: None)
        try:
            body, _ = await ask_node(link, time.monotonic() + ASK_S)
        finally:
            link.close()
        return msgspec.json.decode(body, type=dict[str, Any]) if body else None
