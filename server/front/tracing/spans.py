"""Spans of a request that is over: one tree from what the front noted and what workers said. Pure.

    POST /invocations                      the request at the front
      read                                 its body, until all of it was here
      infer                                one question to a model, one of these for each item of a call for many
        admission                          from the front to its worker: its turn there, and the worker's to read it
        load                               the model was not resident
          load.disk, load.store, ...       the disk tier, the store, building it, starting its code
            load.store.get                 one request to the store
          load.place                       it waited for memory, and was copied there
        queue                              until its batch began
        decode, forward, encode            its batch

INVARIANT: a span lies within its parent, whatever the clocks of two processes say.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from server.front.tracing.request_trace import Question, RequestTrace
from server.ipc.frames import Stage

SERVER_ERROR = 500  #: the least HTTP status that is the server's fault
Value = str | int | bool


@dataclass(slots=True)
class Span:
    """One span. Times are Unix nanoseconds. `is_server`: it is the request itself. `error`: why it failed."""

    name: str
    span_id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, Value] = field(default_factory=dict)
    error: str | None = None
    is_server: bool = False
    is_remote_child: bool = False  #: its parent is the client's


def build_spans(trace: RequestTrace, ended: float, offset_ns: int) -> list[Span]:
    """The trace's spans, parents first. `ended`: when it was over; `offset_ns`: from monotonic to Unix time."""
    root = _make_root(trace, _to_ns(trace.began, offset_ns), _to_ns(ended, offset_ns))
    tree = _Tree(root)
    if trace.read is not None and trace.read > trace.began:
        tree.add("read", root, root.began_ns, _to_ns(trace.read, offset_ns))
    for question in trace.questions:
        _add_question(tree, root, question, ended, offset_ns)
    return tree.spans


class _Tree:
    """The spans so far. Ids count up from the root's, which is random."""

    def __init__(self, root: Span) -> None:
        self.spans = [root]
        self._last = int(root.span_id, 16)

    def add(
        self, name: str, parent: Span, began_ns: int, ended_ns: int, attributes: dict[str, Value] | None = None
    ) -> Span:
        """A child of the parent, cut to lie within it."""
        self._last = (self._last + 1) % (1 << 64) or 1  # an id of zeros is none
        began = min(max(began_ns, parent.began_ns), parent.ended_ns)
        ended = min(max(ended_ns, began), parent.ended_ns)
        span = Span(name, f"{self._last:016x}", parent.span_id, began, ended, attributes or {})
        self.spans.append(span)
        return span


def _to_ns(at: float, offset_ns: int) -> int:
    return int(at * 1e9) + offset_ns


def _make_root(trace: RequestTrace, began_ns: int, ended_ns: int) -> Span:
    attributes: dict[str, Value] = dict(trace.attributes)
    if trace.left_out:
        attributes["fleetcast.questions_left_out"] = trace.left_out
    if trace.reason:
        attributes["error.type"] = trace.reason
        attributes["fleetcast.error"] = trace.error
    failed = trace.status >= SERVER_ERROR
    error = (trace.error or f"status {trace.status}") if failed else None
    parent = trace.parent
    return Span(
        trace.name,
        trace.span_id,
        "" if parent is None else parent.span_id,
        began_ns,
        max(began_ns, ended_ns),
        attributes,
        error,
        is_server=True,
        is_remote_child=parent is not None,
    )


def _add_question(tree: _Tree, root: Span, question: Question, ended: float, offset_ns: int) -> None:
    stages = [stage for stage in question.stages if stage.ended_ns >= int(question.began * 1e9)]
    over_ns = int((ended if question.ended is None else question.ended) * 1e9)
    latest_ns = max([over_ns, *(stage.ended_ns for stage in stages)])  # of an answer in parts the end comes later
    span = tree.add(
        "infer", root, _to_ns(question.began, offset_ns), latest_ns + offset_ns, dict(_list_attributes(question))
    )
    if question.reason:
        span.error = question.error or question.reason
    if stages:
        _add_stages(tree, span, stages, offset_ns)
    elif question.times[1]:  # a process of an archive's code that is lent to the front: the worker saw nothing
        began_ns = _to_ns(question.began, offset_ns)
        queued_ns, ran_ns = (microseconds * 1000 for microseconds in question.times)
        tree.add("queue", span, began_ns, began_ns + queued_ns)
        tree.add("forward", span, began_ns + queued_ns, began_ns + queued_ns + ran_ns, {"fleetcast.lent": True})


def _list_attributes(question: Question) -> Iterator[tuple[str, Value]]:
    yield "fleetcast.model", question.model
    for name, text in (
        ("fleetcast.model_version", question.version),
        ("fleetcast.cache", question.cache),
        ("fleetcast.tier", question.tier),
        ("error.type", question.reason),
    ):
        if text:
            yield name, text
    if question.workers:
        yield "fleetcast.worker", question.workers[-1]
        if len(question.workers) > 1:
            yield "fleetcast.tries", len(question.workers)


def _add_stages(tree: _Tree, parent: Span, stages: Sequence[Stage], offset_ns: int) -> None:
    """The stages as spans: `load.store.get` is a child of the latest `load.store`."""
    latest: dict[str, Span] = {}
    for stage in stages:
        above = latest.get(stage.name.rpartition(".")[0], parent)
        numbers: dict[str, Value] = {f"fleetcast.{name}": number for name, number in stage.numbers.items()}
        span = tree.add(stage.name, above, stage.began_ns + offset_ns, stage.ended_ns + offset_ns, numbers)
        if stage.name == "load" and "fleetcast.tier" in parent.attributes:
            span.attributes["fleetcast.tier"] = parent.attributes["fleetcast.tier"]
        if stage.error:
            span.error = stage.error
        latest[stage.name] = span
