"""A replica's server: `fleetcast serve` whose settings come by a pipe, and which ends when the pipe does.

The replica starts it as `python -m server.cluster.engine_main`. The first line on standard input are the settings as
JSON, secrets too, which no other user of the host can read there. The end of standard input is the replica's: then what
runs is finished, nothing new is taken, and the host is free for the next. It imports neither ray nor torch.
"""

import asyncio
import os
import signal
import sys
import threading

import msgspec
import uvloop

from server.logs import STANDARD_ERROR, configure_logs
from server.settings import Settings
from server.supervisor.host_files import StartFailed
from server.supervisor.management_api import run_server
from server.supervisor.stop_signals import StopSignals
from server.supervisor.supervisor import LONGEST_END_S


def end_with_input() -> None:
    """Have SIGTERM sent when standard input ends: the replica has died, or wants no more of this server."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


async def main(settings: Settings) -> None:
    """From start to drained."""
    signals = StopSignals()
    told = asyncio.create_task(signals.told.wait())
    told.add_done_callback(lambda _: signals.limit(settings.drain_s + LONGEST_END_S))
    end_with_input()
    async with run_server(settings, signals):
        await told


def read_settings() -> Settings:
    """The first line of standard input, read byte by byte so that nothing behind it is lost."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return Settings.from_wire(msgspec.json.decode(line))


if __name__ == "__main__":
    given = read_settings()
    configure_logs(given.log_level, given.log_format)
    try:
        uvloop.run(main(given))
    except (StartFailed, ValueError, OSError) as error:
        STANDARD_ERROR.write(f"error: {error}")
        STANDARD_ERROR.flush()
        sys.exit(1)
