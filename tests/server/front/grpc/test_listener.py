"""TLS of the gRPC listener: who comes in, how it is called, and that renewed files are taken."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from tests.patience import PATIENCE_S, POLL_S
from tests.server.front.grpc.serving import answer_alike, make_infer, serve_grpc

INFER = "/inference.GRPCInferenceService/ModelInfer"


def write_server(authority: trustme.CA, folder: Path) -> dict[str, str]:
    """Certificate and key of localhost; the settings that name them."""
    made = authority.issue_cert("localhost", "127.0.0.1")
    made.private_key_pem.write_to_path(str(folder / "key.pem"))
    made.cert_chain_pems[0].write_to_path(str(folder / "server.pem"))
    return {"tls_certificate": str(folder / "server.pem"), "tls_key": str(folder / "key.pem")}


def open_channel(target: str, authority: trustme.CA, client: Any = None) -> grpc.aio.Channel:
    """A channel that trusts the authority, and shows the client's certificate where there is one."""
    chain = b"".join(pem.bytes() for pem in client.cert_chain_pems) if client else None
    key = client.private_key_pem.bytes() if client else None
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes(), key, chain)
    options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(target, credentials, options)


async def ask(channel: grpc.aio.Channel) -> None:
    """One request over it, which is then closed."""
    async with channel:
        await channel.unary_unary(INFER, None, None)(make_infer(), timeout=PATIENCE_S)


def test_a_client_is_known_by_its_certificate(tmp_path: Path) -> None:
    """Mutual TLS: one without a certificate, or of another authority, stays out; names are as the HTTP fronts give."""
    authority, clients, others = trustme.CA(), trustme.CA(), trustme.CA()
    clients.cert_pem.write_to_path(str(tmp_path / "clients.pem"))
    files = {**write_server(authority, tmp_path), "tls_client_ca": str(tmp_path / "clients.pem")}

    async def scenario() -> None:
        async with serve_grpc(tmp_path, answer_alike, **files) as house:
            desk = clients.issue_cert("desk@example.org", common_name="desk-au")
            await ask(open_channel(house.target, authority, desk))
            await ask(open_channel(house.target, authority, clients.issue_cert("desk@example.org")))
            assert [asked.client for asked in house.worker.asked] == ["CN:desk-au", "email:desk@example.org"]
            for stranger in (None, others.issue_cert("desk@example.org", common_name="desk-au")):
                with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                    await ask(open_channel(house.target, authority, stranger))
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await house.call()(make_infer())  # without TLS

    asyncio.run(scenario())


def test_renewed_certificates_are_taken(tmp_path: Path) -> None:
    """Without a restart; files that are wrong leave the last good ones in force."""
    old, new = trustme.CA(), trustme.CA()

    async def scenario() -> None:
        async with serve_grpc(tmp_path, answer_alike, **write_server(old, tmp_path)) as house:
            await ask(open_channel(house.target, old))
            (tmp_path / "server.pem").write_text("no certificate")
            await ask(open_channel(house.target, old))
            write_server(new, tmp_path)
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    try:
                        await ask(open_channel(house.target, new))
                        break
                    except grpc.aio.AioRpcError:
                        await asyncio.sleep(POLL_S)
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await ask(open_channel(house.target, old))

    asyncio.run(scenario())
