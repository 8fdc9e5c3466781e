"""Which model a call is about, asking it, and what is said of one that is not there."""

import contextlib
import time
from collections.abc import Iterator

import msgspec

from model_store.names import InvalidModelName, ModelName, parse_model_name
from server import contract
from server.contract import raw_header
from server.errors import Refused, Situation
from server.front.dialects.open_inference_models import VERSION
from server.front.grpc.calls import Call
from server.front.inference import InferRequest, InferResponse

TARGETS = (b"target-model", raw_header(contract.HEADER_TARGET_MODEL))  #: metadata that names a model before the message


def parse_name(name: str, version: str, call: Call) -> ModelName:
    """The model's name. Raises Refused for one that breaks a rule, and for a version that no model has."""
    named = next((call.headers[key] for key in TARGETS if key in call.headers), None)
    try:
        model = parse_model_name(name if named is None else named.decode())
    except (InvalidModelName, UnicodeDecodeError) as error:
        raise Refused(Situation.BAD_NAME, str(error)) from error
    if version not in ("", VERSION):
        message = f"the model {model} has no version {version[:40]!r}: every model has the version {VERSION}"
        raise Refused(Situation.NOT_FOUND, message)
    return model


async def ask_model(model: ModelName, body: bytes, content_type: str, deadline: float, call: Call) -> InferResponse:
    """A worker's answer to a media type of ours, for which the name as the client knows it stands for `accept`.

    Raises Refused.
    """
    asked = InferRequest(
        model, body, content_type, model, deadline, arrived=time.monotonic(), request_id=call.id, client=call.client
    )
    del body  # the request has it
    with suggest_near(model, call):
        response = await call.plane.infer(asked)
    call.stats = response.stats
    return response


@contextlib.contextmanager
def suggest_near(model: ModelName, call: Call) -> Iterator[None]:
    """Add to the refusal of a model that is not there the names that its client may have meant."""
    try:
        yield
    except Refused as why:
        if why.situation is Situation.NOT_FOUND and (near := call.plane.list_near(model)):
            message = f"{why.detail.message}; names that are like it: {', '.join(near)}"
            why.detail = msgspec.structs.replace(why.detail, message=message)
        raise
