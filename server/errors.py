"""Situations: everything that can be said instead of an answer. Pure; shared by front, worker and supervisor.

A situation belongs to no protocol. Each dialect of the front has its own table from situations to status and code.
"""

from enum import IntEnum

import msgspec

from model_store.errors import LoadError


class Situation(IntEnum):
    """Everything that can be said instead of an answer. The number travels in response frames."""

    OK = 0
    BAD_NAME = 1
    NO_TARGET = 2
    BAD_REQUEST = 3
    TOO_LARGE = 4
    NOT_FOUND = 5
    MODEL_FAILED = 6
    ARCHIVE_FAILED = 7
    STORE_FAILED = 8
    NO_ROOM = 9
    OVERLOADED = 10
    NOT_READY = 11
    WORKER_LOST = 12
    DEADLINE = 13
    INTERNAL = 14
    NO_ROUTE = 15
    BAD_METHOD = 16
    SLOW_CLIENT = 17
    BAD_SIGNATURE = 18
    UNSUPPORTED_CODING = 19
    UNAUTHORIZED = 20
    FORBIDDEN = 21


_LOAD_SITUATIONS = {
    "not_found": Situation.NOT_FOUND,
    "store_denied": Situation.STORE_FAILED,
    "store_unavailable": Situation.STORE_FAILED,
    "no_room": Situation.NO_ROOM,
    "code_no_memory": Situation.NO_ROOM,
    "code_busy": Situation.OVERLOADED,
}


def situation_of(error: LoadError) -> Situation:
    """What a failed load is to the client: the archive's fault unless it is the key's, the store's or the room's."""
    return _LOAD_SITUATIONS.get(error.reason, Situation.ARCHIVE_FAILED)


def describe_quarantine(model: str, why: str) -> str:
    """What a client is told whose model is in quarantine."""
    return f"{model} is quarantined: {why}; an operator can release it: POST /fleet/release/{model}"


class Detail(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of an error response frame: what was wrong and where, and when to try again where that was estimated.

    `status`: the HTTP status that the code of an archive gave, or its own server would have given.
    """

    message: str
    instance: int | None = None
    field: str | None = None
    retry_ms: int | None = None
    status: int | None = None

    def say(self, each: str = "instances") -> str:
        """The message with its place before it, for clients that show nothing else: `instances[3].start: ...`.

        `each`: what the instances of a request are called in this protocol.
        """
        counted = "" if self.instance is None else f"{each}[{self.instance}]"
        place = ".".join(filter(None, (counted, self.field)))
        return f"{place}: {self.message}" if place and not self.message.startswith(place) else self.message


class Refused(Exception):
    """A request ends here with a situation; a dialect of the front says it in the client's protocol."""

    def __init__(
        self,
        situation: Situation,
        message: str,
        instance: int | None = None,
        field: str | None = None,
        retry_ms: int | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.situation = situation
        self.detail = Detail(message, instance, field, retry_ms, status)

    def advise(self, retry_s: float) -> None:
        """Say after how many seconds to try again, unless that is said already."""
        if self.detail.retry_ms is None and retry_s > 0:
            self.detail = msgspec.structs.replace(self.detail, retry_ms=max(1, round(retry_s * 1e3)))
