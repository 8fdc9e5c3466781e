"""Density: the memory of a resident model in a real worker process, with Python objects and allocator overhead."""

from pathlib import Path

import pytest

from loadtest.benchmarks.scale import ScalePlan, load_crowd, serve_store, start_driver
from loadtest.fleets.fleet import Fleet, write_fleet
from server.shell.progress import follow_tasks

MOST_BYTES = 120_000  #: a model; its weights are 70 KB
CROWD = ScalePlan(many=1_500)


@pytest.mark.e2e
def test_a_model_costs_little_more_than_its_weights(tmp_path: Path) -> None:
    """1,500 models of 70 KB come to one worker in five steps: all stay, and from the first step to the last its memory
    (PSS) grows by at most 0.12 MB for each. (5,000 of them: `fleetcast-load bench scale`, in the records.)
    """
    with follow_tasks() as tasks:
        write_fleet(Fleet(CROWD.many, 0, {CROWD.family: 1.0}), str(tmp_path / "store"), tasks)
        with (
            serve_store(CROWD, tmp_path / "store", tmp_path / "run", CROWD.many, 1) as (server, *_),
            start_driver(server, CROWD.many, tasks, "crowd", 1) as drive,
        ):
            found = load_crowd(CROWD, server, drive)
    assert list(found.resident) == [300, 600, 900, 1200, 1500]
    assert found.hit_ratio == 1.0
    assert (found.memory[-1] - found.memory[0]) / 1200 <= MOST_BYTES, found.memory
    assert found.bytes_per_model > CROWD.row_bytes * 0.9, "the models' weights were not there"
