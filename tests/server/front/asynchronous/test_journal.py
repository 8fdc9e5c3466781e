"""The journal of asynchronous invocations: its files, its locks, and what is left when a process dies in between."""

import shutil
import time
from pathlib import Path

import pytest

from model_store.names import ModelName
from server.errors import Refused, Situation
from server.front.asynchronous import journal as journals
from server.front.asynchronous.calls import AsyncCall
from server.front.asynchronous.journal import JobRecord, Journal, Outcome

MODEL = ModelName("au/NSW1.mar")
ANSWER, FAILURE = Outcome(answered=True, data=b"forecast"), Outcome(answered=False, data=b"why")


def make_record(name: str = "a") -> JobRecord:
    """A job that answers into `name`."""
    call = AsyncCall(name, "application/json", "", None, ModelName(name), ModelName(f"{name}-failed"), 60.0, 5.0)
    return JobRecord(call, MODEL, b"\x00body", time.monotonic(), b"id", "desk", "desk")


def open_journal(folder: Path) -> Journal:
    """One front's."""
    return Journal(folder, 10, 10)


def list_files(folder: Path) -> list[str]:
    """What the journal keeps, without its locks."""
    return sorted(path.name for path in folder.rglob("*") if path.suffix in (".job", ".outcome", ".new"))


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    """With its body, its client's names, and its times."""
    journal, record = open_journal(tmp_path), make_record()
    assert journal.read(journal.write(record)) == record


def test_what_is_done_leaves_nothing(tmp_path: Path) -> None:
    """Neither its file nor its outcome; and it may be removed twice."""
    journal = open_journal(tmp_path)
    entry = journal.write(make_record())
    assert journal.decide(entry, ANSWER) == ANSWER
    assert len(list_files(tmp_path)) == 2
    journal.remove(entry)
    journal.remove(entry)
    assert list_files(tmp_path) == []


def test_there_is_one_outcome(tmp_path: Path) -> None:
    """The first; also for the front that takes the job over."""
    journal = open_journal(tmp_path)
    entry = journal.write(make_record())
    assert journal.find_outcome(entry) is None
    assert [journal.decide(entry, each) for each in (ANSWER, FAILURE)] == [ANSWER, ANSWER]
    journal.close()
    (adopted,) = open_journal(tmp_path).adopt()
    other = open_journal(tmp_path)
    assert (adopted.tries, other.find_outcome(adopted)) == (2, ANSWER)
    assert other.decide(adopted, FAILURE) == ANSWER


def test_only_one_takes_over_and_only_from_the_dead(tmp_path: Path) -> None:
    """Outcomes of jobs that were done when their front died go as well."""
    first, second, third = (open_journal(tmp_path) for _ in range(3))
    first.write(make_record("a"))
    done = first.write(make_record("b"))
    assert second.adopt() == []
    first.decide(done, ANSWER)
    (first._own / done.name).unlink()
    first.close()
    (entry,) = second.adopt()
    assert third.adopt() == []
    assert second.read(entry).call.id == "a"
    assert list_files(tmp_path) == [entry.name]
    assert not first._own.exists()


def test_a_folder_that_a_cleaner_has_removed_is_made_anew(tmp_path: Path) -> None:
    """Its lock too, so that the jobs in it can be taken over."""
    journal = open_journal(tmp_path)
    lost = journal.write(make_record("lost"))
    shutil.rmtree(journal._own)
    entry = journal.write(make_record())
    assert journal.read(entry).call.id == "a"
    with pytest.raises(Refused, match="temporary files") as gone:
        journal.read(lost)
    assert gone.value.situation is Situation.INTERNAL
    other = open_journal(tmp_path)
    assert other.adopt() == []
    journal.close()
    assert [other.read(each).call.id for each in other.adopt()] == ["a"]


def test_a_front_that_holds_the_lock_too_long_blocks_nobody_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped while it admits a job: others refuse theirs, which their clients send again."""
    monkeypatch.setattr(journals, "ADMISSION_S", 0.01)
    journal, stopped = open_journal(tmp_path), open_journal(tmp_path)
    with stopped._admission(), pytest.raises(Refused, match="cannot be kept") as refused:
        journal.write(make_record())
    assert refused.value.situation is Situation.NOT_READY
    assert journal.read(journal.write(make_record())).call.id == "a"
