"""The tree of spans that a request becomes: whatever workers say, each span lies within its parent."""

from hypothesis import given, strategies

from server.errors import Refused, Situation
from server.front.tracing.request_trace import MOST_QUESTIONS, Question, RequestTrace
from server.front.tracing.spans import Span, build_spans
from server.front.tracing.trace_context import TraceParent
from server.ipc.frames import Stage

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
S = 1_000_000_000
OFFSET = 10**18


def make_trace(began: float = 1.0) -> RequestTrace:
    """One that has begun."""
    trace = RequestTrace(TRACE, SPAN, TraceParent(TRACE, "1" * 16, is_sampled=True), began)
    trace.name, trace.status = "POST /invocations", 200
    return trace


def add_question(trace: RequestTrace, stages: list[Stage], began: float = 2.0, ended: float = 8.0) -> Question:
    """A question with these stages, which are in whole seconds."""
    question = Question(TRACE, "a.mar", began)
    question.ended, question.stages, question.workers = ended, stages, [0]
    trace.questions.append(question)
    return question


def make_stage(name: str, began: int, ended: int, error: str = "", **numbers: int) -> Stage:
    """In seconds."""
    return Stage(name, began * S, ended * S, numbers, error)


def draw_tree(spans: list[Span]) -> list[str]:
    """The names, indented by their depth."""
    depths = {spans[0].parent_id: -1}
    lines = []
    for span in spans:
        depths[span.span_id] = depths[span.parent_id] + 1
        lines.append(" " * depths[span.span_id] + span.name)
    return lines


def test_dots_in_names_are_levels_of_the_tree() -> None:
    """A part belongs to the latest of its name's beginning: an archive may be fetched twice."""
    trace = make_trace()
    trace.read = 1.5
    stages = [
        make_stage("admission", 2, 3),
        make_stage("load", 3, 6),
        make_stage("load.store", 3, 4, "ArchiveInvalid: torn"),
        make_stage("load.store.get", 3, 4, bytes=7),
        make_stage("load.store", 4, 5),
        make_stage("load.store.get", 4, 5),
        make_stage("queue", 6, 7),
        make_stage("forward", 7, 8, rows=3),
    ]
    question = add_question(trace, stages)
    question.cache, question.tier = "miss", "store"
    spans = build_spans(trace, 9.0, OFFSET)
    assert draw_tree(spans) == [
        "POST /invocations", " read", " infer", "  admission", "  load", "   load.store", "    load.store.get",
        "   load.store", "    load.store.get", "  queue", "  forward",
    ]  # fmt: skip
    assert (spans[0].began_ns, spans[0].ended_ns) == (OFFSET + S, OFFSET + 9 * S)
    assert (spans[0].parent_id, spans[0].is_server, spans[0].is_remote_child) == ("1" * 16, True, True)
    assert [span.error for span in spans if span.name == "load.store"] == ["ArchiveInvalid: torn", None]
    assert spans[6].attributes == {"fleetcast.bytes": 7}
    assert spans[-1].attributes == {"fleetcast.rows": 3}
    assert spans[2].attributes == {
        "fleetcast.model": "a.mar", "fleetcast.cache": "miss", "fleetcast.tier": "store", "fleetcast.worker": 0
    }  # fmt: skip
    assert spans[4].attributes == {"fleetcast.tier": "store"}


@given(
    strategies.lists(
        strategies.tuples(
            strategies.sampled_from(["admission", "load", "load.store", "load.store.get", "a.b", "."]),
            strategies.integers(0, 12),
            strategies.integers(0, 12),
        ),
        max_size=12,
    )
)
def test_spans_lie_within_their_parents(found: list[tuple[str, int, int]]) -> None:
    """INVARIANT, for any stages."""
    trace = make_trace()
    add_question(trace, [make_stage(*each) for each in found])
    spans = build_spans(trace, 9.0, OFFSET)
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    for span in spans[1:]:
        parent = by_id[span.parent_id]
        assert parent.began_ns <= span.began_ns <= span.ended_ns <= parent.ended_ns


def test_an_answer_in_parts_is_as_long_as_its_stages() -> None:
    """The question was over for the front with the first part."""
    trace = make_trace()
    add_question(trace, [make_stage("forward", 2, 8)], ended=3.0)
    infer = build_spans(trace, 9.0, 0)[1]
    assert infer.ended_ns == 8 * S


def test_a_lent_process_has_the_times_of_its_answer() -> None:
    """The worker says nothing of it: what the front itself measured is shown."""
    trace = make_trace()
    add_question(trace, []).times = (1_000_000, 2_000_000)
    spans = build_spans(trace, 9.0, 0)
    assert draw_tree(spans)[1:] == [" infer", "  queue", "  forward"]
    assert [(span.began_ns // S, span.ended_ns // S) for span in spans[2:]] == [(2, 3), (3, 5)]
    assert spans[3].attributes == {"fleetcast.lent": True}


def test_what_failed_says_why() -> None:
    """A 4xx is the client's fault, which is no error of the server's span; the question's span is one."""
    trace = make_trace()
    question = add_question(trace, [])
    refused = Refused(Situation.OVERLOADED, "too many")
    trace.note_error(refused)
    question.note_error(refused)
    question.workers = [0, 1]
    for status, error in ((429, None), (503, "too many")):
        trace.status = status
        root, infer = build_spans(trace, 9.0, 0)
        assert root.error == error
        assert (root.attributes["error.type"], root.attributes["fleetcast.error"]) == ("overloaded", "too many")
        assert infer.error == "too many"
        assert infer.attributes["fleetcast.tries"] == 2


def test_a_trace_is_bounded_and_ends_once() -> None:
    """Of a call for thousands the first questions are shown; who asks after the end is not."""
    trace = make_trace()
    assert sum(trace.ask(str(i)) is not None for i in range(MOST_QUESTIONS + 7)) == MOST_QUESTIONS
    assert build_spans(trace, 9.0, 0)[0].attributes["fleetcast.questions_left_out"] == 7
    trace.ended = 9.0
    assert trace.ask("late") is None
    assert len(Question(TRACE, "x" * 10_000, 0.0).model) == 512
