"""Idle time for a device's engine."""

from server.worker.engine.accelerator import DeviceEngine

MOST_PIECES = 10_000


def learn_all(engine: DeviceEngine) -> int:
    """Let the engine learn until there is nothing left; the number of pieces. It ends."""
    for pieces in range(MOST_PIECES):
        if not engine.learn():
            return pieces
    raise AssertionError("the engine learns for ever")
