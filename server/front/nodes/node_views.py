"""The nodes of the table as a front sees them, for viewers: who is linked, and what each says it does."""

import asyncio
import time
from collections.abc import Collection, Mapping

from server.errors import Refused, Situation
from server.front.nodes.membership import Node
from server.front.nodes.node_link import NodeLink
from server.front.worker_client import WorkerLost
from server.ipc.frames import CHUNK, Partial
from server.ipc.operations import NodeView

HERE, LINKED, SILENT, LOST = "here", "linked", "silent", "lost"


async def describe_nodes(
    nodes: Mapping[int, Node],
    links: Mapping[int, NodeLink],
    silent: Collection[int],
    here: int,
    within_s: float,
) -> list[NodeView]:
    """A view of each node, by name. Linked ones are asked at the same time; within 0 s none is asked."""
    deadline = time.monotonic() + within_s
    asked = (
        _describe_node(node, links.get(number), deadline if within_s else 0.0, is_here=number == here,
                       is_silent=number in silent)
        for number, node in nodes.items()
    )  # fmt: skip
    return sorted(await asyncio.gather(*asked), key=lambda view: view.name)


async def _describe_node(
    node: Node, link: NodeLink | None, deadline: float, *, is_here: bool, is_silent: bool
) -> NodeView:
    state = HERE if is_here else LOST if link is None else SILENT if is_silent else LINKED
    summary, why = b"", ""
    if link is None:
        why = "" if is_here else "no connection to it"
    elif deadline:
        summary, why = await ask_node(link, deadline)
    return NodeView(node.name, state, node.inference, node.management, node.metrics, summary, why)


async def ask_node(link: NodeLink, deadline: float) -> tuple[bytes, str]:
    """What the node says it does; or why there is nothing to show."""
    call = link.describe(deadline)
    try:
        response = await call.reply
    except Refused as error:
        return b"", str(error)[:200]
    except WorkerLost:
        return b"", "it fell silent, or the connection ended"
    finally:
        link.cancel(call)
    if isinstance(response, Partial) or len(response.body) < response.body_bytes:
        return b"", f"it said more than {CHUNK} bytes"
    if response.situation is not Situation.OK:
        return b"", f"it answered {Situation(response.situation).name.lower()}"
    return response.body, ""
