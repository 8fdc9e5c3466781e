"""What `/ready` says: a silent loop, stuck loads, a failing store and a worker that is down are told apart."""

from pathlib import Path

import msgspec

from server.ipc.pulse import LoadSigns, Pulse, PulseReader
from server.ipc.readiness import describe_workers


def test_states_are_told_apart(tmp_path: Path) -> None:
    """One worker each; only the first two count as ready, one of them with a store that fails."""
    signs = [LoadSigns(4.9, 0.0), LoadSigns(0.0, 12.0), LoadSigns(5.1, 3.0), LoadSigns(0.0, 0.0)]
    pulses = []
    for number, each in enumerate(signs):
        Pulse(path := str(tmp_path / str(number))).beat(each)
        pulses.append(PulseReader(path))
        pulses[-1].observe(0.0)
    for tick in range(4):
        pulses[3].observe(tick * 0.5)
    found = describe_workers(dict(enumerate(pulses)), 5, 5.0)
    assert msgspec.to_builtins(found) == {
        "ready": True,
        "workers": 2,
        "states": [
            {"worker": 0, "state": "ready"},
            {"worker": 1, "state": "ready", "store_failing_s": 12.0},
            {"worker": 2, "state": "loads_stuck", "for_s": 5.1, "store_failing_s": 3.0},
            {"worker": 3, "state": "silent", "for_s": 1.5},
            {"worker": 4, "state": "down"},
        ],
    }
    assert found.status == 200
    assert (found.states[3].for_s, found.states[1].store_failing_s) == (1.5, 12.0)


def test_without_a_ready_worker_the_server_is_not(tmp_path: Path) -> None:
    """Stuck loads alone make it 503, as no worker at all does."""
    Pulse(path := str(tmp_path / "0")).beat(LoadSigns(9.0, 0.0))
    assert describe_workers({0: PulseReader(path)}, 1, 5.0).status == 503
    assert describe_workers({}, 1, 5.0).status == 503
