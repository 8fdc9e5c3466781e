"""Long work gives the loop its turns."""

import asyncio
from itertools import pairwise

from server.front.slices import SLICE, UNIT, Pacer, Slices, finish_slices, join_parts
from tests.server.front.counted import count_work


def test_others_run_after_each_slice() -> None:
    """Between two turns of another task lies one slice of work, and the unit by which it ended late."""

    async def scenario() -> list[int]:
        done, turns = [0], [0]

        def run_slices() -> Slices[str]:
            for _ in range(100):
                done[0] += UNIT
                yield UNIT
            return "value"

        async def count_others() -> None:
            while True:
                turns.append(done[0])
                await asyncio.sleep(0)

        other = asyncio.ensure_future(count_others())
        assert await Pacer().run(run_slices()) == "value"
        other.cancel()
        return [after - before for before, after in pairwise(turns)]

    spans = asyncio.run(scenario())
    assert sum(spans) >= 90 * UNIT
    assert max(spans) < SLICE + UNIT


def test_work_adds_up_over_calls() -> None:
    """Ten thousand small things are as much work as a few large ones."""

    async def scenario() -> int:
        pacer, turns = Pacer(), [0]

        async def count_others() -> None:
            while True:
                turns[0] += 1
                await asyncio.sleep(0)

        other = asyncio.ensure_future(count_others())
        for _ in range(1000):
            await pacer.spend(SLICE // 10)
        other.cancel()
        return turns[0]

    assert asyncio.run(scenario()) >= 90


def test_parts_are_joined() -> None:
    """Small ones and large ones, in order; no step copies more than two units."""
    parts: list[bytes | memoryview] = [b"a", memoryview(b"b" * (3 * UNIT + 7)), b"", b"c" * UNIT, *[b"d"] * 5000]
    joined, works = count_work(join_parts(parts))
    assert joined == b"".join(map(bytes, parts))
    assert max(works) <= 2 * UNIT
    assert finish_slices(join_parts([])) == b""
