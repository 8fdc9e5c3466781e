"""How two nodes show each other that they know the cluster's secret, before the first frame. Runs in fronts.

The node that connects sends MAGIC and a nonce; the other answers with a nonce of its own and its proof; then the first
sends its proof. A proof is an HMAC of the secret over the role, both nonces and the fingerprint of the certificate that
the listener has shown (RFC 5929, tls-server-end-point). So nobody in between can pass proofs on, and a certificate
needs no authority: the secret vouches for it. Without TLS the fingerprint is empty; then the network must be trusted.
"""

import asyncio
import hashlib
import hmac
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import structlog

from server.access.secret_files import read_secret_file

MAGIC = b"fleet-1\n"
NONCE, PROOF = 32, 32
HELLO = len(MAGIC) + NONCE
HANDSHAKE_S = 5.0
MOST_UNPROVEN = 64  #: connections whose proof has not come: further ones are closed
MIN_SECRET = 16

log = structlog.get_logger()


class NotProven(Exception):
    """The other end does not know the secret, or speaks something else."""


def read_secret(path: Path) -> bytes:
    """The cluster's secret. Raises ValueError for a file that is unsafe, or holds too little."""
    _, raw = read_secret_file(path, "the cluster's secret", "node_key_file")
    secret = raw.strip()
    if len(secret) < MIN_SECRET:
        raise ValueError(f"the cluster's secret {path} has fewer than {MIN_SECRET} bytes (node_key_file)")
    return secret


def compute_proof(secret: bytes, role: Literal[b"listens", b"connects"], nonces: bytes, fingerprint: bytes) -> bytes:
    """What a node sends that knows the secret. `nonces`: that of who connects, and that of who listens."""
    return hmac.digest(secret, b"fleetcast node %b\0%b%b" % (role, nonces, fingerprint), "sha256")


def fingerprint_of_file(certificate: Path | None) -> bytes:
    """The fingerprint of the first certificate in a PEM file; empty without one. Raises OSError, ValueError."""
    if certificate is None:
        return b""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    _, found, rest = certificate.read_text().partition(begin)
    pem = f"{begin}{rest.partition(end)[0]}{end}\n" if found else ""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest()


def _fingerprint_of_peer(transport: asyncio.BaseTransport) -> bytes:
    shown = transport.get_extra_info("ssl_object")
    return b"" if shown is None else hashlib.sha256(shown.getpeercert(binary_form=True) or b"").digest()


class _Handshake(asyncio.Protocol):
    """One end until both have proven themselves; then `make` gives what speaks frames on the same connection."""

    def __init__(self, secret: bytes, make: Callable[[], asyncio.Protocol]) -> None:
        self._secret, self._make = secret, make
        self._nonce, self._got = os.urandom(NONCE), b""
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Both ends are connected."""
        self._transport = cast("asyncio.Transport", transport)
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_S, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended before the proofs."""
        del exc
        self._timer.cancel()

    def take(self, size: int) -> bytes | None:
        """So many bytes of what has come, once they are there."""
        if len(self._got) < size:
            return None
        taken, self._got = self._got[:size], self._got[size:]
        return taken

    def hand_over(self) -> asyncio.Protocol:
        """From now on the frames' protocol has the connection."""
        self._timer.cancel()
        protocol = self._make()
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        if self._got:
            protocol.data_received(self._got)
        return protocol


class ListeningHandshake(_Handshake):
    """The end that was connected to. INVARIANT: nothing is parsed of who has not proven itself but fixed lengths."""

    def __init__(
        self, secret: bytes, make: Callable[[], asyncio.Protocol], certificate: Path | None, unproven: set[object]
    ) -> None:
        super().__init__(secret, make)
        self._certificate, self._unproven = certificate, unproven
        self._expected: bytes | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close at once where too many wait already."""
        super().connection_made(transport)
        self._unproven.add(self)
        if len(self._unproven) > MOST_UNPROVEN:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """It ended without a proof."""
        super().connection_lost(exc)
        self._unproven.discard(self)

    def data_received(self, data: bytes) -> None:
        """The hello, then the proof, then perhaps frames."""
        self._got += data
        if self._expected is None and (hello := self.take(HELLO)) is not None:
            self._answer(hello)
        if self._expected is not None and (proof := self.take(PROOF)) is not None:
            if not hmac.compare_digest(proof, self._expected):
                log.warning("node_not_proven", peer=str(self._transport.get_extra_info("peername")))
                self._transport.abort()
                return
            self._unproven.discard(self)
            self.hand_over()

    def _answer(self, hello: bytes) -> None:
        if not hello.startswith(MAGIC):
            self._transport.abort()
            return
        try:
            fingerprint = fingerprint_of_file(self._certificate)
        except (OSError, ValueError) as error:
            log.error("node_certificate_not_read", error=str(error))  # noqa: TRY400 -- the operator's file
            self._transport.abort()
            return
        nonces = hello[len(MAGIC) :] + self._nonce
        self._expected = compute_proof(self._secret, b"connects", nonces, fingerprint)
        self._transport.write(self._nonce + compute_proof(self._secret, b"listens", nonces, fingerprint))


class ConnectingHandshake(_Handshake):
    """The end that connects. `done` gives the frames' protocol, or raises NotProven."""

    def __init__(self, secret: bytes, make: Callable[[], asyncio.Protocol]) -> None:
        super().__init__(secret, make)
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello."""
        super().connection_made(transport)
        self._transport.write(MAGIC + self._nonce)

    def connection_lost(self, exc: Exception | None) -> None:
        """It ended without a proof."""
        super().connection_lost(exc)
        if not self.done.done():
            self.done.set_exception(NotProven("the node closed the connection: is its node_key_file another one?"))

    def data_received(self, data: bytes) -> None:
        """The other's nonce and proof."""
        self._got += data
        answer = self.take(NONCE + PROOF)
        if answer is None:
            return
        nonces, fingerprint = self._nonce + answer[:NONCE], _fingerprint_of_peer(self._transport)
        if not hmac.compare_digest(answer[NONCE:], compute_proof(self._secret, b"listens", nonces, fingerprint)):
            self.done.set_exception(NotProven("the node does not know this cluster's secret (node_key_file)"))
            self._transport.abort()
            return
        self._transport.write(compute_proof(self._secret, b"connects", nonces, fingerprint))
        self.done.set_result(self.hand_over())
