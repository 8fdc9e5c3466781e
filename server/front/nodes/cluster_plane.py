"""The data plane of a node among others: each model is asked where it lives, here or on another node. Runs in a front.

Rendezvous hashing over the nodes gives each model its owner, as `server.routing` does it for workers: all fronts agree
without talking, a node that ends moves only its own models, a hot model spreads to a second node, and nodes that have
answered for a model are preferred for it. A node that is lost, drains or falls silent costs a request another try.
"""

import asyncio
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from model_store.names import ModelName
from server.access.tls import Tls, open_tls
from server.errors import Refused, Situation
from server.front.backlog import Bounds
from server.front.dataplane import CONTROL_REFUSED, MOST_TRIES, DataPlane, holds_model
from server.front.handler_calls import open_code_calls
from server.front.inference import InferRequest, InferResponse, RefusedByWorker, TogetherAnswer, TogetherRequest
from server.front.nodes.handshake import ListeningHandshake, NotProven, read_secret
from server.front.nodes.membership import Node, NodesFile, number_node
from server.front.nodes.node_gate import NodeGate
from server.front.nodes.node_link import LOAD, UNLOAD, NodeLink, connect_to_node, make_client_context
from server.front.nodes.node_views import describe_nodes
from server.front.worker_client import WorkerCall, WorkerLink, WorkerLost
from server.ipc.frames import CHUNK
from server.ipc.operations import LoadForClient, NodeView, UnloadForClient
from server.ipc.pulse import PulseReader
from server.metrics import FrontMetrics
from server.routing import WorkerLoad
from server.settings import Settings

SWEEP_S = 0.1
LOOK_S = 0.25  #: between two looks at `nodes_file`
BEAT_S = 0.5
BEAT_DEADLINE_S = 30.0
NODE_SILENT_S = 3.0  #: a node whose front does not answer for so long gets requests only where no other is up
RECONNECT_S = (0.1, 2.0)
JOIN_S = 5.0  #: how long a front that starts waits for links to the other nodes
_LOST_THERE = frozenset({Situation.NOT_READY, Situation.WORKER_LOST})

log = structlog.get_logger()


class ClusterPlane(DataPlane):
    """See the module. `local` is the plane of this node's workers, of which all else is."""

    def __init__(self, local: DataPlane, settings: Settings, metrics: FrontMetrics) -> None:
        """Raises ValueError for a secret or a certificate that cannot be used."""
        assert settings.nodes_file is not None, "a node has a table of nodes"
        assert settings.node_key_file is not None, "a node has a secret"
        bounds = Bounds(settings.queue_per_worker, settings.queue_per_model)
        super().__init__(int(settings.max_inflight_bytes), bounds, open_code_calls(settings))
        self.held, self.registrations, self.forecasters = local.held, local.registrations, local.forecasters
        self.background, self.finished_jobs, self.supervisor = local.background, local.finished_jobs, local.supervisor
        self.clients_control = local.clients_control
        self.here = number_node(settings.node_name)
        self._local, self._settings, self._metrics = local, settings, metrics
        self._secret = read_secret(settings.node_key_file)
        self._file = NodesFile(settings.nodes_file)
        self._tls = make_client_context(settings.tls_certificate)
        self._nodes: dict[int, Node] = {}
        self._node_links: dict[int, NodeLink] = {}  # INVARIANT: the same as `links`
        self._connecting: dict[int, asyncio.Task[None]] = {}
        self._beats: dict[int, WorkerCall] = {}  # by node: the one that is not answered yet
        self._unproven: set[object] = set()
        self.router.worker_up(self.here)

    def __repr__(self) -> str:
        """For example `<ClusterPlane 2 of 3 other nodes linked>`."""
        return f"<ClusterPlane {len(self.links)} of {len(self._nodes.keys() - {self.here})} other nodes linked>"

    @property
    def workers(self) -> Mapping[int, PulseReader | None]:
        """Those of this node."""
        return self._local.workers

    # --- requests ---------------------------------------------------------------------------------------------------

    async def infer(self, request: InferRequest) -> InferResponse:
        """The model's answer, from its owner or another node that is up. Raises as `DataPlane.infer`."""
        size = len(request.body)
        lost: int | None = None
        for _ in range(MOST_TRIES):
            now = time.monotonic()
            lane = self.router.route(request.model, now, lost) or self.router.route(request.model, now)
            assert lane is not None, "this node is always one of them"
            if lane.worker == self.here:
                try:
                    return await self._infer_here(lane, request, now)
                except Refused as error:
                    if not self._local.is_abandoned or error.situation is not Situation.NOT_READY:
                        raise
                    lost = self.here  # this node's workers are gone, and its front answers what it has taken
                    continue
            try:
                with self.held.hold(size):
                    response = await self._ask(lane, request, now)
            except WorkerLost as error:
                lost = error.worker
                continue
            except RefusedByWorker as error:
                if error.situation not in _LOST_THERE:
                    raise
                lost = lane.worker  # it drains, or its workers have died: others can answer
                continue
            self._metrics.forwarded.inc()
            return response
        raise Refused(Situation.WORKER_LOST, f"{MOST_TRIES} nodes were lost with this request; it is not tried again")

    async def _infer_here(self, lane: WorkerLoad, request: InferRequest, now: float) -> InferResponse:
        """The local plane's answer, counted as the other nodes' are."""
        counted, held, load_s = self.router.count_start(lane, request.model), False, 0.0
        try:
            response = await self._local.infer(request)
            held, load_s = True, (response.stats.load_us or 0) / 1e6
        except RefusedByWorker as error:
            held = holds_model(error.situation)
            raise
        finally:
            waited_s = max(0.0, time.monotonic() - now - load_s)
            self.router.count_end(lane, request.model, counted, held=held, wait_s=waited_s, load_s=load_s)
        return response

    def select_together(self, models: Sequence[ModelName]) -> list[bool]:
        """Say which can be asked together: of those that live here, what the local plane says."""
        now = time.monotonic()
        lanes = [self.router.route(model, now) for model in models]
        together = self._local.select_together(models)
        return [
            each and lane is not None and lane.worker == self.here for each, lane in zip(together, lanes, strict=True)
        ]

    async def infer_together(self, request: TogetherRequest) -> list[TogetherAnswer | Refused | None]:
        """The local plane's answers. Raises Refused."""
        return await self._local.infer_together(request)

    async def control(self, asked: LoadForClient | UnloadForClient, deadline: float, *, permitted: bool = False) -> str:
        """Load or unload a model where it lives. Raises Refused."""
        if not (permitted or self.clients_control):
            raise Refused(Situation.FORBIDDEN, CONTROL_REFUSED)
        lane = self.router.route(asked.model, time.monotonic())
        if lane is None or lane.worker == self.here:
            return await self._local.control(asked, deadline, permitted=True)
        what = LOAD if isinstance(asked, LoadForClient) else UNLOAD
        try:
            response = await self._ask(
                lane, InferRequest(ModelName(asked.model), b"", what, "", deadline), time.monotonic()
            )
        except WorkerLost:
            raise Refused(Situation.WORKER_LOST, "the model's node was lost meanwhile; try again") from None
        return bytes(response.body).decode()

    async def describe_nodes(self, within_s: float) -> list[NodeView]:
        """Every node of the table, for viewers of this one: see `DescribeNodes`."""
        return await describe_nodes(self._nodes, self._node_links, self.router.silent, self.here, within_s)

    def note_loss(self, worker: int) -> None:
        """Suspects are the lost node's own: its workers may live on."""

    # --- links ------------------------------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Follow the table of nodes, their beats and the deadlines, for as long as the front lives."""
        self.expected = self._local.expected
        look_at = beat_at = 0.0
        while True:
            now = time.monotonic()
            if now >= look_at:
                look_at = now + LOOK_S
                self.follow()
            if now >= beat_at:
                beat_at = now + BEAT_S
                self._beat(now)
            self.sweep()
            await asyncio.sleep(SWEEP_S)

    def follow(self) -> None:
        """Take the table of nodes where it has changed: link to new nodes, let go of those that are not in it."""
        nodes = self._file.read_changes()
        if nodes is None:
            return
        moved = {number for number, node in nodes.items() if self._nodes.get(number, node).address != node.address}
        self._nodes = nodes
        log.info("nodes", names=sorted(node.name for node in nodes.values())[:50], count=len(nodes))
        for number in list(self.links):
            if number not in nodes or number in moved:
                self.router.worker_down(number)  # what runs there is answered
        for number in moved & self.links.keys():
            self.links[number].close()
        for number in nodes.keys() - {self.here}:
            self._connect_soon(number)

    async def join(self) -> None:
        """Wait for the links that are being made, not for long: what is not up by then comes later."""
        self.follow()
        if self._connecting:
            await asyncio.wait(self._connecting.values(), timeout=JOIN_S)

    async def listen(self, listening: socket.socket, tls: Tls | None) -> asyncio.Server:
        """Take the other nodes' links from now on."""
        limit = max(int(self._settings.max_body_bytes), 2 * int(self._settings.max_forecasts_bytes)) + CHUNK
        unsent = int(self._settings.max_inflight_bytes)

        def make() -> asyncio.Protocol:
            return ListeningHandshake(
                self._secret,
                lambda: NodeGate(self._local, limit, unsent),
                self._settings.tls_certificate,
                self._unproven,
            )

        loop = asyncio.get_running_loop()
        return await loop.create_server(make, sock=listening, ssl=None if tls is None else tls.context)

    def _connect_soon(self, number: int) -> None:
        task = self._connecting.get(number)
        if number not in self.links and (task is None or task.done()):
            self._connecting[number] = asyncio.create_task(self._connect(number))

    async def _connect(self, number: int) -> None:
        """Try until the node is linked, or is in the table no more."""
        pause, longest = RECONNECT_S
        while (node := self._nodes.get(number)) is not None and number not in self.links:
            try:
                link = await connect_to_node(node.address, number, self._secret, self._tls, self._lost)
            except (OSError, TimeoutError) as error:
                log.debug("node_not_linked", node=node.name, error=str(error))
            except NotProven as error:
                log.warning("node_not_linked", node=node.name, error=str(error))
            else:
                if self._nodes.get(number) != node:
                    link.close()
                    continue
                self.links[number] = self._node_links[number] = link
                self.router.worker_up(number)
                return
            await asyncio.sleep(pause)
            pause = min(longest, 2 * pause)

    def _lost(self, link: WorkerLink) -> None:
        """A link has ended: its models are others' until it is back."""
        if self.links.get(link.worker) is link:
            del self.links[link.worker], self._node_links[link.worker]
            self.router.worker_down(link.worker)
            self._beats.pop(link.worker, None)
            if link.worker in self._nodes:
                log.warning("node_lost", node=self._nodes[link.worker].name)
                self._connect_soon(link.worker)

    def _beat(self, now: float) -> None:
        """Ask each node whether its front turns; close links that are not wanted any more and have nothing to do."""
        for number, link in list(self._node_links.items()):
            if number not in self._nodes and not len(link.backlog):
                link.close()
                continue
            beat = self._beats.get(number)
            if beat is None or beat.reply.done():
                beat = self._beats[number] = link.beat(now + BEAT_DEADLINE_S)
                beat.reply.add_done_callback(_ignore_end)

    def _route_around_silence(self, now: float) -> None:
        """As for workers: requests go to nodes whose fronts answer, and so do those that silent ones have."""
        silent = frozenset(
            number
            for number, beat in self._beats.items()
            if not beat.reply.done() and now - (beat.deadline - BEAT_DEADLINE_S) > NODE_SILENT_S
        )
        if silent != self.router.silent:
            log.warning("silent_nodes", nodes=[self._nodes[each].name for each in silent if each in self._nodes])
            self.router.silent = silent
        for number in silent & self.links.keys():
            self.links[number].give_up()


def _ignore_end(reply: "asyncio.Future[Any]") -> None:
    """Whatever a beat ended with has been taken note of."""
    if not reply.cancelled():
        reply.exception()


def open_cluster(settings: Settings, local: DataPlane, metrics: FrontMetrics) -> ClusterPlane | None:
    """None for a server that is no node of a cluster. Raises ValueError."""
    return ClusterPlane(local, settings, metrics) if settings.node_name else None


def open_node_tls(settings: Settings) -> Tls | None:
    """The TLS for other nodes. No authority is asked for certificates of theirs: the secret says who they are."""
    return open_tls(settings.tls_certificate, settings.tls_key, None)
