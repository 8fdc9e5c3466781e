"""The end of a connection that is asked: whole requests in, answers out, parts as fast as clients take them."""

from abc import abstractmethod

from server.ipc.bodies import Inbox
from server.ipc.connection import FrameConnection
from server.ipc.frames import Credit, Data, Partial, Request, Response, WireError
from server.ipc.part_streams import PartStreams


class RequestConnection(FrameConnection):
    """See the module. A request with a body above `max_body_bytes` breaks the wire: the front refuses those itself.

    `max_unsent_bytes`: of large answers and parts that wait here for slow clients.
    """

    def __init__(self, max_body_bytes: int, max_unsent_bytes: int) -> None:
        super().__init__()
        self._max_body_bytes, self._max_unsent_bytes = max_body_bytes, max_unsent_bytes
        self._inbox, self._streams = Inbox(), PartStreams()

    @abstractmethod
    def begin_request(self, request: Request) -> None:
        """All of a request is here."""

    def receive_request(self, request: Request) -> None:
        """A request has come, or its head and first part. Raises WireError."""
        if request.body_bytes > self._max_body_bytes:
            raise WireError(f"a body of {request.body_bytes} bytes is more than {self._max_body_bytes}")
        if request.body_bytes == len(request.body):
            self.begin_request(request)
        else:
            self._inbox.start(request)

    def receive_part(self, part: Data) -> None:
        """A further part of a request's body has come. Raises WireError."""
        if self._inbox.knows(part.id):
            self.send(Credit(part.id, len(part.body)))
        whole = self._inbox.add(part)
        if whole is not None:
            self.begin_request(whole)

    def forget_request(self, ident: int) -> None:
        """The client has left: neither more of its body nor its answer is wanted."""
        self._inbox.drop(ident)
        self.drop_body(ident)
        self._streams.drop(ident)

    def add_credit(self, ident: int, room: int) -> None:
        """The other side has given its client so much."""
        super().add_credit(ident, room)
        for frame in self._streams.add_credit(ident, room):
            self.send(frame)

    def send_part(self, part: Partial) -> bool:
        """Send a part of an answer that is not complete yet. False where slow clients hold too many bytes."""
        if self.unsent_bytes + self._streams.held_bytes + len(part.body) > self._max_unsent_bytes:
            return False
        for frame in self._streams.add(part):
            self.send(frame)
        return True

    def send_response(self, response: Response) -> None:
        """Send an answer, or the end of one in parts once those have left."""
        if self._streams.has(response.id):
            for frame in self._streams.end(response):
                self.send(frame)
        else:
            self.send(response)
