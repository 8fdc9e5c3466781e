"""Asks the code of an archive what it says of itself, for TorchServe's `GET /models/{name}?customized=true`."""

import itertools

from model_store.names import ModelName
from server.code_messages import encode_fields
from server.ipc.handler_calls import HandlerCall, Pairs, encode_call
from server.worker.inner_requests import InnerRequests

DESCRIBE = {"describe": "True"}  #: the property by which a handler knows the question


class CodeDescriptions:
    """See the module."""

    def __init__(self, requests: InnerRequests) -> None:
        self._requests, self._ids = requests, itertools.count(1)

    def __repr__(self) -> str:
        """For example `<CodeDescriptions by <InnerRequests ...>>`."""
        return f"<CodeDescriptions by {self._requests!r}>"

    async def ask(self, model: ModelName, headers: Pairs) -> bytes:
        """What the handler says. Raises Refused."""
        fields = encode_fields({name.encode("latin-1"): value.encode("latin-1") for name, value in headers})
        call = HandlerCall(f"describe-{next(self._ids)}", fields, (), DESCRIBE)
        return await self._requests.ask(model, b"", call=encode_call(call))
