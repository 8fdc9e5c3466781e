"""The replica: a thin shell in Ray's process around a server of its own, which Ray places, watches and ends.

The server is `fleetcast serve` as on a single machine, with all its processes. Its fronts know the other nodes by a
file that the replica keeps as Ray's state is; requests between nodes do not pass through Ray.
"""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import ray
import structlog
from ray import serve

from server.cluster.addresses import describe_node
from server.cluster.autoscaling import UNDER_WAY
from server.cluster.directory import Directory, DirectoryFollower, Entry
from server.cluster.engine import Engine, EngineFailed
from server.cluster.options import ReplicaOptions, parse_options
from server.cluster.own_load import OwnLoad
from server.cluster.passing import Passing, Receive, Scope, Send
from server.cluster.request_router import NODE
from server.cluster.slots import Slot, claim_slot
from server.host import read_host
from server.settings import Settings

HEALTH_S = 5.0  #: how long the server may take to say that it is well
NODES_FILE, SECRET_FILE = "nodes.json", "secret"

log = structlog.get_logger()


def make_app() -> Any:
    """The ASGI application that Ray's proxy calls, made in the replica: the replica's server answers."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await serve.get_replica_context().servable_object.answer(scope, receive, send)
        elif scope["type"] == "lifespan":
            for happened in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{happened}.complete"})

    return answer


class EngineReplica:
    """See the module. Ray calls `reconfigure` before the first request, and for each change of the settings."""

    def __init__(self) -> None:
        self._context = serve.get_replica_context()
        self._passing = Passing()
        self._slot: Slot | None = None
        self._engine: Engine | None = None
        self._follower: DirectoryFollower | None = None
        self._load: OwnLoad | None = None
        self._changing = threading.Lock()

    def __repr__(self) -> str:
        """For example `<EngineReplica node-4b1d <Engine 4711 at http://127.0.0.1:8080>>`."""
        return f"<EngineReplica {self._slot and self._slot.name} {self._engine!r}>"

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serve with these settings: the server drains, and another takes its place, its name and its disk."""
        await asyncio.to_thread(self._replace, parse_options(config))

    async def check_health(self) -> None:
        """Raises EngineFailed where the server has ended or stands still; Ray then replaces this replica."""
        engine = self._engine
        if engine is not None:
            await asyncio.to_thread(engine.check, HEALTH_S)

    def record_routing_stats(self) -> dict[str, Any]:
        """What `OwnerRouter` must know."""
        return {NODE: self._slot.name if self._slot is not None and self._engine is not None else ""}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `count_wanted` must know. Ray asks every few seconds where the number of replicas may change."""
        load = self._load
        under_way = None if load is None or self._engine is None else await load.count_under_way()
        return {} if under_way is None else {UNDER_WAY: under_way}

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that came through Ray's proxy; while the own server is changed, another node does."""
        own = self._slot.name if self._slot is not None and self._engine is not None else ""
        nodes = [] if self._follower is None else list(self._follower.nodes)
        fronts = [node.inference for node in sorted(nodes, key=lambda node: node.name != own)]
        if own and self._engine is not None and not (nodes and fronts[0] == self._engine.addresses["inference"]):
            fronts.insert(0, self._engine.addresses["inference"])
        await self._passing.pass_on(scope, receive, send, fronts)

    async def __del__(self) -> None:
        """Ray calls this once, before it ends the process: drain."""
        await asyncio.to_thread(self._end)

    def _replace(self, options: ReplicaOptions) -> None:
        with self._changing:
            self._stop_engine()
            settings = Settings.from_wire(options.settings)
            if self._slot is None:
                self._slot = claim_slot(settings.disk_cache, options.per_host)
            slot = self._slot
            nodes, secret = slot.folder / NODES_FILE, slot.folder / SECRET_FILE
            _write_secret(secret, options.secret)
            if self._follower is None:
                self._follower = DirectoryFollower(Directory(self._context.app_name), nodes)
            address = options.host or ray.util.get_node_ip_address()
            memory = read_host().memory_bytes
            wire = options.settings_of(slot.index, str(slot.folder / "cache"), address, memory)
            wire |= {"node_name": slot.name, "nodes_file": str(nodes), "node_key_file": str(secret)}
            self._follower.prepare()
            gpus = _find_gpus(options)
            engine = Engine(Settings.from_wire(wire), slot.folder, slot.lock, gpus)
            actor, node = self._context.replica_id.to_full_id_str(), describe_node(slot.name, engine.addresses)
            self._follower.enter(Entry(node, actor, os.getpid(), gpus))
            self._load = OwnLoad(node, secret, settings.tls_certificate)
            self._engine = engine
            log.info("replica", node=slot.name, addresses=dict(engine.addresses), gpus=gpus)

    def _stop_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            if self._follower is not None:
                try:
                    self._follower.leave()
                except Exception as error:  # Ray's head is gone: others see it by their links
                    log.warning("not_withdrawn", error=str(error)[:300])
            engine.stop()

    def _end(self) -> None:
        with self._changing:
            self._stop_engine()


def _find_gpus(options: ReplicaOptions) -> tuple[str, ...]:
    """The GPUs that Ray gave this replica, also where Ray was told to leave CUDA_VISIBLE_DEVICES alone.

    Raises EngineFailed where they are not as many as the options say.
    """
    if not options.gpus:
        return ()
    found = tuple(ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))
    if len(found) != options.gpus:
        raise EngineFailed(
            f"Ray gave this replica {len(found)} GPUs ({', '.join(found)}), and `gpus` says {options.gpus:g}: "
            "`num_gpus` in `ray_actor_options` has to be the same"
        )
    return found


def _write_secret(path: Path, secret: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret)


__all__ = ["EngineFailed", "EngineReplica", "make_app"]
