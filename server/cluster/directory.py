"""Which replicas there are, by Ray's own state: its key-value table says where each serves, its actors which live.

Runs in each replica, on a thread of its own.
INVARIANT: a listing without the replica that asks is not believed. So a head that has just been restarted, or has
forgotten all, takes no node from the fronts: they go on with what they know.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import ray
import structlog
from msgspec import Struct
from ray.experimental import internal_kv

from server.front.nodes.membership import Node, NodeTable

NAMESPACE = "fleetcast"
LOOK_S = 0.5

log = structlog.get_logger()


class Entry(Struct, frozen=True):
    """What a replica says of itself. `actor`: Ray's name of its process, whose number on its host is `pid`.

    `gpus`: those that Ray gave it, by the names that CUDA_VISIBLE_DEVICES has for them.
    """

    node: Node
    actor: str
    pid: int = 0
    gpus: tuple[str, ...] = ()


class Directory:
    """One cluster's table, by the name of its Serve application."""

    def __init__(self, application: str) -> None:
        self._prefix = f"{application}/".encode()

    def __repr__(self) -> str:
        return f"<Directory {self._prefix.decode()}>"

    def publish(self, entry: Entry) -> None:
        """Say where this replica serves."""
        key = self._prefix + entry.node.name.encode()
        internal_kv._internal_kv_put(key, msgspec.json.encode(entry), overwrite=True, namespace=NAMESPACE)  # noqa: SLF001

    def withdraw(self, entry: Entry) -> None:
        """Say that this replica takes no more requests."""
        internal_kv._internal_kv_del(self._prefix + entry.node.name.encode(), namespace=NAMESPACE)  # noqa: SLF001

    def list_living(self) -> list[Entry]:
        """The replicas whose processes live."""
        keys = internal_kv._internal_kv_list(self._prefix, namespace=NAMESPACE)  # noqa: SLF001
        values = [internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys]  # noqa: SLF001
        living = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
        entries = [msgspec.json.decode(value, type=Entry) for value in values if value]
        return sorted((entry for entry in entries if entry.actor in living), key=lambda entry: entry.node.name)


class DirectoryFollower:
    """Keeps the file of nodes as the directory is, and this replica's own entry in it."""

    def __init__(self, directory: Directory, file: Path, look_s: float = LOOK_S) -> None:
        self._directory, self._file, self._look_s = directory, file, look_s
        self._own: Entry | None = None
        self._lock = threading.Lock()
        self._told = threading.Event()
        self.nodes: Sequence[Node] = ()  #: as the file has them
        threading.Thread(target=self._follow, name="fleetcast-directory", daemon=True).start()

    def __repr__(self) -> str:
        """For example `<DirectoryFollower of 3 nodes>`."""
        return f"<DirectoryFollower of {len(self.nodes)} nodes>"

    def prepare(self) -> None:
        """Have the others in the file before this replica's server starts.

        INVARIANT: a server is ready only once its fronts have links to the nodes of the file. So one that joins never
        takes itself for the owner of all models, when clients learn of it as soon as the others do.
        """
        try:
            self._write([entry.node for entry in self._directory.list_living()])
        except Exception as error:  # whatever Ray raises while its head is gone: the file of before is as good
            log.warning("ray_not_asked", error=str(error)[:500], then="nodes stay as they are")

    def enter(self, entry: Entry) -> None:
        """This replica serves from now on."""
        with self._lock:
            self._own = entry
        self._told.set()

    def leave(self) -> None:
        """This replica takes no more requests. Others learn of it within two looks, or by their lost links."""
        with self._lock:
            own, self._own = self._own, None
        if own is not None:
            self._directory.withdraw(own)

    def _follow(self) -> None:
        complained = ""
        while True:
            self._told.wait(self._look_s)
            self._told.clear()
            try:
                self._look()
                complained = ""
            except Exception as error:  # whatever Ray raises while its head is gone
                if str(error) != complained:
                    complained = str(error)
                    log.warning("ray_not_asked", error=complained[:500], then="nodes stay as they are")

    def _look(self) -> None:
        found = self._directory.list_living()
        with self._lock:
            own = self._own
            if own is not None and own not in found:
                self._directory.publish(own)
                return
        if own is not None:
            self._write([entry.node for entry in found])

    def _write(self, nodes: list[Node]) -> None:
        if nodes == self.nodes:
            return
        draft = self._file.with_suffix(".new")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(NodeTable(nodes))))
        draft.replace(self._file)
        self.nodes = nodes
        log.info("nodes", names=[node.name for node in nodes])
