"""What a front tells the code of an archive of its requests. Nothing is made where the server runs no code.

A dialect gives the request's headers as they are (`CallDetails`); the data plane encodes them only for a model whose
code may run, so that requests for others cost nothing more.
"""

from collections.abc import Mapping, Sequence

import msgspec

from model_store.names import ModelName
from server.code_messages import encode_fields
from server.errors import Refused, Situation
from server.ipc.handler_calls import CallTooLong, HandlerCall, encode_call
from server.settings import Settings

EVERY_KEY = "*"
#: Fields by which a client shows this server who it is. INVARIANT: where the server asks, no archive's code gets them.
CREDENTIALS = frozenset({b"authorization", b"proxy-authorization", b"x-amz-security-token", b"cookie"})


class CallDetails(msgspec.Struct, frozen=True):
    """What a dialect knows of a request for a handler; see `server.ipc.handler_calls.HandlerCall`."""

    headers: Mapping[bytes, bytes]
    parts: Sequence[tuple[str, str]] = ()
    properties: Mapping[str, str] = {}
    streams: bool = False


class CodeCalls:
    """Whose code is told of its requests. `keys`: beginnings of keys; `shows_credentials`: the server asks for none."""

    def __init__(self, keys: Sequence[str], *, shows_credentials: bool) -> None:
        self._keys = tuple("" if key == EVERY_KEY else key for key in keys)
        self._hidden = frozenset[bytes]() if shows_credentials else CREDENTIALS

    def __repr__(self) -> str:
        """For example `<CodeCalls of ('team-a/',)>`."""
        return f"<CodeCalls of {self._keys}>"

    def encode(self, model: ModelName, request_id: bytes, details: CallDetails) -> bytes:
        """The call's bytes; empty for a model whose code may not run. Raises Refused where it is too long."""
        if not model.startswith(self._keys):
            return b""
        fields = details.headers
        if not self._hidden.isdisjoint(fields):
            fields = {name: value for name, value in fields.items() if name not in self._hidden}
        told = (encode_fields(fields), details.parts, details.properties, details.streams)
        call = HandlerCall(request_id.decode("latin-1"), *told)
        try:
            return encode_call(call)
        except CallTooLong as error:
            raise Refused(Situation.BAD_REQUEST, str(error)) from error


def open_code_calls(settings: Settings) -> CodeCalls | None:
    """None where no archive's code may run."""
    if not settings.allow_code:
        return None
    asks = settings.tokens is not None or bool(settings.access_keys)
    return CodeCalls(settings.allow_code, shows_credentials=not asks)
