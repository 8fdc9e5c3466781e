"""A front process: uvicorn on the shared inference socket, links to the workers the supervisor names.

Started by the supervisor as `python -m server.front.main CONTROL_FD LISTEN_FD`. No torch, no bodies parsed.
"""

import asyncio
import os
import socket
import sys
from typing import Any

import structlog
import uvloop

from server.errors import Situation
from server.front.app import App
from server.front.worker_client import Link, connect
from server.http_listener import Listener, listener
from server.ipc.control import ControlError, Member
from server.logs import configure_logs
from server.metrics import FrontMetrics
from server.settings import Settings

SWEEP_S = 0.1
RECONNECT_S = 0.1

log = structlog.get_logger()


class Front:
    """The links follow the supervisor's list of workers; the app sees only those that are connected."""

    def __init__(self, app: App, server: Listener, metrics: FrontMetrics) -> None:
        self._app, self._server, self._metrics = app, server, metrics
        self._wanted: dict[int, str] = {}  # worker -> socket path, which is new for each incarnation
        self._linked: dict[int, str] = {}
        self._connecting: dict[int, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        """For example `<Front 2 of 3 workers linked>`."""
        return f"<Front {len(self._linked)} of {len(self._wanted)} workers linked>"

    async def handle(self, op: str, args: dict[str, Any]) -> Any:
        """What the supervisor tells and asks."""
        if op == "workers":
            self._follow({int(index): path for index, path in args["sockets"].items()})
            return None
        if op == "linked":
            await asyncio.gather(*self._connecting.values(), return_exceptions=True)
            return None
        if op == "metrics":
            return self._metrics.text()
        if op == "ping":
            return repr(self)
        if op == "drain":
            self._server.should_exit = True
            return None
        raise ControlError(f"a front knows no operation {op!r}", Situation.INTERNAL)

    async def sweep(self) -> None:
        """Deadlines, for as long as the front lives."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self._app.calls.sweep()

    def _follow(self, wanted: dict[int, str]) -> None:
        self._wanted = wanted
        for worker, path in list(self._linked.items()):
            if wanted.get(worker) != path:
                self._app.calls.links[worker].close()
        for worker in wanted:
            task = self._connecting.get(worker)
            if worker not in self._linked and (task is None or task.done()):
                self._connecting[worker] = asyncio.create_task(self._connect(worker))

    async def _connect(self, worker: int) -> None:
        """Try until connected or no longer wanted."""
        while (path := self._wanted.get(worker)) is not None and worker not in self._linked:
            try:
                link = await connect(path, worker, self._lost)
            except OSError:
                await asyncio.sleep(RECONNECT_S)
                continue
            self._linked[worker] = path
            self._app.calls.links[worker] = link
            self._app.calls.router.up(worker)

    def _lost(self, link: Link) -> None:
        """Known here first: the socket closes with the process. The supervisor's word follows."""
        if self._app.calls.links.get(link.worker) is link:
            del self._app.calls.links[link.worker], self._linked[link.worker]
            self._app.calls.router.down(link.worker)
            if link.worker in self._wanted:
                self._connecting[link.worker] = asyncio.create_task(self._connect(link.worker))


async def main(control_fd: int, listen_fd: int) -> None:
    """Ask the supervisor for the settings, serve until told to stop or the supervisor is gone."""
    member = Member()
    hello = await member.join(control_fd)
    if hello is None:
        return
    settings = Settings.from_wire(hello["settings"])
    configure_logs(settings.log_level, settings.log_format, front=hello["index"])
    os.sched_setaffinity(0, hello["cores"])
    metrics = FrontMetrics()
    app = App(settings, metrics)
    server = listener(app, settings.drain_s, settings.client_timeout_s, settings.keep_alive_s)
    front = Front(app, server, metrics)
    sweeper = asyncio.create_task(front.sweep())
    serving = asyncio.create_task(server.serve(sockets=[socket.socket(fileno=listen_fd)]))
    member.ready(front.handle)
    await asyncio.wait([serving, member.released], return_when=asyncio.FIRST_COMPLETED)
    sweeper.cancel()
    if not serving.done():
        server.should_exit = True
        await serving


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
