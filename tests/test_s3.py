"""How the tests' S3 server is started: at ports that are its own."""

import os
import socket
import subprocess
import sys

from tests.patience import wait_until
from tests.s3 import _judge_swift

WAITS = "import sys; sys.stdin.read()"


def test_a_port_that_another_program_has_is_no_start() -> None:
    """Somebody listens there, but none of swift's servers; one that has ended for it is seen to have ended."""
    with (
        socket.create_server(("127.0.0.1", 0)) as place,
        subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE) as other,
    ):
        port, own = place.getsockname()[1], os.getpid()
        assert _judge_swift([own], [port]) == "listens"
        assert _judge_swift([other.pid], [port]) == ""
        assert _judge_swift([own, other.pid], [port]) == "listens"
        assert _judge_swift([own], [port, port + 1]) == ""
        assert other.stdin is not None
        other.stdin.close()
        wait_until(lambda: _judge_swift([own, other.pid], [port]) == "ended", "its end is seen")
