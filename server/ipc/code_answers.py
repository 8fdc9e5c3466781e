"""What a child of a code archive is asked, of a request's frame, and what its answer becomes. Pure.

The worker does so, and a front that a child is lent to. What code says is checked here.
"""

import re

from server.code_messages import CodeAnswer, CodeRequest
from server.contract import JSON, OPEN_INFERENCE_INFER
from server.errors import Refused, Situation
from server.ipc.frames import Request
from server.ipc.handler_calls import SAID_NOTHING, AnswerHead, decode_call, encode_head

WORKER_DIED = 500  #: what TorchServe and Multi Model Server answer then, as "Worker died."
OK, MULTIPLE_CHOICES = 200, 300
BODILESS = (204, 205, 304)  #: statuses of answers that have no body
BYTES = "application/octet-stream"
MAX_SAID = 8192  #: bytes of all that a handler sets in an answer's head
#: Fields that frame an answer or belong to its connection, and those that the server says of every answer: code's are
#: dropped. The content type travels apart.
SERVERS_OWN = frozenset(
    {
        "connection", "content-length", "content-type", "date", "keep-alive", "proxy-authenticate",
        "proxy-authorization", "proxy-connection", "server", "server-timing", "te", "trailer", "transfer-encoding",
        "upgrade", "x-request-id", "x-amzn-errortype", "x-amzn-invoked-production-variant",
    }
)  # fmt: skip
SERVERS_PREFIXES = ("x-fleetcast-",)
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")  # RFC 9110, 5.6.2


def make_request(request: Request) -> CodeRequest:
    """What the handler gets. A request of the Open Inference Protocol comes as the client has sent it."""
    content_type, accept, body = request.content_type, request.accept, bytes(request.body)
    if content_type.startswith(OPEN_INFERENCE_INFER):
        content_type, accept = (JSON if content_type == f"{OPEN_INFERENCE_INFER};json={len(body)}" else BYTES), JSON
    if not request.call:
        return CodeRequest(str(request.id), content_type, accept, body)
    call = decode_call(request.call)
    told = (call.fields, call.parts, call.properties, call.streams)
    return CodeRequest(call.request_id, content_type, accept, body, *told)


def read_answer(answer: CodeAnswer, *, is_told: bool) -> tuple[str, bytes, bytes]:
    """Content type, body and head (see `server.ipc.frames.Response`) of an answer. Raises Refused where it is none.

    `is_told`: who asks has told a call, and so can say any status.
    """
    body, head = _make_body(answer), _make_head(answer)
    content_type = answer.content_type or answer.body_type or BYTES
    if is_told:
        return content_type, body, encode_head(head)
    if OK <= answer.status < MULTIPLE_CHOICES:
        return content_type, body, b""
    raise Refused(Situation.MODEL_FAILED, _explain(answer), status=answer.status)


def read_part(answer: CodeAnswer) -> tuple[str, bytes, bytes]:
    """The same of a part of an answer, for who has told a call and takes parts. Raises Refused."""
    return read_answer(answer, is_told=True)


def refuse_ended(model: str, why: object) -> Refused:
    """Why a request has no answer whose child has ended."""
    return Refused(Situation.MODEL_FAILED, f"Worker died: {model}: {why}", status=WORKER_DIED)


def _make_body(answer: CodeAnswer) -> bytes:
    """The handler's body, unless its status has none. Raises Refused for an answer that is none."""
    if answer.failed:
        raise Refused(Situation.MODEL_FAILED, answer.message, status=answer.status)
    return b"" if answer.status in BODILESS else answer.body


def _make_head(answer: CodeAnswer) -> AnswerHead:
    """What the handler has set, without what the server alone says. Raises Refused for what no head may hold.

    INVARIANT: nothing that code sets ends a header's line, or says where the answer ends.
    """
    if answer.status == OK and not (answer.content_type or answer.reason or answer.headers):
        return SAID_NOTHING
    if not _is_value(answer.content_type):
        raise _refuse_head(f"content type {answer.content_type[:80]!r} is no value of a header")
    if not _is_value(answer.reason):
        raise _refuse_head(f"reason {answer.reason[:80]!r} cannot stand in a status line")
    kept, size = list[tuple[str, str]](), len(answer.content_type) + len(answer.reason)
    for name, value in answer.headers.items():
        if name.lower() in SERVERS_OWN or name.lower().startswith(SERVERS_PREFIXES):
            continue
        if _NAME.fullmatch(name) is None or not _is_value(value):
            raise _refuse_head(f"header {name[:80]!r}: {value[:80]!r} is no header")
        kept.append((name, value))
        size += len(name) + len(value)
    if size > MAX_SAID:
        raise _refuse_head(f"headers have {size} bytes, {MAX_SAID} are allowed")
    return AnswerHead(answer.status, answer.reason, answer.content_type, kept)


def _refuse_head(what: str) -> Refused:
    return Refused(Situation.MODEL_FAILED, f"the handler's {what}")


def _is_value(value: str) -> bool:
    """Whether code may put this into a header of ours: it can neither end the line nor fail to be encoded."""
    return value.isascii() and (value.isprintable() or not value)


def _explain(answer: CodeAnswer) -> str:
    """What an answer that is no success says: the handler's own body, where it has written one."""
    text = answer.body[:2000].decode(errors="replace")
    return text or answer.reason or f"the handler answered with status {answer.status}"
