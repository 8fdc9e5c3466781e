"""What an asynchronous invocation asks for, read of its headers (CONTRACTS 11). Pure."""

import re
import uuid
from dataclasses import dataclass

from model_store.names import ModelName
from server.contract import raw_header
from server.errors import Refused, Situation
from server.front.asynchronous.bucket import Bucket, parse_key
from server.front.exchange import HttpRequest

MOST_BODY_BYTES = 128_000  #: of an input in the request itself, as SageMaker has it
LONGEST_S = 21_600  #: that a request may wait for its turn, also where it does not say so
_TTL = ("RequestTTLSeconds", 60, LONGEST_S)
_TIMEOUT = ("InvocationTimeoutSeconds", 1, 3600)
_INPUT = raw_header("X-Amzn-SageMaker-InputLocation")
_ID = raw_header("X-Amzn-SageMaker-Inference-Id")
_EXTENSION = raw_header("X-Amzn-SageMaker-S3OutputPathExtension")
_FILE_NAME = raw_header("X-Amzn-SageMaker-Filename")
_ACCEPT = raw_header("X-Amzn-SageMaker-Accept")
_CONTENT_TYPE = raw_header("X-Amzn-SageMaker-Content-Type")
_MAX_LOCATION = 1024
_MAX_MEDIA = 1024
#: SageMaker's patterns; of an extension without `*`, which obstore would write as `%2A`.
_ID_RULE = re.compile(r"[!-~][ -~]{0,63}")
_EXTENSION_RULE = re.compile(r"(?!s3:|https:)[a-zA-Z0-9!_.'()/-]{1,512}")
_FILE_RULE = re.compile(r"(?!.*\..*\.)[a-zA-Z0-9][a-zA-Z0-9_.-]{0,31}")


@dataclass(frozen=True, slots=True)
class AsyncCall:
    """One asynchronous invocation. Keys are relative to the bucket's prefix; `source` is None where a body came.

    `id`: the client's own, or ours. `timeout_s` is None where the client leaves it to the server.
    """

    id: str
    content_type: str
    accept: str
    source: ModelName | None
    output: ModelName
    failure: ModelName
    ttl_s: float
    timeout_s: float | None


def read_call(request: HttpRequest, bucket: Bucket) -> AsyncCall:
    """The invocation that a request is. Raises Refused."""
    headers = request.headers
    location = _read(request, _INPUT)
    if bool(location) == bool(request.body):
        what = "both InputLocation and a body" if location else "neither InputLocation nor a body"
        raise Refused(Situation.BAD_REQUEST, f"an asynchronous invocation has one input: {what} came")
    if len(location) > _MAX_LOCATION:
        raise Refused(Situation.BAD_REQUEST, f"InputLocation has more than {_MAX_LOCATION} characters")
    own = uuid.uuid4().hex
    extension = _match(request, _EXTENSION, "S3OutputPathExtension", _EXTENSION_RULE).strip("/")
    file_name = _match(request, _FILE_NAME, "Filename", _FILE_RULE) or f"{own}.out"
    timeout = _read_number(request, *_TIMEOUT)
    return AsyncCall(
        id=_match(request, _ID, "InferenceId", _ID_RULE) or own,
        content_type=_read(request, _CONTENT_TYPE)[:_MAX_MEDIA] if _CONTENT_TYPE in headers else request.content_type,
        accept=_read(request, _ACCEPT)[:_MAX_MEDIA] if _ACCEPT in headers else request.accept,
        source=bucket.find_key(location) if location else None,
        output=parse_key("/".join(filter(None, (extension, file_name))), "S3OutputPathExtension"),
        failure=parse_key("/".join(filter(None, ("failures", extension, f"{own}-error.out"))), "S3OutputPathExtension"),
        ttl_s=_read_number(request, *_TTL) or LONGEST_S,
        timeout_s=timeout,
    )


def _read(request: HttpRequest, header: bytes) -> str:
    return request.headers.get(header, b"").decode("utf-8", "replace")


def _match(request: HttpRequest, header: bytes, name: str, rule: re.Pattern[str]) -> str:
    """A header's value, or an empty text where there is none. Raises Refused where it breaks SageMaker's rule."""
    value = _read(request, header)
    if header in request.headers and rule.fullmatch(value) is None:
        raise Refused(Situation.BAD_REQUEST, f"{name} {value[:80]!r} does not match {rule.pattern}")
    return value


def _read_number(request: HttpRequest, name: str, least: int, most: int) -> int | None:
    """A header's whole number, None where there is none. Raises Refused."""
    value = _read(request, raw_header(f"X-Amzn-SageMaker-{name}"))
    if not value:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", value) or not least <= int(value) <= most:
        raise Refused(
            Situation.BAD_REQUEST, f"{name} must be a whole number from {least} to {most}, not {value[:40]!r}"
        )
    return int(value)
