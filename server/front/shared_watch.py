"""One wait for a client's end that several may share. Runs in a front."""

import asyncio

from server.front.inference import ClientWatch


class SharedWatch:
    """A `ClientWatch` that may be waited for any number of times; the client is watched from the first of them on."""

    def __init__(self, watch: ClientWatch) -> None:
        self._watch = watch
        self._task: asyncio.Future[object] | None = None

    def __repr__(self) -> str:
        """For example `<SharedWatch, watching>`."""
        return f"<SharedWatch{', watching' if self._task is not None else ''}>"

    def __call__(self) -> asyncio.Future[object]:
        """Done once the client has left. To cancel it ends this wait alone."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._watch())
        return asyncio.shield(self._task)
