"""The bucket that asynchronous answers are written to, and their inputs read from. Runs in a front.

It is asked on a few threads of its own, so that the event loop never waits for it. It is opened, which imports boto3,
when it is first used: most servers have none.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from model_store.errors import ArchiveInvalid, ArchiveTooLarge, LoadError, ModelNotFound
from model_store.names import InvalidModelName, ModelName, parse_model_name
from model_store.stores.backend import InvalidStoreUrl
from server.errors import Refused, Situation
from server.settings import Settings

if TYPE_CHECKING:
    from model_store.stores.object_store import Source

THREADS = 8  #: requests to the bucket at a time

T = TypeVar("T")


class Bucket:
    """The bucket and prefix of `async_output`. INVARIANT: no object outside of them is read or written."""

    def __init__(self, settings: Settings) -> None:
        self.url = settings.async_output.rstrip("/")
        self._settings = settings
        self._pool = ThreadPoolExecutor(THREADS, "async-output")  # it starts its threads when they are needed
        self._opening = threading.Lock()
        self._source: Source | None = None

    def __repr__(self) -> str:
        """For example `<Bucket s3://bucket/async>`."""
        return f"<Bucket {self.url or 'none'}>"

    def find_key(self, url: str) -> ModelName:
        """The key below the prefix that a client names by its whole URL. Raises Refused."""
        base = f"{self.url}/"
        if not url.startswith(base):
            message = f"InputLocation must lie below {base} (async_output), not be {url[:200]!r}"
            raise Refused(Situation.BAD_REQUEST, message)
        return parse_key(url.removeprefix(base), "InputLocation")

    async def read(self, key: ModelName) -> bytes:
        """An object of at most `max_body_bytes`; a larger one is not read. Raises Refused."""

        def fetch(source: "Source") -> bytes:
            found = source.get(key)
            assert found is not None, "no version was given that it could still have"
            return found.data

        return await self._ask(fetch)

    async def write(self, key: ModelName, data: bytes) -> None:
        """Write an object in place of any older one. Raises Refused."""
        await self._ask(lambda source: source.put(key, bytes(data)))  # obstore takes no bytearray, as answers may be

    async def _ask(self, ask: Callable[["Source"], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: ask(self._open()))
        except InvalidStoreUrl as error:
            raise Refused(Situation.STORE_FAILED, f"async_output cannot be opened: {error}") from error
        except ModelNotFound as error:
            raise Refused(Situation.BAD_REQUEST, f"InputLocation: {error.public}") from error
        except ArchiveTooLarge as error:
            limit = int(self._settings.max_body_bytes)
            message = f"InputLocation: the object is larger than the limit of {limit} bytes (max_body_bytes)"
            raise Refused(Situation.TOO_LARGE, message) from error
        except LoadError as error:
            situation = Situation.BAD_REQUEST if isinstance(error, ArchiveInvalid) else Situation.STORE_FAILED
            raise Refused(situation, f"async_output: {error.public}") from error

    def _open(self) -> "Source":
        """The store, opened once. Runs on one of the threads. Raises InvalidStoreUrl, StoreDenied."""
        from server.store_access import open_output_store  # noqa: PLC0415  -- boto3 and obstore, for few servers

        with self._opening:
            if self._source is None:
                self._source = open_output_store(self._settings)
            return self._source


def parse_key(raw: str, what: str) -> ModelName:
    """A key that may be read or written: the rules are those of models' names. Raises Refused."""
    try:
        return parse_model_name(raw)
    except InvalidModelName as error:
        raise Refused(Situation.BAD_REQUEST, f"{what}: {str(error).replace('the model name', 'the key')}") from error
