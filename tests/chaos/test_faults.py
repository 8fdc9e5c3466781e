"""The schedule of faults, and a short run of the whole: each part is broken once, and nothing is wrong or lost."""

from itertools import islice
from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS, make_schedule
from tests.chaos.run import run_chaos
from tests.s3 import S3Server

SMOKE = ("kill-worker", "kill-front", "store-wrong", "rollback", "disk-replaced", "clock-back")


def test_a_schedule_is_its_seed_s_and_has_each_fault_once_before_any_pair() -> None:
    """Equal seeds give equal steps; pairs break two different parts."""
    faults = list(FAULTS.values())
    first = list(islice(make_schedule(1, faults), 200))
    assert first == list(islice(make_schedule(1, faults), 200))
    assert first != list(islice(make_schedule(2, faults), 200))
    assert sorted(step[0].name for step in first[: len(faults)]) == sorted(FAULTS)
    assert {len(step) for step in first[: len(faults)]} == {1}
    pairs = [step for step in first if len(step) == 2]
    assert pairs
    assert all(one.part != other.part for one, other in pairs)


@pytest.mark.e2e
def test_a_short_run_loses_nothing_and_answers_nothing_wrong(s3: S3Server, tmp_path: Path) -> None:
    """One fault of each part under load with evictions. How soon it recovers is not judged: the machine may be busy."""
    report, notes, problems = run_chaos(s3, tmp_path, 1, 0.0, [FAULTS[name] for name in SMOKE], 0.5, len(SMOKE))
    assert not problems, notes
    assert not report.violations(None), report.examples
    assert {name for row in report.rows for name in row.faults} == set(SMOKE)
    assert report.counts["repelled"] > 0
