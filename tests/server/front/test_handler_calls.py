"""What a front tells an archive's code: only whose code may run, without credentials, within its bound."""

from typing import Any

import pytest

from model_store.names import ModelName
from server.code_messages import decode_fields
from server.errors import Refused, Situation
from server.front.handler_calls import CallDetails, CodeCalls, open_code_calls
from server.ipc.handler_calls import MAX_CALL, decode_call
from server.settings import Settings

HEADERS = {b"x-mode": b"a", b"authorization": b"Bearer secret", b"cookie": b"session"}


def make_calls(**settings: Any) -> CodeCalls:
    """What a server under these settings tells."""
    made = open_code_calls(Settings.model_validate({"store": "models", **settings}))
    assert made is not None
    return made


def test_only_archives_whose_code_may_run_are_told() -> None:
    """Where no code runs nothing is made at all; a key's beginning decides, and `*` is every key."""
    assert open_code_calls(Settings.model_validate({"store": "models"})) is None
    calls, details = make_calls(allow_code=["code/"]), CallDetails(HEADERS, [("q", "1")], {"explain": "True"})
    assert calls.encode(ModelName("rows/a.mar"), b"id", details) == b""
    call = decode_call(calls.encode(ModelName("code/a.mar"), b"id", details))
    assert (call.request_id, call.parts, call.properties) == ("id", [("q", "1")], {"explain": "True"})
    assert ("authorization", "Bearer secret") in decode_fields(call.fields).items()
    assert make_calls(allow_code=["*"]).encode(ModelName("rows/a.mar"), b"", details)


def test_credentials_of_this_server_are_no_codes() -> None:
    """Where the server asks who its clients are."""
    calls = make_calls(allow_code=["*"], access_keys={"key": "secret" * 4})
    call = decode_call(calls.encode(ModelName("a"), b"", CallDetails(HEADERS)))
    assert decode_fields(call.fields) == {"x-mode": "a"}


def test_what_is_told_is_bounded() -> None:
    """A request with more is refused before anything is sent."""
    with pytest.raises(Refused, match=f"{MAX_CALL} are allowed") as caught:
        make_calls(allow_code=["*"]).encode(ModelName("a"), b"", CallDetails({b"x": b"y" * MAX_CALL}))
    assert caught.value.situation is Situation.BAD_REQUEST
