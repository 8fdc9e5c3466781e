"""Uvicorn as every listener of ours runs it. In fronts and in the supervisor."""

import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn


class Listener(uvicorn.Server):
    """A uvicorn server that leaves signals alone: the supervisor decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def listener(app: Any, grace_s: float) -> Listener:
    """Uvicorn as we run it everywhere: uvloop, httptools, no access log, bounded farewell."""
    config = uvicorn.Config(
        app,
        loop="none",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_level="warning",
        server_header=False,
        date_header=True,
        timeout_graceful_shutdown=max(1, int(grace_s)),
        backlog=2048,
    )
    return Listener(config)
