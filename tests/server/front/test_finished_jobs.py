"""Answers that wait for their clients: whose they are, how long, and how many."""

import asyncio
import os
import stat
from pathlib import Path

import pytest

from server.errors import Refused, Situation
from server.front.finished_jobs import FinishedJobs


def keep(jobs: FinishedJobs, answer: bytes, client: str = "desk") -> str:
    """Keep one answer; its number."""
    return asyncio.run(jobs.keep(client, answer))


def test_only_its_client_has_an_answer(tmp_path: Path) -> None:
    """By its number, from every front, until it is dropped; files are this user's alone."""
    folder = tmp_path / "jobs"
    jobs, other = FinishedJobs(folder), FinishedJobs(folder)
    number = keep(jobs, b"one")
    assert asyncio.run(other.read("desk", number)) == b"one"
    assert asyncio.run(other.read("guest", number)) is None
    assert asyncio.run(other.read("desk", "../" * 7 + "a")) is None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [number not in each.name for each in folder.iterdir()] == [True]
    assert not asyncio.run(other.drop("guest", number))
    assert asyncio.run(other.drop("desk", number))
    assert asyncio.run(jobs.read("desk", number)) is None


def test_room_and_time_are_bounded(tmp_path: Path) -> None:
    """A full folder refuses with the time to come back; what is too old is not read, and makes room."""
    jobs = FinishedJobs(tmp_path, most_bytes=100, most_jobs=3, keep_s=60)
    numbers = [keep(jobs, bytes(30)) for _ in range(2)]
    for answer in (bytes(41), None):
        if answer is None:
            keep(jobs, b"third")
        with pytest.raises(Refused, match="take all the room") as caught:
            keep(jobs, answer or b"fourth")
        assert (caught.value.situation, caught.value.detail.retry_ms) == (Situation.OVERLOADED, 10_000)
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    assert asyncio.run(jobs.read("desk", numbers[0])) is None
    assert asyncio.run(jobs.read("desk", keep(jobs, bytes(90)))) == bytes(90)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_listener_without_a_folder_keeps_none() -> None:
    """It says so."""
    jobs = FinishedJobs(None)
    with pytest.raises(Refused, match="keeps no jobs"):
        keep(jobs, b"one")
    assert asyncio.run(jobs.read("desk", "A" * 22)) is None
