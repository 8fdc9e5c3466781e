"""The stages that a worker tells of a traced request: in order, none before it came, and within what a frame holds."""

from model_store.stores.load_part import LoadPart
from server.ipc.frames import MOST_STAGES, Stage
from server.worker.stage_times import StageTimes

S = 1_000_000_000


def show(stages: list[Stage]) -> list[tuple[str, int, int]]:
    """In seconds."""
    return [(stage.name, stage.began_ns // S, stage.ended_ns // S) for stage in stages]


def test_a_warm_request_waits_and_runs() -> None:
    """From the front to the answer without a gap."""
    times = StageTimes("t")
    times.note_batch(3.0, 4.0, 6.0, (12, 5))
    stages = times.list_stages(1.0, 2.0, 7.0, has_waited=False)
    assert show(stages) == [("admission", 1, 2), ("queue", 2, 3), ("decode", 3, 4), ("forward", 4, 6), ("encode", 6, 7)]
    assert stages[3].numbers == {"rows": 12, "models": 5}


def test_a_cold_request_waits_for_its_load() -> None:
    """With its parts; what follows the last one is the wait for memory, and the copy."""
    times = StageTimes("t")
    times.note_load(8.0, [LoadPart("disk", 2.0, 3.0), LoadPart("store", 3.0, 6.0), LoadPart("store.get", 3.0, 5.0, 70)])
    times.note_batch(9.0, 9.0, 10.0)
    stages = times.list_stages(1.0, 2.0, 11.0, has_waited=True)
    assert show(stages) == [
        ("admission", 1, 2), ("load", 2, 8), ("load.disk", 2, 3), ("load.store", 3, 6), ("load.store.get", 3, 5),
        ("load.place", 6, 8), ("queue", 8, 9), ("forward", 9, 10), ("encode", 10, 11),
    ]  # fmt: skip
    assert stages[4].numbers == {"bytes": 70}


def test_who_joins_a_load_sees_its_rest() -> None:
    """Parts that were over before the request came are not its own."""
    times = StageTimes("t")
    times.note_load(8.0, [LoadPart("disk", 2.0, 3.0), LoadPart("store", 3.0, 6.0)])
    stages = times.list_stages(4.0, 5.0, 9.0, has_waited=True)
    assert show(stages) == [
        ("admission", 4, 5), ("load", 5, 8), ("load.store", 5, 6), ("load.place", 6, 8), ("queue", 8, 9)
    ]  # fmt: skip


def test_failures_are_where_they_happened() -> None:
    """In a part of the load and in the load; or the load had not ended when the deadline passed."""
    times = StageTimes("t")
    times.note_load(8.0, [LoadPart("store", 3.0, 6.0, error="StoreDenied: no")], "denied")
    stages = times.list_stages(1.0, 2.0, 8.0, has_waited=True)
    assert [(stage.name, stage.error) for stage in stages if stage.error] == [
        ("load", "denied"), ("load.store", "StoreDenied: no")
    ]  # fmt: skip
    late = StageTimes("t").list_stages(1.0, 2.0, 8.0, has_waited=True)
    assert show(late) == [("admission", 1, 2), ("load", 2, 8)]
    assert late[1].error == "the load had not ended"


def test_a_long_request_has_its_waits_in_the_forward() -> None:
    """What ran in slices of its own is known in sums."""
    times = StageTimes("t")
    times.note_apart(2.0, 10.0, 1.0, 2.0)
    assert show(times.list_stages(1.0, 1.0, 10.0, has_waited=False)) == [
        ("admission", 1, 1), ("queue", 1, 2), ("decode", 2, 3), ("forward", 3, 8), ("encode", 8, 10)
    ]  # fmt: skip


def test_stages_are_bounded() -> None:
    """A frame with more would break the wire."""
    times = StageTimes("t")
    times.note_load(8.0, [LoadPart("x" * 100, 3.0, 4.0, error="e" * 9000)] * 100)
    stages = times.list_stages(1.0, 2.0, 9.0, has_waited=True)
    assert len(stages) == MOST_STAGES
    assert all(len(stage.name) <= 64 and len(stage.error) <= 512 for stage in stages)
