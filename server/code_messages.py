"""What a child of a code archive and who asks it say to each other: msgpack, in tagged structs. Pure but for `Batches`.

A message is a u32 length, little-endian, and as many bytes. A worker asks a child, and so does a front that the worker
has lent it to. A child is foreign code, so that whatever it sends is checked: `MAX_ANSWER_BYTES` bounds a message.
"""

import select
import socket
from collections.abc import Iterator, Mapping, Sequence
from struct import Struct as Layout
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

MAX_ANSWER_BYTES = 64 * 1024 * 1024  #: of a message that a child sends
MAX_TEXT = 2000  #: characters of an error that a child tells
RECEIVE_BYTES = 64 * 1024  #: at a time: a larger buffer would be mapped and unmapped for each message
ENDED = "its process ended by itself or by a limit (memory, processor time, a signal, os._exit)"

_LENGTH = Layout("<I")

MIN_STATUS, MAX_STATUS = 200, 599  #: of a final answer
OK = 200
MAX_HEADERS, MAX_HEADER = 100, 8192  #: of an answer, and characters of one
MAX_PARTS = 16 * 1024  #: that are sent before the answers of one batch
MAX_MEASURES = 100  #: that travel with one batch's answers
#: Characters of a measurement's name, of a label's name and of its value; and how many labels it has.
MEASURE_NAME, MEASURE_LABEL, MEASURE_TEXT, MEASURE_LABELS = 128, 64, 128, 8

Text = Annotated[str, Meta(max_length=4 * MAX_TEXT)]
Header = Annotated[str, Meta(max_length=MAX_HEADER)]


class ProtocolError(Exception):
    """The peer does not speak these messages."""


class HandlerLoaded(Struct, frozen=True, tag=True):
    """From a child: it answers batches now, of so many requests, collected for so long."""

    batch_size: Annotated[int, Meta(ge=1, le=4096)] = 1
    max_batch_delay_s: Annotated[float, Meta(ge=0.0, le=60.0)] = 0.0


class LoadFailed(Struct, frozen=True, tag=True):
    """From a child that ends: why the archive's code could not be loaded. `no_memory`: its limit was too small."""

    message: Text
    no_memory: bool = False


class CodeRequest(Struct, frozen=True, array_like=True):
    """One request as the handler gets it; see `server.ipc.handler_calls.HandlerCall`.

    `fields`: those of the request's head, see `encode_fields`; None where the dialect tells none: the handler sees
    `content_type` and `accept` then. `streams`: parts of its answer may come before the end, as `PartAnswered`;
    otherwise the child joins them.
    """

    id: str
    content_type: str
    accept: str
    body: bytes
    fields: bytes | None = None
    parts: Sequence[tuple[str, str]] = []
    properties: Mapping[str, str] = {}
    streams: bool = False


class RunBatch(Struct, frozen=True, tag=True):
    """To a child: answer these with one call of the handler."""

    requests: list[CodeRequest]


class CodeAnswer(Struct, frozen=True, array_like=True):
    """What became of one request. Where it `failed`, `message` says why, and there is no body.

    Else `status`, `reason`, `headers` and `content_type` are what the handler has set; `content_type` is empty where it
    has set none, and `body_type` is then what its body is.
    """

    status: Annotated[int, Meta(ge=MIN_STATUS, le=MAX_STATUS)]
    body: bytes = b""
    content_type: Header = ""
    headers: Annotated[dict[Header, Header], Meta(max_length=MAX_HEADERS)] = {}
    message: Text = ""
    body_type: Header = ""
    reason: Header = ""
    failed: bool = False


def make_answer(
    status: Any, body: bytes, content_type: Any, headers: Mapping[Any, Any], reason: Any, body_type: str = ""
) -> CodeAnswer:
    """An answer of what a handler has set, as the worker takes it. In a child. Raises ValueError."""
    code = OK if status is None else int(status)
    if code == OK and not (content_type or headers or reason):
        return CodeAnswer(OK, body, body_type=body_type)
    pairs = {str(name): str(value) for name, value in headers.items()} if headers else {}
    texts = (str(content_type), str(reason), *pairs, *pairs.values()) if pairs else (str(content_type), str(reason))
    if not MIN_STATUS <= code <= MAX_STATUS or len(pairs) > MAX_HEADERS or max(map(len, texts)) > MAX_HEADER:
        raise ValueError(f"status {code} with {len(pairs)} headers is no answer")
    return CodeAnswer(code, body, str(content_type), pairs, "", body_type, str(reason))


def make_failure(status: int, message: str) -> CodeAnswer:
    """Why there is no answer."""
    return CodeAnswer(status, message=shorten(message), failed=True)


class PartAnswered(Struct, frozen=True, tag=True):
    """From a child, before its batch's answers: a part of the answer to one request of the batch, which is not all."""

    index: Annotated[int, Meta(ge=0)]
    answer: CodeAnswer


class Measure(Struct, frozen=True, array_like=True):
    """What a handler has measured. `kind`: counter (the value is added), gauge (it replaces) or histogram."""

    name: Annotated[str, Meta(max_length=MEASURE_NAME)]
    kind: Annotated[str, Meta(pattern="^(counter|gauge|histogram)$")]
    labels: Annotated[
        dict[Annotated[str, Meta(max_length=MEASURE_LABEL)], Annotated[str, Meta(max_length=MEASURE_TEXT)]],
        Meta(max_length=MEASURE_LABELS),
    ]
    value: float


class BatchAnswered(Struct, frozen=True, tag=True, omit_defaults=True):
    """From a child: as many answers as the batch has requests, in their order. `measures`: by its handler until now."""

    answers: list[CodeAnswer]
    measures: Annotated[list[Measure], Meta(max_length=MAX_MEASURES)] = []


FromChild = HandlerLoaded | LoadFailed | PartAnswered | BatchAnswered

_encode = msgspec.msgpack.Encoder().encode
_decode_from_child = msgspec.msgpack.Decoder(FromChild).decode
_decode_to_child = msgspec.msgpack.Decoder(RunBatch).decode
_decode_fields = msgspec.msgpack.Decoder(dict[bytes, bytes]).decode


def encode_fields(fields: Mapping[bytes, bytes]) -> bytes:
    """The fields of a request's head, as they came, for `decode_fields`: most handlers look at none of them."""
    return _encode(fields)


def decode_fields(encoded: bytes) -> dict[str, str]:
    """The fields that a front has encoded, as text."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in _decode_fields(encoded).items()}


def frame(message: FromChild | RunBatch) -> bytes:
    """A message on a child's channel."""
    payload = _encode(message)
    return _LENGTH.pack(len(payload)) + payload


class ChildMessages:
    """Cuts what a child sends into messages; the beginning of an unfinished one waits for its rest."""

    def __init__(self, most_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._most_bytes, self._buffer = most_bytes, bytearray()

    def __repr__(self) -> str:
        """For example `<ChildMessages 12 bytes wait>`."""
        return f"<ChildMessages {len(self._buffer)} bytes wait>"

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[FromChild]:
        """The messages that `data` completes. Raises ProtocolError for what no child of ours would send."""
        if not self._buffer and _is_one(data) and len(data) - _LENGTH.size <= self._most_bytes:  # as it mostly is
            yield _decode_checked(memoryview(data)[_LENGTH.size :])
            return
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > self._most_bytes:
                raise ProtocolError(f"it sent a message of {size} bytes, {self._most_bytes} are allowed")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                return
            payload = bytes(memoryview(self._buffer)[_LENGTH.size : end])
            del self._buffer[:end]
            yield _decode_checked(payload)


def _is_one(data: bytes) -> bool:
    """Whether this is one whole message."""
    return len(data) >= _LENGTH.size and len(data) - _LENGTH.size == _LENGTH.unpack_from(data)[0]


def _decode_checked(payload: bytes | memoryview) -> FromChild:
    """The message. Raises ProtocolError."""
    try:
        return _decode_from_child(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"it sent no message of ours: {str(error)[:MAX_TEXT]}") from error


class Batches:
    """In a child: the batches that come on its channel. Several may come at once: they are answered in their order."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._received = channel, b""
        self._is_slow = False  # whether what comes next will have to be waited for, as what came before had
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)

    def __repr__(self) -> str:
        """For example `<Batches 0 bytes wait>`."""
        return f"<Batches {len(self._received)} bytes wait>"

    def take(self) -> RunBatch | None:
        """The next batch, when it is there; None when the channel has been closed."""
        received = self._received
        if not received:
            received = self._receive(_LENGTH.size)
            if not received:
                return None
            if _is_one(received):  # as it mostly is
                return _decode_to_child(memoryview(received)[_LENGTH.size :])
        while (missing := _count_missing(received)) > 0:
            part = self._receive(missing)
            if not part:
                return None
            received += part
        end = len(received) + missing
        self._received = received[end:]
        self._is_slow = self._is_slow and not self._received
        return _decode_to_child(memoryview(received)[_LENGTH.size : end])

    def _receive(self, missing: int) -> bytes:
        """What comes next; of a large message all that is missing. Empty when the channel has been closed.

        It polls before it waits: who waits in `recv` is woken too when the other end has read the answer before.
        After it has waited, it tries at once only when requests have come several at a time.
        """
        if missing <= RECEIVE_BYTES:
            if not self._is_slow:
                try:
                    return self._channel.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    self._is_slow = True
            self._poll.poll()
            return self._channel.recv(RECEIVE_BYTES)
        found = bytearray()
        while len(found) < missing and (part := self._channel.recv(RECEIVE_BYTES)):
            found += part
        return bytes(found) if len(found) >= missing else b""


def _count_missing(received: bytes) -> int:
    """Bytes that a message lacks; negative where more follows it."""
    if len(received) < _LENGTH.size:
        return _LENGTH.size - len(received)
    return _LENGTH.size + int(_LENGTH.unpack_from(received)[0]) - len(received)


def shorten(text: str) -> str:
    """The text for a message: of a long one its end, which is where an error says what it is."""
    return text if len(text) <= MAX_TEXT else f"(shortened) {text[-MAX_TEXT:]}"
