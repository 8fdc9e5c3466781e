"""TorchServe's service envelopes take values out of request bodies, and wrap the handler's answers. In a child.

Which one: `service_envelope` in the archive's `model-config.yaml`, else `envelope` in its manifest, else the server's
setting. The classes are those of the wheel `torchserve`, in `ts.torch_handler.request_envelope`.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from server.worker.sandbox.inside.handler_problem import HandlerProblem
from server.worker.sandbox.messages import ForkChild

PACKAGE = "ts.torch_handler.request_envelope"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
FOR_ONE = ("kserve", "kservev2")  #: they read the first request of a batch alone, and give one answer
TORCHSERVE = "torchserve"


@dataclass(frozen=True, slots=True)
class Envelope:
    """An envelope's class. `is_for_one`: the handler has to be called with one request at a time."""

    kind: Callable[[Any], Any]
    is_for_one: bool

    def wrap(self, handle: Callable[..., Any]) -> Callable[..., Any]:
        """The handler's entry point within the envelope."""
        wrapped: Callable[..., Any] = self.kind(handle).handle
        return wrapped


def find_envelope(asked: ForkChild, manifest: Mapping[str, Any], config: Mapping[str, Any]) -> Envelope | None:
    """The envelope of this archive, if it is to have one. Raises HandlerProblem."""
    if asked.entry.style != TORCHSERVE:
        return None
    name = config.get("service_envelope") or manifest.get("model", {}).get("envelope") or asked.envelope
    return _import_envelope(str(name)) if name else None


def _import_envelope(name: str) -> Envelope:
    problem = f"service_envelope {name[:80]!r}"
    try:
        package = importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        raise HandlerProblem(f"{problem} is part of TorchServe: pip install torchserve beside the server") from error
    known = sorted(each.name for each in pkgutil.iter_modules(package.__path__) if each.name != "base")
    if NAME.fullmatch(name) is None or name not in known:
        raise HandlerProblem(f"{problem}: TorchServe's are {', '.join(known)}")
    module = importlib.import_module(f"{PACKAGE}.{name}")
    kinds = [each for _, each in inspect.getmembers(module, inspect.isclass) if each.__module__ == module.__name__]
    if len(kinds) != 1:
        raise HandlerProblem(f"{problem}: {module.__name__} has {len(kinds)} classes, and is no envelope")
    return Envelope(kinds[0], name in FOR_ONE)
