"""The data plane of one sampled request: each question to a model is noted."""

import time

from msgspec.structs import replace

from server.errors import Refused
from server.front.inference import (
    InferRequest,
    InferResponse,
    InferStats,
    RefusedByWorker,
    TogetherAnswer,
    TogetherRequest,
)
from server.front.inference_plane import InferencePlane, PlaneInFront
from server.front.tracing.request_trace import Question, RequestTrace


class TracedPlane(PlaneInFront):
    """See the module. Requests that are not sampled never see it."""

    def __init__(self, plane: InferencePlane, trace: RequestTrace) -> None:
        super().__init__(plane)
        self._trace = trace

    def __repr__(self) -> str:
        """For example `<TracedPlane <RequestTrace ...> over <DataPlane ...>>`."""
        return f"<TracedPlane {self._trace!r} over {self._plane!r}>"

    async def infer(self, request: InferRequest) -> InferResponse:
        """The plane's answer. Raises what the plane raises."""
        question = self._trace.ask(request.model)
        if question is None:
            return await self._plane.infer(request)
        try:
            response = await self._plane.infer(replace(request, question=question))
        except BaseException as error:
            question.note_error(error)
            if isinstance(error, RefusedByWorker):
                _note_stats(question, error.stats)
            raise
        finally:
            question.ended = time.monotonic()
        _note_stats(question, response.stats)
        return response

    async def infer_together(self, request: TogetherRequest) -> list[TogetherAnswer | Refused | None]:
        """What came of each item, each noted as a question; those that are asked alone are noted then."""
        began = time.monotonic()
        found = await self._plane.infer_together(request)
        ended = time.monotonic()
        for model, answer in zip(request.models, found, strict=True):
            question = None if answer is None else self._trace.ask(model)
            if question is None:
                continue
            question.began, question.ended = began, ended
            if isinstance(answer, Refused):
                question.note_error(answer)
            elif answer is not None:
                _note_stats(question, answer.stats)
                question.times = (0, 0)  # its stages ran as arrays with those of others, and are no spans of its own
        return found


def trace_plane(plane: InferencePlane, trace: RequestTrace, read: float) -> InferencePlane:
    """The plane of a sampled request, all of whose body was here at `read`."""
    trace.read = read
    return TracedPlane(plane, trace)


def _note_stats(question: Question, stats: InferStats) -> None:
    question.cache, question.tier, question.version = stats.cache, stats.tier, stats.version
    question.times = (stats.queue_us, stats.inference_us)
