"""The gRPC port: whose it is, and what is said where gRPC cannot be had."""

import socket
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from server.settings import Settings
from server.supervisor.access_control import read_secrets
from server.supervisor.grpc_port import format_target, hold_port


def make_settings(folder: Path, **more: object) -> Settings:
    """Settings with a gRPC port."""
    return Settings.from_wire({"store": str(folder), "grpc_port": 0, **more})


def test_a_held_port_is_the_fronts_and_no_other_servers() -> None:
    """A process of this user may listen there, as grpcio does; a second server is told that the port is taken."""
    with hold_port("127.0.0.1", 0) as held, socket.socket() as front:
        host, _, port = format_target(held).rpartition(":")
        front.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        front.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        front.bind((host, int(port)))
        front.listen()
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}.*--grpc-port"):
            hold_port(host, int(port))
        with socket.create_connection((host, int(port))):
            accepted, _ = front.accept()
            accepted.close()


def test_an_address_of_ipv6_is_in_brackets() -> None:
    """As clients of gRPC want it."""
    if not socket.has_ipv6:
        pytest.skip("no IPv6 on this host")
    try:
        held = hold_port("[::1]", 0)
    except OSError:
        pytest.skip("no IPv6 on this host")
    with held:
        assert format_target(held).startswith("[::1]:")


def test_without_the_extra_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started; a server that is not asked for gRPC needs nothing."""
    monkeypatch.setitem(sys.modules, "grpc", None)
    read_secrets(Settings.from_wire({"store": str(tmp_path)}))
    with pytest.raises(ValueError, match=r"pip install 'fleetcast\[grpc\]'"):
        read_secrets(make_settings(tmp_path))


def test_a_management_port_is_torchserves(tmp_path: Path) -> None:
    """Multi Model Server has no such service."""
    with pytest.raises(ValueError, match="grpc_management_port is for TorchServe's"):
        read_secrets(make_settings(tmp_path, grpc_management_port=0, model_server_api="mms"))


def test_access_keys_alone_let_nobody_in(tmp_path: Path) -> None:
    """Calls by gRPC cannot be signed, so such a server does not start."""
    with pytest.raises(ValueError, match="set tokens beside access_keys"):
        read_secrets(make_settings(tmp_path, access_keys={"KEY": SecretStr("secret")}))
