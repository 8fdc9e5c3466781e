"""The cluster as this node knows it: `GET /fleet/nodes`, and where Prometheus finds all nodes. Runs in the supervisor.

A front of this server is asked, since fronts have the links. What another node says of itself comes by those links,
from who has proven that it knows the cluster's secret, so that no management listener need be open to other hosts.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from server.ipc.control import ControlError
from server.ipc.operations import DescribeNodes, NodeView
from server.supervisor.children import Child
from server.supervisor.overview import Overview, SharedReading

ASK_S = 2.0  #: for the other nodes to say what they do
FRONT_S = 1.0  #: beyond that, for the front to say what they said
MAX_SUMMARY = 48 * 1024  #: bytes of what one node says
#: Of `GET /fleet/overview`, what nodes say to each other's viewers.
SHOWN = (
    "at",
    "version",
    "ready",
    "requests",
    "forwarded",
    "request_seconds",
    "under_way",
    "cache_requests",
    "loaded_models",
    "cache_bytes",
    "cache_capacity_bytes",
    "evictions",
    "load_failures",
    "quarantined_models",
)
NO_FRONT = "no front of this node answers: others' numbers are not known here"


class ClusterView:
    """See the module. `name`: this node's; empty for a server that is none, which has no nodes to show."""

    def __init__(
        self,
        name: str,
        fronts: Sequence[Child],
        overview: Overview,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._fronts, self._overview = fronts, overview
        self._shared = SharedReading(self._make, clock)

    def __repr__(self) -> str:
        return f"<ClusterView of {self.name or 'no node'}>"

    async def describe_own(self) -> bytes:
        """What this server does, as JSON for another node's viewers."""
        return msgspec.json.encode(_select(await self._overview.read()))

    async def read(self) -> dict[str, Any]:
        """The answer of `GET /fleet/nodes`, at most a second old."""
        return await self._shared.read()

    async def list_targets(self, here: str) -> list[str]:
        """HOST:PORT of each node's metrics listener, where it is known; `here` where this server is no node.

        Raises ControlError where no front answers: Prometheus then goes on with what it knows.
        """
        if not self.name:
            return [here]
        return [view.metrics for view in await self._ask_front(0.0) if view.metrics]

    async def _make(self) -> dict[str, Any]:
        if not self.name:
            return {"node": "", "nodes": []}
        own = _select(await self._overview.read())
        try:
            views, why = await self._ask_front(ASK_S), ""
        except ControlError:
            views, why = [], NO_FRONT
        found = [describe_view(view, own) for view in views]
        if self.name not in {view.name for view in views}:  # it has left the table, or is not in it yet
            found.append(describe_view(NodeView(self.name, "here"), own))
        return {"node": self.name, "nodes": found, **({"why": why} if why else {})}

    async def _ask_front(self, within_s: float) -> list[NodeView]:
        """The views of the first front that has links. Raises ControlError."""
        for front in self._fronts:
            if front.ready.is_set() and not front.grpc:
                return await front.ask(DescribeNodes(within_s), within_s + FRONT_S)
        raise ControlError(NO_FRONT)


def _select(overview: Mapping[str, object]) -> dict[str, object]:
    """What of the overview nodes say to each other, and how many of their workers are up."""
    processes: Any = overview["processes"]
    up = [each["up"] for each in processes if each["kind"] == "worker"]
    return {**{key: overview[key] for key in SHOWN}, "workers_up": sum(up), "workers": len(up)}


def describe_view(view: NodeView, own: Mapping[str, object]) -> dict[str, Any]:
    """A node as `GET /fleet/nodes` shows it. `own`: what this server does, for its own row."""
    said: Any = own if view.state == "here" else None
    why = view.why
    if view.summary and len(view.summary) <= MAX_SUMMARY:
        try:
            said = msgspec.json.decode(view.summary, type=dict[str, Any])
        except msgspec.MsgspecError:
            why = "it said something else than what it does"
    elif view.summary:
        why = f"it said more than {MAX_SUMMARY} bytes"
    shown = {"inference": view.inference, "management": view.management, "metrics": view.metrics}
    return {"name": view.name, "state": view.state, **shown, "why": why, "does": said}
