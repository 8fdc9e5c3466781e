"""Servers of Python's own library beside a test: they answer on a thread, and are gone with the block."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer

POLL_S = 0.02  #: how late a server may notice that it is to end


@contextmanager
def serve_on_thread(server: HTTPServer) -> Iterator[str]:
    """Serve until the end of the block, and close it then. Its host and port."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(POLL_S,), daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
