"""Fleetcast for Python programs: a client of a server, models in this process, and archives made of networks.

    fleetcast.Client("http://127.0.0.1:8080").forecast("au/nsw1.mar", target=[41.5, 39.2], start="2026-01-01")
    fleetcast.open_model("models/au/nsw1.mar").forecast(target=[41.5, 39.2], start="2026-01-01")
    fleetcast.pack("models/au/nsw1.mar", architecture="tcn", weights=network.state_dict(), forecast="forecast.json")

A name's module is imported when the name is first used: `import fleetcast` takes no torch, and a client never does;
`open_model` and `pack` take it. This folder is installed as the package `fleetcast`; the code is in `server`, under one
name, so that its classes have one identity.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from server.sdk import __version__ as __version__

if TYPE_CHECKING:
    from server.offline.local_model import LocalModel as LocalModel
    from server.offline.local_model import open_model as open_model
    from server.offline.packing import PackedArchive as PackedArchive
    from server.offline.packing import pack as pack
    from server.sdk.async_client import AsyncClient as AsyncClient
    from server.sdk.client import Client as Client
    from server.sdk.client import PairedPrices as PairedPrices
    from server.sdk.client import Reply as Reply
    from server.sdk.errors import AccessDenied as AccessDenied
    from server.sdk.errors import DeadlineExceeded as DeadlineExceeded
    from server.sdk.errors import FleetcastError as FleetcastError
    from server.sdk.errors import InvalidRequest as InvalidRequest
    from server.sdk.errors import ModelFailed as ModelFailed
    from server.sdk.errors import ModelNotFound as ModelNotFound
    from server.sdk.errors import ServerFailed as ServerFailed
    from server.sdk.errors import Unavailable as Unavailable
    from server.sdk.errors import Unreachable as Unreachable
    from server.sdk.forecasts import ForecastOptions as ForecastOptions
    from server.sdk.forecasts import ForecastRequest as ForecastRequest
    from server.sdk.forecasts import ForecastResult as ForecastResult
    from server.sdk.signing import AccessKey as AccessKey

#: Module -> the names that users take from it.
_PUBLIC = {
    "server.offline.local_model": ("LocalModel", "open_model"),
    "server.offline.packing": ("PackedArchive", "pack"),
    "server.sdk.async_client": ("AsyncClient",),
    "server.sdk.client": ("Client", "PairedPrices", "Reply"),
    "server.sdk.errors": (
        "AccessDenied", "DeadlineExceeded", "FleetcastError", "InvalidRequest", "ModelFailed", "ModelNotFound",
        "ServerFailed", "Unavailable", "Unreachable",
    ),
    "server.sdk.forecasts": ("ForecastOptions", "ForecastRequest", "ForecastResult"),
    "server.sdk.signing": ("AccessKey",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fleetcast' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return ["__version__", *sorted(_MODULE_OF)]
