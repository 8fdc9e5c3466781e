"""What clients are told of models, made of what each worker says of them."""

from typing import Any

import pytest

from server.supervisor.fleet_operations import is_missing, make_known

USAGE = {
    "answers": 2, "failures": 1, "batches": 1, "answered_us": 90, "failed_us": 5, "queued_us": 30, "ran_us": 40,
    "last_ms": 7,
}  # fmt: skip


def make_row(*holders: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A row of `list_models`."""
    return {"model": "m", "pinned": False, "holders": list(holders), **more}


@pytest.mark.parametrize(
    ("row", "state", "reason"),
    [
        (make_row({"state": "loading"}, {"state": "ready", "usage": USAGE}), "ready", ""),
        (make_row({"state": "retiring", "usage": USAGE}), "unloading", ""),
        (make_row({"state": "loading"}), "loading", ""),
        (make_row({"state": "failed", "error": "no member", "reason": "invalid"}), "unavailable", "no member"),
        (make_row({"state": "ready", "usage": USAGE}, state="quarantined", reason="hangs"), "unavailable", "hangs"),
        (make_row(), "unavailable", ""),
    ],
)  # fmt: skip
def test_a_model_has_one_state(row: dict[str, Any], state: str, reason: str) -> None:
    """Ready where one worker has it; else the best that is known, with the reason where it is not available."""
    known = make_known(row)
    assert (known.model, known.state, known.reason) == ("m", state, reason)


def test_counts_of_all_workers_are_summed() -> None:
    """The last answer is the latest of them."""
    known = make_known(
        make_row({"state": "ready", "usage": USAGE}, {"state": "ready", "usage": {**USAGE, "last_ms": 9}})
    )
    usage = known.usage
    assert (usage.answers, usage.failures, usage.batches, usage.ran_us, usage.last_ms) == (4, 2, 2, 80, 9)


def test_a_name_without_an_archive_is_no_model() -> None:
    """A client has asked for it, which workers remember; a pinned name is one that the operator means."""
    failed = {"state": "failed", "error": "no", "reason": "not_found"}
    assert is_missing(make_row(failed, failed))
    assert not is_missing(make_row(failed, {"state": "ready", "usage": USAGE}))
    assert not is_missing(make_row())
