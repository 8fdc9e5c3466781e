"""The gRPC listener's port, which the supervisor holds for the front that listens there. Runs in the supervisor.

Grpcio takes an address and no socket. So the supervisor binds the port, never listens, and lets other processes of this
user bind it as well: the port stays ours while a front that died is started again, and a port that is taken is said at
the start, with the setting to change.
"""

import socket
from collections.abc import Mapping
from importlib.util import find_spec

from server.settings import Settings

INFERENCE, MANAGEMENT = "grpc", "grpc_management"  #: the services of a port, and its name in messages
INSTALL = "grpc_port needs grpcio, which is not installed: pip install 'fleetcast[grpc]'"


def require_grpcio() -> None:
    """Raises ValueError that says what to install."""
    if any(find_spec(package) is None for package in ("grpc", "grpc_health", "grpc_reflection")):
        raise ValueError(INSTALL)


def list_grpc_ports(settings: Settings, management_host: str) -> Mapping[str, tuple[str, int]]:
    """The addresses that the settings ask for, by the services there. Managing by gRPC is where managing by HTTP is."""
    ports = {INFERENCE: settings.grpc_port, MANAGEMENT: settings.grpc_management_port}
    hosts = {INFERENCE: settings.grpc_host, MANAGEMENT: management_host}
    return {name: (hosts[name], port) for name, port in ports.items() if port is not None}


def hold_port(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen. Raises OSError whose message names the flags to change.

    SO_REUSEPORT is set after the port is ours: before, another server of this user could hold the same one, and each
    would get a part of the other's clients.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host.strip("[]"), port))
    except OSError as error:
        held.close()
        what = f"cannot listen on {host}:{port}: {error.strerror}"
        raise OSError(f"{what}; choose another port with --grpc-port or address with --grpc-host") from error
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return held


def format_target(held: socket.socket) -> str:
    """The address as clients of gRPC name it: `127.0.0.1:8001`, `[::1]:8001`."""
    host, port = held.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
