"""Listeners: addresses, ports and TLS. Pure."""

import ipaddress
import re
from collections.abc import Mapping
from typing import Literal
from urllib.parse import urlsplit

from server.offline.migration.configuration import Configuration
from server.offline.migration.model_servers import MMS
from server.offline.migration.outcome import Outcome, Rule, Value, become, hold, leave

Listener = Literal["inference", "management", "metrics"]
Ports = Mapping[str, int]  #: by scheme, where an address has none

MANAGEMENT_PORT: Ports = {"http": 8081, "https": 8444}
METRICS_PORT: Ports = {"http": 8082, "https": 8445}
DEFAULT_INFERENCE = "http://127.0.0.1:8080"
_ADDRESSES = ("inference_address", "management_address", "metrics_address")
_ADDRESS = re.compile(r"((https|http)://([^:/]+)(:[0-9]+)?)|(unix:/.*)")
_SCOPES = {"management": "manage", "metrics": "metrics"}
_TLS_ALL = "TLS is of all listeners here: this one speaks it too"


def make_address_rule(listener: Listener, ports: Ports) -> Rule:
    """The rule of a listener's address; `ports` are those of an address that names none."""
    return lambda config: _set_address(config, listener, ports)


def _set_address(config: Configuration, listener: Listener, ports: Ports) -> Outcome:
    address = config.get(f"{listener}_address")
    if not _ADDRESS.fullmatch(address):
        raise ValueError("it is no address such as http://127.0.0.1:8080, and the old server does not start with it")
    if address.startswith("unix:"):
        return leave("there are no Unix sockets for clients: they come by TCP, on the default port unless you set one")
    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port if parts.port is not None else ports[parts.scheme]
    if listener == "management" and address == config.get("inference_address", DEFAULT_INFERENCE):
        return _share_port(config, port)
    settings: dict[str, Value] = {f"{listener}_port": port}
    notes = [_TLS_ALL] if _speaks_tls(config) and parts.scheme == "http" else []
    if listener in _SCOPES and not _is_loopback(host):
        scope = _SCOPES[listener]
        notes.insert(
            0,
            f"other hosts reach this listener only with a token: `fleetcast token ops --scope {scope} >> tokens.toml`, "
            f'then tokens = "tokens.toml" and {listener}_host = "{host}"; until then it is on the loopback address',
        )
        return leave("; ".join(notes), settings)
    if listener == "inference" or host not in ("127.0.0.1", "localhost"):
        settings = {f"{listener}_host": "127.0.0.1" if host == "localhost" else host, **settings}
    return become(settings, "; ".join(notes))


def _share_port(config: Configuration, port: int) -> Outcome:
    """Management at the inference listener's address, as the containers for SageMaker have it."""
    free: dict[str, Value] = {"management_port": 0} if port == MANAGEMENT_PORT["http"] else {}
    if config.server is MMS:
        return become({"container": "multi-model", **free}, "models are loaded and unloaded at the inference address")
    return leave("each listener has an address of its own: management is at the default one unless you set it", free)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _speaks_tls(config: Configuration) -> bool:
    return any(config.get(key).startswith("https://") for key in _ADDRESSES)


def set_certificate(config: Configuration) -> Outcome:
    """Certificate and key, where an address asks for TLS. Both servers take the keystore where they have both."""
    if not _speaks_tls(config):
        return hold("no address begins with https://, so that no listener speaks TLS")
    keystore = config.get("keystore")
    if keystore:
        return leave(
            f"certificates are PEM files here: `openssl pkcs12 -in {keystore} -out tls.pem -nodes` makes one of a "
            'keystore of type PKCS12; then tls_certificate = "tls.pem"'
        )
    certificate, key = config.get("certificate_file"), config.get("private_key_file")
    if not (certificate and key):
        return leave("TLS takes both certificate_file and private_key_file")
    return become({"tls_certificate": certificate, "tls_key": key})


def find_missing_certificate(config: Configuration) -> Outcome | None:
    """What is left to do where an address asks for TLS and no key names a certificate."""
    keys = ("keystore", "certificate_file", "private_key_file")
    if not _speaks_tls(config) or any(key in config.entries for key in keys):
        return None
    return leave("the old server makes a certificate by itself; here give one: tls_certificate, and tls_key")
