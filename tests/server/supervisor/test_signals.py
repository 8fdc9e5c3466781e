"""Signals to the supervisor: which of them end the server."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import server
from server.supervisor.stop_signals import REPEAT_S
from tests.patience import wait_until

pytestmark = pytest.mark.slow

WAIT = """
import asyncio
import sys
from server.supervisor.stop_signals import StopSignals

async def main():
    signals = StopSignals()
    signals.call_at_once(lambda: print("cleans up", flush=True))
    print("ready", flush=True)
    await signals.told.wait()
    print("drains", flush=True)
    if "forever" in sys.argv:
        signals.limit(float(sys.argv[2]))
        await asyncio.Event().wait()

asyncio.run(main())
"""


def start_waiting(stdin: int, *arguments: str) -> "subprocess.Popen[bytes]":
    """A process that waits until it is told to stop, and says so then; standard input is `stdin`.

    With the arguments `forever` and a number it then drains until something ends it, at most for so many seconds.
    """
    folder = Path(server.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_drains(number: signal.Signals) -> None:
    """SIGTERM and SIGINT end the wait in order."""
    process = start_waiting(subprocess.DEVNULL)
    process.send_signal(number)
    assert process.communicate()[0] == b"drains\n"
    assert process.returncode == 0


def test_a_terminal_that_is_gone_drains() -> None:
    """SIGHUP of a server that was started from a terminal ends it in order."""
    ours, theirs = pty.openpty()
    try:
        process = start_waiting(theirs)
        process.send_signal(signal.SIGHUP)
        assert process.communicate()[0] == b"drains\n"
        assert process.returncode == 0
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_hangup_without_a_terminal_changes_nothing() -> None:
    """SIGHUP as a service manager sends it is logged and ignored; SIGTERM after it still drains."""
    process = start_waiting(subprocess.DEVNULL)
    assert process.stdout is not None
    process.send_signal(signal.SIGHUP)
    assert b"hangup_ignored" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == b"drains\n"
    assert process.returncode == 0


def test_the_next_signal_ends_the_drain_at_once() -> None:
    """What is to be cleaned up is, and the exit code names the signal. One that comes twice at once is one."""
    process = start_waiting(subprocess.DEVNULL, "forever", "1e6")
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == b"drains\n"
    assert is_deaf_for_a_moment(process)
    wait_until(lambda: is_gone(process, signal.SIGINT), "it ends")
    said = process.communicate()[0]
    assert b"SIGINT came while the server drained" in said
    assert b"cleans up\n" in said
    assert process.returncode == 128 + signal.SIGINT


def is_gone(process: "subprocess.Popen[bytes]", number: signal.Signals) -> bool:
    """Whether the process has ended; else it gets the signal, once more."""
    if process.poll() is None:
        process.send_signal(number)
        return False
    return True


def is_deaf_for_a_moment(process: "subprocess.Popen[bytes]") -> bool:
    """Whether the process is still there after the time that it takes to end."""
    try:
        process.wait(REPEAT_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def test_a_drain_that_does_not_end_is_ended() -> None:
    """However it hangs: after its limit the process cleans up, says so and is gone."""
    process = start_waiting(subprocess.DEVNULL, "forever", "0.3")
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert b"it has not ended within 0.3 s" in said
    assert b"cleans up\n" in said
    assert process.returncode == 1
