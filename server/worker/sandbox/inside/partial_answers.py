"""Parts of answers that a handler sends while it makes them, as TorchServe's `send_intermediate_predict_response`.

In a child. That function of the wheel writes TorchServe's own message to `context.cl_socket`: here this is an object
that reads it again, and sends the worker a part for each request that it answers. Where who asked takes an answer in
one piece only, the parts are joined in front of the rest.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from struct import Struct, error

import msgspec

from server.code_messages import MAX_ANSWER_BYTES, CodeAnswer, CodeRequest, PartAnswered, make_answer, make_failure

_INT = Struct("!i")
_END = -1
OK = 200

SendPart = Callable[[PartAnswered], None]


class PartialAnswers:
    """See the module. `begin` and `end` enclose one call of the handler; `places` are its requests in the batch."""

    def __init__(self) -> None:
        self._send: SendPart | None = None
        self._lock = threading.Lock()  # a handler may send from threads of its own, also when its call has ended
        self._requests: Sequence[CodeRequest] = ()  # of the call that runs
        self._places: Sequence[int] = ()
        self._joined: dict[int, CodeAnswer] = {}

    def __repr__(self) -> str:
        """For example `<PartialAnswers to 2 requests>`."""
        return f"<PartialAnswers to {len(self._requests)} requests>"

    def connect(self, send: SendPart) -> None:
        """Send parts so from now on."""
        self._send = send

    def begin(self, places: Sequence[int], requests: Sequence[CodeRequest]) -> None:
        """The handler is called with these requests."""
        with self._lock:
            self._places, self._requests, self._joined = places, requests, {}

    def end(self, answers: list[CodeAnswer]) -> list[CodeAnswer]:
        """The call's answers, each behind the parts that were not sent; later parts are refused."""
        with self._lock:
            self._requests, joined = (), self._joined
            self._joined = {}
        if not joined:
            return answers
        return [_join(joined[i], answer) if i in joined else answer for i, answer in enumerate(answers)]

    def sendall(self, message: bytes) -> None:
        """Take TorchServe's message of a prediction. Raises ValueError for any other."""
        try:
            parts = list(_read_message(bytes(message)))
        except (error, UnicodeDecodeError) as wrong:
            raise ValueError(f"context.cl_socket takes messages of create_predict_response: {wrong}") from wrong
        with self._lock:
            if not self._requests:
                raise ValueError("a part of an answer comes while its handler runs, and this one has returned")
            left = list(range(len(self._requests)))
            for ident, answer in parts:
                place = next((i for i in left if self._requests[i].id == ident), None)
                if place is None:
                    raise ValueError(f"no request of this call has the id {ident[:80]!r}")
                left.remove(place)
                self._take(place, answer)

    def _take(self, place: int, answer: CodeAnswer) -> None:
        if self._requests[place].streams and self._send is not None:
            self._send(PartAnswered(self._places[place], answer))
            return
        before = self._joined.get(place)
        joined = answer if before is None else _join(before, answer)
        if len(joined.body) > MAX_ANSWER_BYTES:
            raise ValueError(f"the parts of an answer have more than {MAX_ANSWER_BYTES} bytes")
        self._joined[place] = joined


def _join(before: CodeAnswer, after: CodeAnswer) -> CodeAnswer:
    """The head of the first, the bodies of both; a failure is the whole."""
    if before.failed or after.failed:
        return before if before.failed else after
    return msgspec.structs.replace(before, body=before.body + after.body)


def _read_message(message: bytes) -> Iterator[tuple[str, CodeAnswer]]:
    """The id and the answer of each request: the message is of `ts.protocol.otf_message_handler`, 0.12.

    Status and text, both for all requests; then of each: id, content type, status, phrase, headers, body. Lengths are
    32-bit, and -1 is the end. Raises struct.error, UnicodeDecodeError.
    """
    reader = _Reader(message)
    status, text = reader.read_int(), reader.read_text()
    while (length := reader.read_int()) != _END:
        ident = reader.read(length).decode()
        content_type, code, phrase = reader.read_text(), reader.read_int(), reader.read_text()
        headers = {}
        for _ in range(reader.read_int()):
            name = reader.read_text()
            headers[name] = reader.read_text()
        body = reader.read(reader.read_int())
        if status == OK:
            yield ident, make_answer(code, body, content_type, headers, phrase)
        else:
            yield ident, make_failure(status, text)


class _Reader:
    """Reads a message from its beginning."""

    def __init__(self, message: bytes) -> None:
        self._message, self._at = message, 0

    def __repr__(self) -> str:
        """For example `<_Reader at 12 of 40>`."""
        return f"<_Reader at {self._at} of {len(self._message)}>"

    def read_int(self) -> int:
        (value,) = _INT.unpack_from(self._message, self._at)
        self._at += _INT.size
        return int(value)

    def read(self, length: int) -> bytes:
        found = self._message[self._at : self._at + length]
        if length < 0 or len(found) != length:
            raise error("it ends too early")
        self._at += length
        return found

    def read_text(self) -> str:
        return self.read(self.read_int()).decode()
