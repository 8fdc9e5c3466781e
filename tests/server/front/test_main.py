"""A front and its connections: when it reports that it reaches the workers."""

import asyncio
from pathlib import Path

import pytest

from server.cli.setting_flags import settings_from
from server.front.app import App
from server.front.main import Front
from server.http_listener import make_listener
from server.ipc.operations import AwaitConnections, ConnectWorkers
from server.ipc.pulse import SUFFIX, Pulse
from server.metrics import FrontMetrics
from tests.patience import PATIENCE_S


def test_linked_means_that_a_request_finds_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to `AwaitConnections` waits for a worker that is named but does not listen yet; then it has a lane."""
    monkeypatch.chdir(tmp_path)

    async def scenario() -> None:
        metrics = FrontMetrics()
        app = App(settings_from({"store": str(tmp_path)}), metrics)
        front = Front(app, make_listener(app, 1.0, 1.0, 5), metrics)
        path = str(tmp_path / "0.1")
        await front.handle(ConnectWorkers({0: path}))
        linked = asyncio.ensure_future(front.handle(AwaitConnections()))
        await asyncio.sleep(0.05)
        assert not linked.done()
        assert not app.plane.router.lanes
        Pulse(path + SUFFIX)
        server = await asyncio.start_unix_server(lambda _, writer: writer.close(), path)
        async with asyncio.timeout(PATIENCE_S):
            await linked
        assert list(app.plane.router.lanes) == [0]
        await front.handle(ConnectWorkers({}))
        server.close()
        await server.wait_closed()

    asyncio.run(scenario())
