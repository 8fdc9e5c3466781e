"""Registers models before a load, where clients of a protocol have to: TorchServe's versions, a SageMaker container.

What the server has already stays. A container that has no room left for more models is asked those that it has.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from urllib.parse import quote, urlencode

from loadtest.observe.server_access import ServerAccess
from model_store.names import ModelName
from server.contract import CONTAINER_MODELS_PATH, JSON

AT_ONCE = 4
HELD = (HTTPStatus.OK, HTTPStatus.CONFLICT)  #: it was loaded, or had been before


def register_versions(access: ServerAccess, management: str, names: Sequence[ModelName]) -> dict[ModelName, str]:
    """Register each archive under its key by TorchServe's management API. Returns the default version of each.

    Raises RuntimeError with what the server said.
    """

    def register(name: ModelName) -> str:
        query = urlencode({"url": name, "model_name": name, "initial_workers": 1, "synchronous": "true"})
        url = f"{management.rstrip('/')}{CONTAINER_MODELS_PATH}"
        access.request("POST", f"{url}?{query}", accept=HELD)
        found = json.loads(access.request("GET", f"{url}/{quote(name)}").data)
        return str(found[0]["modelVersion"])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(names, pool.map(register, names), strict=True))


def load_into_container(access: ServerAccess, address: str, names: Sequence[ModelName]) -> list[ModelName]:
    """Load models as SageMaker's platform does, one after another, until there is no room. Returns those that are.

    Raises RuntimeError with what the server said, also where not even the first one has room.
    """
    loaded: list[ModelName] = []
    for name in names:
        body = json.dumps({"model_name": name, "url": name}).encode()
        enough = (HTTPStatus.INSUFFICIENT_STORAGE,) if loaded else ()
        url = f"{address.rstrip('/')}{CONTAINER_MODELS_PATH}"
        reply = access.request("POST", url, body=body, headers={"Content-Type": JSON}, accept=(*HELD, *enough))
        if reply.status not in HELD:
            break
        loaded.append(name)
    return loaded
