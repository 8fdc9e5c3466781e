"""What a front notes of one sampled request while it runs: its head, each question to a model, what became of it.

On the front's event loop. It holds numbers and texts of bounded size, no bodies; `server.front.tracing.spans` makes
spans of it, on the exporter's thread. All times are on the monotonic clock (s), which the host's processes share.
"""

import time
from collections.abc import Sequence

from server.errors import Refused, Situation
from server.front.tracing.trace_context import TraceParent
from server.ipc.frames import Stage

MOST_QUESTIONS = 64  #: of a trace: a call for 10,000 models shows its first ones
MAX_TEXT = 512  #: characters of a name or message


class Question:
    """One question to a model. The link fills in `workers`, those that were asked, and `stages`, what the worker says.

    `times`: microseconds in the queue and in the model, as the answer's head has them.
    """

    __slots__ = (
        "began", "cache", "ended", "error", "model", "reason", "stages", "tier", "times", "trace_id", "version",
        "workers",
    )  # fmt: skip

    def __init__(self, trace_id: str, model: str, began: float) -> None:
        self.trace_id, self.model, self.began = trace_id, model[:MAX_TEXT], began
        self.ended: float | None = None
        self.workers: list[int] = []
        self.stages: Sequence[Stage] = ()
        self.cache: str | None = None
        self.tier = self.version = self.error = self.reason = ""
        self.times = (0, 0)

    def __repr__(self) -> str:
        """For example `<Question to au/nsw1.mar>`."""
        return f"<Question to {self.model}>"

    def note_error(self, error: BaseException) -> None:
        """There is no answer, or only half of one."""
        self.reason, self.error = name_error(error)


class RequestTrace:
    """One sampled request. `trace_id`, `span_id`: of the front's own span; `parent`: the client's."""

    __slots__ = (
        "attributes", "began", "ended", "error", "left_out", "name", "parent", "questions", "read", "reason", "span_id",
        "status", "trace_id",
    )  # fmt: skip

    def __init__(self, trace_id: str, span_id: str, parent: TraceParent | None, began: float) -> None:
        self.trace_id, self.span_id, self.parent, self.began = trace_id, span_id, parent, began
        self.name = self.reason = self.error = ""
        self.attributes: dict[str, str | int] = {}
        self.questions: list[Question] = []
        self.left_out = self.status = 0  # questions that are not noted; the HTTP status, or what stands for it
        self.read: float | None = None  # when all of the body was here
        self.ended: float | None = None

    def __repr__(self) -> str:
        """For example `<RequestTrace 4bf9...: POST /invocations, 1 questions>`."""
        return f"<RequestTrace {self.trace_id[:4]}...: {self.name}, {len(self.questions)} questions>"

    def ask(self, model: str) -> Question | None:
        """Note a question that begins now; None where there are too many, or the request is over."""
        if self.ended is not None:
            return None
        if len(self.questions) >= MOST_QUESTIONS:
            self.left_out += 1
            return None
        question = Question(self.trace_id, model, time.monotonic())
        self.questions.append(question)
        return question

    def note_error(self, error: BaseException) -> None:
        """Why the request as a whole has no answer."""
        self.reason, self.error = name_error(error)


def name_error(error: BaseException) -> tuple[str, str]:
    """The kind of an error, of which there are few, and what it says."""
    if isinstance(error, Refused):
        return Situation(error.situation).name.lower(), error.detail.message[:MAX_TEXT]
    return type(error).__name__, str(error)[:MAX_TEXT]
