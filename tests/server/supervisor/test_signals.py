"""Signals to the supervisor: which of them end the server."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import server

pytestmark = pytest.mark.slow

WAIT = """
import asyncio
from server.supervisor.management_api import until_told_to_stop

async def main():
    waiting = asyncio.create_task(until_told_to_stop())
    await asyncio.sleep(0)
    print("ready", flush=True)
    await waiting
    print("drains", flush=True)

asyncio.run(main())
"""


def waiting(stdin: int) -> "subprocess.Popen[bytes]":
    """A process that waits until it is told to stop, and says so then; standard input is `stdin`."""
    folder = Path(server.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_drains(number: signal.Signals) -> None:
    """SIGTERM and SIGINT end the wait in order."""
    process = waiting(subprocess.DEVNULL)
    process.send_signal(number)
    assert process.communicate()[0] == b"drains\n"
    assert process.returncode == 0


def test_a_terminal_that_is_gone_drains() -> None:
    """SIGHUP of a server that was started from a terminal ends it in order."""
    ours, theirs = pty.openpty()
    try:
        process = waiting(theirs)
        process.send_signal(signal.SIGHUP)
        assert process.communicate()[0] == b"drains\n"
        assert process.returncode == 0
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_hangup_without_a_terminal_changes_nothing() -> None:
    """SIGHUP as a service manager sends it is logged and ignored; SIGTERM after it still drains."""
    process = waiting(subprocess.DEVNULL)
    assert process.stdout is not None
    process.send_signal(signal.SIGHUP)
    assert b"hangup_ignored" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == b"drains\n"
    assert process.returncode == 0
