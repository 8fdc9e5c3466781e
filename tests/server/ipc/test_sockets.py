"""A listener whose socket is removed listens again, in a folder of this user alone."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from server.ipc.sockets import listen_at, make_private_folder
from tests.patience import PATIENCE_S

LOOK_S = 0.01


def run_listening(path: Path, meanwhile: Callable[[], Awaitable[None]]) -> None:
    """Listen at the path while the coroutine runs."""

    async def run() -> None:
        listening = await listen_at(asyncio.Protocol, str(path), LOOK_S)
        async with asyncio.timeout(PATIENCE_S):
            await meanwhile()
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening

    asyncio.run(run())


async def connect(path: Path) -> asyncio.StreamWriter:
    """A connection, as soon as there can be one."""
    while True:
        with suppress(OSError):
            return (await asyncio.open_unix_connection(path))[1]
        await asyncio.sleep(LOOK_S)


def test_a_removed_socket_is_made_anew(tmp_path: Path) -> None:
    """The socket or its whole folder: a connection from before stays open, and a new one finds the listener."""
    folder = tmp_path / "run"
    make_private_folder(folder)

    async def act_meanwhile() -> None:
        before = await connect(folder / "s")
        (folder / "s").unlink()
        (await connect(folder / "s")).close()
        shutil.rmtree(folder)
        (await connect(folder / "s")).close()
        assert folder.stat().st_mode & 0o777 == 0o700
        before.write(b"still there")
        await before.drain()
        assert not before.transport.is_closing()
        before.close()

    with capture_logs() as logs:
        run_listening(folder / "s", act_meanwhile)
    assert [entry["event"] for entry in logs] == ["socket_made_anew"] * 2


def test_no_socket_is_made_where_others_may_enter(tmp_path: Path) -> None:
    """Somebody has made the removed folder anew, for all: the listener waits until it is gone, and says so."""
    folder = tmp_path / "run"
    make_private_folder(folder)

    async def act_meanwhile() -> None:
        shutil.rmtree(folder)
        folder.mkdir(mode=0o755)
        while not logs:  # noqa: ASYNC110 -- logs are no event
            await asyncio.sleep(LOOK_S)
        assert list(folder.iterdir()) == []
        folder.rmdir()
        (await connect(folder / "s")).close()

    with capture_logs() as logs:
        run_listening(folder / "s", act_meanwhile)
    assert logs[0]["event"] == "socket_not_made"
    assert "not a folder of this user alone" in logs[0]["error"]


@pytest.mark.parametrize("kind", ["link", "file", "open"])
def test_a_private_folder_is_nobody_elses(tmp_path: Path, kind: str) -> None:
    """A link, a file, or a folder that others may enter is not taken for one of ours."""
    folder = tmp_path / "run"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to("elsewhere")
    elif kind == "file":
        folder.touch()
    else:
        folder.mkdir(mode=0o711)
    with pytest.raises(OSError, match=r"not a folder of this user alone|File exists"):
        make_private_folder(folder)
