"""A folder behind as much of S3 as reading takes, each answer later by a fixed delay, however many wait for theirs.

A folder on the same disk answers in microseconds, which no object store does: whether loads wait for bytes one after
another or at the same time would not show. It runs on a thread of its own, and has no credentials to check.
"""

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

BUCKET = "models"
MODIFIED = "Mon, 30 Nov 2026 00:00:00 GMT"
EMPTY_LIST = b"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>"
#: what a client of S3 needs to ask it, beside the address
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def serve_distant(folder: Path, delay_s: float) -> Iterator[str]:
    """Serve the files of a folder as the objects of BUCKET; yields the endpoint's URL."""
    loop = asyncio.new_event_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                method, path, _ = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)
                await asyncio.sleep(delay_s)
                writer.write(make_answer(folder, method.decode(), path.decode()))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:  # also when the store ends, and the task is cancelled
            writer.close()

    server = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(tasks) if tasks else asyncio.sleep(0))
        loop.run_until_complete(asyncio.sleep(0))  # connections close in the loop's next turn
        loop.close()


def make_answer(folder: Path, method: str, path: str) -> bytes:
    """The answer to GET or HEAD of an object, or to a list, which is empty."""
    parts = urlsplit(path)
    name = unquote(parts.path).removeprefix(f"/{BUCKET}").strip("/")
    file = (folder / name).resolve()
    if not name:
        status, body, headers = "200 OK", EMPTY_LIST, ["Content-Type: application/xml"]
    elif file.is_file() and folder.resolve() in file.parents:
        body = file.read_bytes()
        status = "200 OK"
        headers = [f'ETag: "{hashlib.sha256(body).hexdigest()[:32]}"', f"Last-Modified: {MODIFIED}"]
    else:
        status, body, headers = "404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>", []
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""])
    return head.encode() + (b"" if method == "HEAD" else body)
