"""What a worker, its template and the children of code archives say to each other: msgpack, in tagged structs. Pure.

Between worker and template a message is one packet. On a child's channel a message is a u32 length, little-endian, and
as many bytes. A child is foreign code, so that whatever it sends is checked: `MAX_ANSWER_BYTES` bounds a message.
"""

import socket
from collections.abc import Iterator, Mapping
from struct import Struct as Layout
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

MAX_PACKET = 64 * 1024  #: of a message between worker and template
MAX_ANSWER_BYTES = 64 * 1024 * 1024  #: of a message that a child sends
MAX_TEXT = 2000  #: characters of an error that a child tells
RECEIVE_BYTES = 64 * 1024  #: at a time: a larger buffer would be mapped and unmapped for each message

_LENGTH = Layout("<I")

MIN_STATUS, MAX_STATUS = 200, 599  #: of a final answer
OK = 200
MAX_HEADERS, MAX_HEADER = 100, 8192  #: of an answer, and characters of one
MAX_MEASURES = 100  #: that travel with one batch's answers
#: Characters of a measurement's name, of a label's name and of its value; and how many labels it has.
MEASURE_NAME, MEASURE_LABEL, MEASURE_TEXT, MEASURE_LABELS = 128, 64, 128, 8

Text = Annotated[str, Meta(max_length=4 * MAX_TEXT)]
Count = Annotated[int, Meta(ge=0, le=2**31)]
Header = Annotated[str, Meta(max_length=MAX_HEADER)]


class ProtocolError(Exception):
    """The peer does not speak these messages."""


class ChildLimits(Struct, frozen=True):
    """What a child may take. `user`: None keeps ours.

    `memory_bytes`: of address space beyond what the template has. `gpu`: it may use the GPU that its worker sees, and
    its address space has no limit then, because CUDA reserves far more of it than it takes memory.
    """

    memory_bytes: int
    cpu_s: float  #: of a load or a batch
    processes: int
    open_files: int = 256
    file_bytes: int = 1024 * 1024 * 1024
    user: int | None = None
    gpu: bool = False


class Entry(Struct, frozen=True):
    """What the child imports; see `handlers.kinds.code.entry_point.EntryPoint`."""

    style: str
    module: str
    function: str
    folder: str
    from_package: bool


class ForkChild(Struct, frozen=True, tag=True):
    """To the template, with two descriptors: the child's end of its channel, and where its output goes.

    `folder` holds `model`, the archive's files, and `tmp`. `threads`: of torch. `packages`: where those that were
    installed for the archive are; empty where none were. `batch_size`: instead of the archive's own, and so
    `max_batch_delay_s`; 0: the archive's own. `envelope`: of an archive of TorchServe that names none; may be empty.
    `metrics`: the text of TorchServe's metrics.yaml; may be empty.
    """

    model: str
    folder: str
    entry: Entry
    limits: ChildLimits
    threads: int = 1
    packages: str = ""
    batch_size: int = 0
    max_batch_delay_s: float = 0.0
    envelope: str = ""
    metrics: str = ""


class TemplateReady(Struct, frozen=True, tag=True):
    """From the template, once it is warm. `problem`: why no child can run; `landlock`: its version, 0 for none."""

    problem: str
    landlock: int


class Forked(Struct, frozen=True, tag=True):
    """From the template: the answer to `ForkChild`, with the child's pidfd. `problem`: why there is no child."""

    pid: int = 0
    problem: str = ""


class HandlerLoaded(Struct, frozen=True, tag=True):
    """From a child: it answers batches now, of so many requests, collected for so long."""

    batch_size: Annotated[int, Meta(ge=1, le=4096)] = 1
    max_batch_delay_s: Annotated[float, Meta(ge=0.0, le=60.0)] = 0.0


class LoadFailed(Struct, frozen=True, tag=True):
    """From a child that ends: why the archive's code could not be loaded. `no_memory`: its limit was too small."""

    message: Text
    no_memory: bool = False


class CodeRequest(Struct, frozen=True):
    """One request as the handler gets it; see `server.ipc.handler_calls.HandlerCall`.

    `headers`: None where the dialect tells none; the handler sees `content_type` and `accept` then.
    """

    id: str
    content_type: str
    accept: str
    body: bytes
    headers: list[tuple[str, str]] | None = None
    parts: list[tuple[str, str]] = []
    properties: dict[str, str] = {}


class RunBatch(Struct, frozen=True, tag=True):
    """To a child: answer these with one call of the handler."""

    requests: list[CodeRequest]


class CodeAnswer(Struct, frozen=True):
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
    pairs = {str(name): str(value) for name, value in headers.items()}
    texts = (str(content_type), str(reason), *pairs, *pairs.values())
    if not MIN_STATUS <= code <= MAX_STATUS or len(pairs) > MAX_HEADERS or max(map(len, texts)) > MAX_HEADER:
        raise ValueError(f"status {code} with {len(pairs)} headers is no answer")
    return CodeAnswer(code, body, str(content_type), pairs, "", body_type, str(reason))


def make_failure(status: int, message: str) -> CodeAnswer:
    """Why there is no answer."""
    return CodeAnswer(status, message=shorten(message), failed=True)


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


FromChild = HandlerLoaded | LoadFailed | BatchAnswered
FromTemplate = TemplateReady | Forked

_encode = msgspec.msgpack.Encoder().encode
_decode_from_child = msgspec.msgpack.Decoder(FromChild).decode
_decode_to_child = msgspec.msgpack.Decoder(RunBatch).decode
_decode_to_template = msgspec.msgpack.Decoder(ForkChild).decode
_decode_from_template = msgspec.msgpack.Decoder(FromTemplate).decode


def encode_packet(message: ForkChild | FromTemplate) -> bytes:
    """A message between worker and template. Raises ProtocolError for one that is too long."""
    packet = _encode(message)
    if len(packet) > MAX_PACKET:
        raise ProtocolError(f"a message of {len(packet)} bytes, {MAX_PACKET} are allowed")
    return packet


def decode_for_template(packet: bytes) -> ForkChild:
    """What the worker says. Raises ProtocolError."""
    try:
        return _decode_to_template(packet)
    except msgspec.MsgspecError as error:
        raise ProtocolError(str(error)) from error


def decode_from_template(packet: bytes) -> FromTemplate:
    """What the template says. Raises ProtocolError."""
    try:
        return _decode_from_template(packet)
    except msgspec.MsgspecError as error:
        raise ProtocolError(str(error)) from error


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

    def feed(self, data: bytes) -> Iterator[FromChild]:
        """The messages that `data` completes. Raises ProtocolError for what no child of ours would send."""
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
            try:
                yield _decode_from_child(payload)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ProtocolError(f"it sent no message of ours: {str(error)[:MAX_TEXT]}") from error


def receive_batch(channel: socket.socket) -> RunBatch | None:
    """In a child: the next batch, when it comes; None when the worker has closed the channel.

    INVARIANT: the worker sends a batch when the one before is answered, so that nothing follows a message.
    """
    received, wanted = bytearray(), _LENGTH.size
    while len(received) < wanted:
        part = channel.recv(RECEIVE_BYTES)
        if not part:
            return None
        received += part
        if wanted == _LENGTH.size <= len(received):
            wanted += _LENGTH.unpack_from(received)[0]
    return _decode_to_child(memoryview(received)[_LENGTH.size :])


def shorten(text: str) -> str:
    """The text for a message: of a long one its end, which is where an error says what it is."""
    return text if len(text) <= MAX_TEXT else f"(shortened) {text[-MAX_TEXT:]}"
