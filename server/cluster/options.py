"""What a replica is told when it starts: the settings of a server, and what of a host it may take. Pure.

It travels as plain values in Ray's `user_config`, so that a change of them is a rolling update of Ray's own.
"""

import math
from typing import Any

import msgspec
from msgspec import Struct

from server.cluster.autoscaling import Scaling
from server.contract import CACHE_SHARE
from server.front.nodes.handshake import MIN_SECRET
from server.settings import Settings
from server.supervisor.worker_plan import default_host_tier

MAX_ONGOING = 512  #: requests at one replica through Ray's proxy; the front's own bounds refuse before


class ReplicaOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """See the module. `settings` are those of `Settings.to_wire`. `secret`: by which the nodes know each other.

    `cpus` is Ray's share of a host for one replica; `per_host` the most replicas on one.
    """

    settings: dict[str, Any]
    secret: str
    cpus: float = 1.0
    gpus: float = 0.0
    per_host: int = 1
    host: str = ""  #: at which other nodes reach this one; empty: the address by which Ray knows its host

    def settings_of(self, slot: int, folder: str, address: str, memory_bytes: int) -> dict[str, Any]:
        """The settings of the server in this slot of its host, without the names of the cluster's files.

        The first replica of a host has the ports of the settings; further ones have free ports. A replica is one of
        `per_host` on its host, which share its memory: without `model_cache_bytes` each takes its part of the default,
        and on GPUs without `host_cache_bytes` of that one. Without GPUs of its own it takes none, though it may see
        those of other replicas: Ray hides them from nobody.
        """
        wire = {**self.settings, "disk_cache": folder, "node_host": address}
        wire["device"] = "cuda" if self.gpus else "cpu"
        if slot:
            wire |= {name: 0 for name in _PORTS if wire.get(name)}
        if not wire.get("workers") and not self.gpus:
            wire["workers"] = max(1, math.floor(self.cpus))
        if not wire.get("model_cache_bytes") and not self.gpus and self.per_host > 1:
            wire["model_cache_bytes"] = int(memory_bytes * CACHE_SHARE / self.per_host)
        if self.gpus and wire.get("host_cache_bytes") is None and self.per_host > 1:
            wire["host_cache_bytes"] = default_host_tier(memory_bytes) // self.per_host
        return wire

    def to_config(self) -> dict[str, Any]:
        """As it travels."""
        config: dict[str, Any] = msgspec.to_builtins(self)
        return config


_PORTS = ("inference_port", "management_port", "metrics_port", "node_port", "grpc_port", "grpc_management_port")


def read_arguments(arguments: dict[str, Any]) -> tuple[ReplicaOptions, Scaling]:
    """The options, and how many replicas, of a Serve config file. Raises ValueError that says what is wrong."""
    given = dict(arguments)
    counts = {name: given.pop(name) for name in Scaling.__struct_fields__ if name in given}
    given["settings"] = Settings(**given.get("settings", {})).to_wire()
    return parse_options(given), parse_scaling(counts)


def parse_scaling(counts: dict[str, Any]) -> Scaling:
    """The numbers of replicas. Raises ValueError that says what is wrong."""
    scaling = msgspec.convert(counts, Scaling)
    scaling.check()
    return scaling


def parse_options(config: Any) -> ReplicaOptions:
    """The options of a `user_config`. Raises ValueError that says what is wrong."""
    options = msgspec.convert(config, ReplicaOptions)
    if len(options.secret) < MIN_SECRET:
        raise ValueError(f"the cluster's secret has fewer than {MIN_SECRET} characters")
    if options.gpus != int(options.gpus):
        raise ValueError("a replica has whole GPUs: its own workers share one (workers_per_device)")
    device = Settings.from_wire(options.settings).device
    if options.gpus and device == "cpu":
        raise ValueError(f"replicas have {options.gpus:g} GPUs and serve from the CPU: leave `device` or `gpus` out")
    if device == "cuda" and not options.gpus:
        raise ValueError("device is cuda, and replicas have no GPU: say how many each has (`gpus`, --gpus 1)")
    return options
