"""What a child and who asks it read from the channel: messages that come in pieces, and its end."""

import socket
import threading
from typing import Any

import pytest

from server.code_messages import (
    BatchAnswered,
    Batches,
    ChildMessages,
    CodeAnswer,
    CodeRequest,
    FromChild,
    PartAnswered,
    ProtocolError,
    RunBatch,
    encode_fields,
    frame,
)
from tests.patience import wait_until

FIELDS = encode_fields({b"a": b"b"})  #: of a request's head


def send(channel: socket.socket, pieces: list[bytes]) -> None:
    """One after the other."""
    for piece in pieces:
        channel.sendall(piece)


def test_a_batch_comes_in_pieces_of_any_size() -> None:
    """Also cut within its length; None once the worker has closed the channel, in the middle of a message too."""
    batch = RunBatch([CodeRequest("1", "text/plain", "", bytes(300_000), FIELDS), CodeRequest("2", "", "", b"x")])
    data = frame(batch)
    for cuts in ((1, 2), (4, 5), (100_000, 200_000)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            pieces = [data[: cuts[0]], data[cuts[0] : cuts[1]], data[cuts[1] :]]
            sender = threading.Thread(target=send, args=(ours, pieces))
            sender.start()
            batches = Batches(theirs)
            assert batches.take() == batch
            sender.join()
            ours.sendall(data[:6])
            ours.shutdown(socket.SHUT_WR)
            assert batches.take() is None


def test_batches_that_come_at_once_are_taken_one_by_one() -> None:
    """Small ones, one behind a large one, and the beginning of one whose rest comes later: none is lost."""
    small, large = (RunBatch([CodeRequest(name, "", "", body)]) for name, body in (("1", b"x"), ("2", bytes(200_000))))
    data = b"".join(map(frame, (small, small, large, small, small)))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=send, args=(ours, [data[:-3], data[-3:]]))
        sender.start()
        batches = Batches(theirs)
        assert [batches.take() for _ in range(5)] == [small, small, large, small, small]
        sender.join()


class CountedSocket(socket.socket):
    """A socket that counts how often it was read without waiting, and in vain."""

    tries = vain = 0

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """Receive, and count it."""
        self.tries += flags == socket.MSG_DONTWAIT
        try:
            return super().recv(size, flags)
        except BlockingIOError:
            self.vain += 1
            raise


def test_who_has_waited_for_a_request_does_not_try_in_vain_for_the_next() -> None:
    """Until requests come several at a time: then what is there is read at once again."""
    one = RunBatch([CodeRequest("1", "", "", b"x")])
    ours, theirs = socket.socketpair()
    taken: list[Any] = []
    with ours, CountedSocket(fileno=theirs.detach()) as channel:
        batches = Batches(channel)
        waits = threading.Thread(target=lambda: taken.append(batches.take()))
        waits.start()
        wait_until(lambda: channel.vain == 1, "a try in vain")
        ours.sendall(frame(one))
        waits.join()
        for sent, tries in ((1, 1), (1, 1), (2, 1), (1, 2)):
            ours.sendall(frame(one) * sent)
            taken += [batches.take() for _ in range(sent)]
            assert (channel.tries, channel.vain) == (tries, 1)
    assert taken == [one] * 6


def test_what_a_child_sends_is_cut_into_messages_wherever_it_is_cut() -> None:
    """A whole message, several at once, and each beginning of one, also behind a whole one."""
    sent: list[FromChild] = [
        BatchAnswered([CodeAnswer(200, b"abc")]),
        PartAnswered(0, CodeAnswer(200)),
        BatchAnswered([]),
    ]
    data = b"".join(map(frame, sent))
    for cut in range(len(data) + 1):
        messages = ChildMessages()
        found = [*messages.feed(data[:cut]), *messages.feed(data[cut:])]
        assert (found, len(messages)) == (sent, 0)


@pytest.mark.parametrize(
    "data", [frame(BatchAnswered([CodeAnswer(200, b"abc")])), b"\x05\0\0\0hello", b"\x01\0\0\0\xff"]
)
def test_a_whole_message_that_is_too_long_or_none_of_ours_is_refused(data: bytes) -> None:
    """The bound holds also where the message is there already."""
    with pytest.raises(ProtocolError):
        list(ChildMessages(8).feed(data))
