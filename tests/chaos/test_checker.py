"""The checker sees each kind of broken promise, and blames no server for what was done to it."""

import pytest

from tests.chaos.checker import GRACE_S, History, Outage, Record, Verdict, Window, count_verdicts, judge_request

FOLLOW_S = 5.0
V1, V2 = frozenset({"v1"}), frozenset({"v2"})


@pytest.fixture
def history() -> History:
    """`m` has v1 from 0 on, v2 from 100 on, and v1 is replaced at 110."""
    history = History(FOLLOW_S)
    history.publish("m", "v1", 0.0)
    history.publish("m", "v2", 100.0)
    history.replace("m", 110.0)
    return history


def note_answer(sent: float, version: str, agrees: frozenset[str], took: float = 0.1) -> Record:
    """An answer with 200 to a request with a deadline of a second."""
    return Record("m", sent, sent + took, 1.0, 200, version=version, agrees=agrees)


def note_refusal(
    sent: float, status: int | None, took: float = 0.1, *, hostile: bool = False, connected: bool = True
) -> Record:
    """Anything else."""
    return Record("m", sent, sent + took, 1.0, status, connected, hostile=hostile)


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        (note_answer(50, "v1", V1), Verdict.RIGHT),
        (note_answer(101, "v1", V1), Verdict.RIGHT),  # v2 is in the store, and nobody has been told
        (note_answer(101, "v2", V2), Verdict.RIGHT),
        (note_answer(110 + FOLLOW_S, "v1", V1), Verdict.RIGHT),
        (note_answer(111 + FOLLOW_S, "v1", V1), Verdict.STALE),
        (note_answer(50, "v2", V2), Verdict.STALE),  # before there was such a version
        (note_answer(50, "v1", frozenset()), Verdict.WRONG),
        (note_answer(101, "v2", V1), Verdict.WRONG),  # the numbers of another version than the header says
        (note_answer(50, "", V1), Verdict.WRONG),
        (note_answer(50, "v1", V1, 1.0 + GRACE_S + 0.1), Verdict.LATE),
        (note_refusal(50, 503), Verdict.REFUSED),
        (note_refusal(50, 503, 1.1 + GRACE_S), Verdict.LATE),
        (note_refusal(50, 500), Verdict.BROKEN),
        (note_refusal(50, None), Verdict.LOST),
        (note_refusal(50, None, connected=False), Verdict.LOST),
        (note_refusal(50, 400, hostile=True), Verdict.REPELLED),
        (note_refusal(50, 200, hostile=True), Verdict.WRONG),
    ],
)
def test_each_request_has_its_verdict(history: History, record: Record, verdict: Verdict) -> None:
    """One request at a time, without outages."""
    assert judge_request(record, history) is verdict


def test_a_version_that_is_put_back_is_right_again(history: History) -> None:
    """A rollback publishes bytes that were replaced before."""
    history.publish("m", "v1", 200.0)
    history.replace("m", 201.0)
    assert judge_request(note_answer(250, "v1", V1), history) is Verdict.RIGHT
    assert judge_request(note_answer(250, "v2", V2), history) is Verdict.STALE


def test_an_old_copy_may_answer_while_the_store_is_broken(history: History) -> None:
    """And a little longer; but no version that was never published."""
    history.store_broken.append((200.0, 210.0))
    assert [
        judge_request(note_answer(sent, "v1", V1), history) for sent in (199, 205, 210 + FOLLOW_S, 211 + FOLLOW_S)
    ] == [
        Verdict.STALE,
        Verdict.RIGHT,
        Verdict.RIGHT,
        Verdict.STALE,
    ]
    assert judge_request(note_answer(205, "v3", frozenset({"v3"})), history) is Verdict.STALE


def test_only_what_an_outage_had_under_way_is_excused(history: History) -> None:
    """A killed front's requests are cut, not lost; one sent later is lost; a wrong answer is wrong at any time."""
    history.outages.append(Outage(50.0, 50.3, cuts=True, down=False))
    assert judge_request(note_refusal(49.9, None, 0.2), history) is Verdict.CUT
    assert judge_request(note_refusal(49.0, None, 0.5), history) is Verdict.LOST
    assert judge_request(note_refusal(50.4, None), history) is Verdict.LOST
    assert judge_request(note_refusal(50.1, None, connected=False), history) is Verdict.LOST, "the other front listens"
    assert judge_request(note_answer(49.9, "v1", V1, 3.0), history) is Verdict.CUT
    assert judge_request(note_answer(50.1, "v1", frozenset()), history) is Verdict.WRONG
    history.outages.append(Outage(60.0, 70.0, cuts=False, down=True))
    assert judge_request(note_refusal(65.0, None, connected=False), history) is Verdict.DOWN
    assert judge_request(note_refusal(65.0, None), history) is Verdict.LOST, (
        "a server that stops answers what it was sent"
    )


def test_the_client_s_own_stall_is_not_held_against_the_server(history: History) -> None:
    """Late by less than the client itself stood still."""
    late = note_answer(50, "v1", V1, 3.0)
    stalled = Record("m", late.sent, late.ended, 1.0, 200, version="v1", agrees=V1, stalled_s=1.5)
    assert [judge_request(late, history), judge_request(stalled, history)] == [Verdict.LATE, Verdict.RIGHT]


def test_recovery_ends_with_the_last_request_that_was_not_answered(history: History) -> None:
    """Counted from the heal, by when it was sent; what is bad until the end has not recovered; both are said."""
    history.windows += [Window(("a",), 10, 12, 13, 20), Window(("b",), 20, 22, 23, 30)]
    records = [note_answer(sent, "v1", V1) for sent in range(10, 30)]
    records += [
        note_refusal(11.5, 503),
        note_refusal(14.5, 503),
        note_refusal(29.8, 503),
        note_refusal(28.0, 400, hostile=True),
    ]
    report = count_verdicts(records, history, 10.0)
    assert [row.recovery_s for row in report.rows] == [2.5, None]
    assert report.rows[0].during == {"right": 2, "refused": 1}
    assert report.counts == {"right": 20, "refused": 3, "repelled": 1}
    assert report.violations(3.0) == ["recovery from b at 10 s was not seen"]
    assert report.violations(2.0)[0] == "recovery from a at 0 s took 2.5 s"
    assert report.violations(None) == []


def test_a_stray_refusal_is_no_lack_of_recovery(history: History) -> None:
    """Two of 250 may be refused at any time, three are too many; what the next fault has met does not count."""
    history.windows.append(Window(("a",), 10, 12, 13, 20))
    good = [note_answer(12 + at * 0.03, "v1", V1) for at in range(250)]
    late = [note_refusal(19.95, 503), note_refusal(19.95, None)]
    found = [
        count_verdicts([*good, *late, *(note_refusal(19.8, 503) for _ in range(times))], history, 0.0)
        .rows[0]
        .recovery_s
        for times in (0, 1, 2, 3)
    ]
    assert found == [0.0, 0.0, 0.0, None]


def test_a_run_without_answers_or_with_a_violation_fails(history: History) -> None:
    """Nothing right is no success, and each violation is counted and shown."""
    assert count_verdicts([note_refusal(1, 503)], history, 0.0).violations(None) == ["no request was answered right"]
    report = count_verdicts(
        [note_answer(50, "v1", V1), note_answer(51, "v1", V2), note_refusal(52, None)], history, 0.0
    )
    assert report.violations(None) == ["1 wrong", "1 lost"]
    assert [line.split(" ")[2] for line in report.examples] == ["wrong", "lost"]
