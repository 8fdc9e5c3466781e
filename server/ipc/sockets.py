"""Where a server's Unix sockets lie: a folder of this user alone, and what to do when somebody has removed it."""

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path

import structlog

LOOK_S = 1.0  #: how often a listener looks whether its socket is still there

log = structlog.get_logger()


def make_private_folder(folder: Path) -> None:
    """Make the folder, or check the one that is there. Raises OSError for one that others own or may enter."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise OSError(f"{folder} is not a folder of this user alone: remove it, the server makes it anew")


async def listen_at(
    make: Callable[[], asyncio.Protocol],
    path: str,
    look_s: float = LOOK_S,
    *,
    made_anew: Callable[[], None] = lambda: None,
) -> asyncio.Task[None]:
    """Listen on a Unix socket until the task is cancelled. Raises OSError.

    A cleaner of old files may remove the socket or its folder. Connections outlive that, but a new front would find
    nobody, so the socket is made anew; `made_anew` then makes what else lay in the folder.
    """
    server = await asyncio.get_running_loop().create_unix_server(make, path)
    return asyncio.create_task(_keep_listening(server, make, path, look_s, made_anew))


async def _keep_listening(
    server: asyncio.AbstractServer,
    make: Callable[[], asyncio.Protocol],
    path: str,
    look_s: float,
    made_anew: Callable[[], None],
) -> None:
    try:
        while True:
            await asyncio.sleep(look_s)
            if os.path.lexists(path):  # noqa: ASYNC240 -- of a local folder
                continue
            server.close()
            try:
                make_private_folder(Path(path).parent)
                server = await asyncio.get_running_loop().create_unix_server(make, path)
                made_anew()
            except OSError as error:
                log.warning("socket_not_made", socket=path, error=str(error))
            else:
                log.warning("socket_made_anew", socket=path, why="it had been removed")
    finally:
        server.close()
