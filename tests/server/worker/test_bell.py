"""A bell for the loop: no ring is lost, however threads and answers meet, and none reaches a closed descriptor."""

import asyncio
import os
import threading
from collections import deque

from server.worker.bell import Bell
from tests.patience import PATIENCE_S

THREADS, RINGS = 8, 500


def test_what_was_done_before_a_ring_is_seen_by_an_answer() -> None:
    """Many threads hand things over and ring; the answers take all of them. There are no more answers than rings."""

    async def scenario() -> None:
        given, taken, answers = deque[int](), list[int](), list[int]()
        has_all = asyncio.Event()

        def answer() -> None:
            answers.append(len(given))
            while given:
                taken.append(given.popleft())
            if len(taken) == THREADS * RINGS:
                has_all.set()

        bell = Bell(answer)

        def hand_over(start: int) -> None:
            for i in range(RINGS):
                given.append(start + i)
                bell.ring()

        threads = [threading.Thread(target=hand_over, args=(at * RINGS,)) for at in range(THREADS)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(has_all.wait(), PATIENCE_S)
        for thread in threads:
            thread.join()
        assert sorted(taken) == list(range(THREADS * RINGS))
        assert len(answers) <= THREADS * RINGS
        assert repr(bell) in ("<Bell silent>", "<Bell rung>")
        bell.close()

    asyncio.run(scenario())


def test_rings_before_an_answer_are_one() -> None:
    """The loop is busy meanwhile."""

    async def scenario() -> None:
        answers, answered = list[None](), asyncio.Event()

        def answer() -> None:
            answers.append(None)
            answered.set()

        bell = Bell(answer)
        for _ in range(5):
            bell.ring()
        assert repr(bell) == "<Bell rung>"
        await asyncio.wait_for(answered.wait(), PATIENCE_S)
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(answers) == 1
        bell.close()

    asyncio.run(scenario())


def test_a_closed_bell_writes_to_no_other_file() -> None:
    """Its descriptor's number is given to the next file that is opened."""

    async def scenario() -> None:
        bell = Bell(lambda: None)
        descriptor = bell._descriptor
        bell.close()
        bell.close()
        other = os.eventfd(0, os.EFD_NONBLOCK)
        try:
            assert other == descriptor, "the test would prove nothing"
            bell.ring()
            assert repr(bell) == "<Bell closed>"
            try:
                written = os.eventfd_read(other)
            except BlockingIOError:
                written = 0
            assert written == 0
        finally:
            os.close(other)

    asyncio.run(scenario())
