"""How long the stages of a traced request took in a worker: noted while it runs, told before its answer.

On the step thread. Requests that are not traced have none of this.
"""

from collections.abc import Iterator, Sequence

from model_store.stores.load_part import LoadPart
from server.ipc.frames import MAX_STAGE_ERROR, MOST_STAGES, Stage

NO_ROWS = (0, 0)


class StageTimes:
    """One request's, whose trace has this id. All times are on the monotonic clock, in seconds."""

    __slots__ = ("_batch", "_load", "trace_id")

    def __init__(self, trace_id: str) -> None:
        self.trace_id = trace_id
        self._load: tuple[float, Sequence[LoadPart], str] | None = None
        self._batch: tuple[float, float, float, tuple[int, int]] | None = None

    def __repr__(self) -> str:
        """For example `<StageTimes of 4bf92f3577b34da6a3ce929d0e0e4736>`."""
        return f"<StageTimes of {self.trace_id}>"

    def note_load(self, ended: float, parts: Sequence[LoadPart], error: str = "") -> None:
        """The load that the request waited for has ended. `error`: why it failed."""
        self._load = (ended, parts, error)

    def note_batch(self, began: float, decoded: float, ran: float, rows: tuple[int, int] = NO_ROWS) -> None:
        """The request's batch has run: when it began, was decoded and had run. `rows`: how many, of how many models."""
        self._batch = (began, decoded, ran, rows)

    def note_apart(self, began: float, ended: float, decode_s: float, encode_s: float) -> None:
        """The request has run in slices of its own. What it waited between them is in the time of its forward."""
        decoded = min(ended, began + decode_s)
        self._batch = (began, decoded, max(decoded, ended - encode_s), NO_ROWS)

    def list_stages(self, arrived: float, accepted: float, now: float, *, has_waited: bool) -> list[Stage]:
        """The stages until `now`, when the request is answered or refused.

        `arrived`: at the front; `accepted`: by the worker. `has_waited`: for a load, also if that has not ended.
        """
        return list(self._iterate(arrived, accepted, now, has_waited=has_waited))[:MOST_STAGES]

    def _iterate(self, arrived: float, accepted: float, now: float, *, has_waited: bool) -> Iterator[Stage]:
        yield _make_stage("admission", arrived, accepted)
        ready = accepted
        if self._load is not None:
            ready, parts, error = self._load
            yield _make_stage("load", accepted, ready, error=error)
            for part in parts:
                if part.ended > accepted:  # of a load that began before the request came there may be parts before it
                    size = {"bytes": part.size} if part.size else {}
                    yield _make_stage(f"load.{part.name}", max(part.began, accepted), part.ended, size, part.error)
            if not error and (placed := max((part.ended for part in parts), default=accepted)) < ready:
                yield _make_stage("load.place", max(placed, accepted), ready)
        elif has_waited:
            yield _make_stage("load", accepted, now, error="the load had not ended")
            return
        if self._batch is None:
            yield _make_stage("queue", ready, now)
            return
        began, decoded, ran, (rows, models) = self._batch
        counts = {"rows": rows, "models": models} if rows else {}
        yield _make_stage("queue", ready, began)
        if decoded > began:
            yield _make_stage("decode", began, decoded)
        yield _make_stage("forward", decoded, ran, counts)
        yield _make_stage("encode", ran, now)


def _make_stage(name: str, began: float, ended: float, numbers: dict[str, int] | None = None, error: str = "") -> Stage:
    """INVARIANT: the stage is within what a frame may hold, and does not end before it begins."""
    began_ns, ended_ns = int(began * 1e9), int(ended * 1e9)
    return Stage(name[:64], began_ns, max(began_ns, ended_ns), numbers or {}, error[:MAX_STAGE_ERROR])
