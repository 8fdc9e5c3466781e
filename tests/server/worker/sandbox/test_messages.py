"""What a child reads from its channel: messages that come in pieces, and its end."""

import socket
import threading

from server.code_messages import Batches, CodeRequest, RunBatch, frame


def send(channel: socket.socket, pieces: list[bytes]) -> None:
    """One after the other."""
    for piece in pieces:
        channel.sendall(piece)


def test_a_batch_comes_in_pieces_of_any_size() -> None:
    """Also cut within its length; None once the worker has closed the channel, in the middle of a message too."""
    batch = RunBatch([CodeRequest("1", "text/plain", "", bytes(300_000), [("a", "b")]), CodeRequest("2", "", "", b"x")])
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
