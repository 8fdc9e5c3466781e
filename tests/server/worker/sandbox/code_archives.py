"""Code archives for tests, and asking their children as the step thread does."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from model_store.archives.archive import Archive, open_archive
from model_store.names import ModelName
from server.code_messages import CodeAnswer, CodeRequest, encode_fields
from server.worker.sandbox.child_process import ChildEnded, ChildProcess, Outcome
from server.worker.sandbox.code_host import CodeHost
from tests.archives import make_mar_manifest, make_zip
from tests.patience import PATIENCE_S

NO_FIELDS = encode_fields({})  #: of a request whose head has none
ECHO = """
def handle(data, context):
    return None if data is None else [row["body"] for row in data]
"""


def pack_code(handler: str = ECHO, members: Mapping[str, str] | None = None) -> bytes:
    """A TorchServe archive of a `handler.py` and other members."""
    files = {name: text.encode() for name, text in (members or {}).items()}
    return make_zip({**make_mar_manifest("handler.py"), "handler.py": handler.encode(), **files})


def make_code_archive(handler: str = ECHO, members: Mapping[str, str] | None = None) -> Archive:
    """The same, opened."""
    return open_archive(pack_code(handler, members), "m.mar")


def start(host: CodeHost, archive: Archive, model: str = "m.mar") -> ChildProcess:
    """The child of the archive, loaded. Raises LoadError."""
    return host.prepare(ModelName(model), archive).start()


class Asker:
    """Asks a child within a running loop; `ended` says whether its end was told."""

    def __init__(self, child: ChildProcess) -> None:
        self.child, self.ended = child, asyncio.Event()
        child.attach(asyncio.get_running_loop(), self.ended.set)

    def __repr__(self) -> str:
        """For example `<Asker of <ChildProcess ...>>`."""
        return f"<Asker of {self.child!r}>"

    async def batch(self, *bodies: str | bytes, content_type: str = "text/plain", accept: str = "") -> Outcome:
        """What the child makes of a batch of these bodies."""
        done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        raw = [body.encode() if isinstance(body, str) else body for body in bodies]
        requests = [CodeRequest(str(i), content_type, accept, body) for i, body in enumerate(raw)]
        self.child.run(requests, done.set_result)
        return await asyncio.wait_for(done, PATIENCE_S)

    async def one(self, body: str | bytes = "x", content_type: str = "text/plain", accept: str = "") -> CodeAnswer:
        """The answer to one request. Raises ChildEnded."""
        outcome = await self.batch(body, content_type=content_type, accept=accept)
        if isinstance(outcome, ChildEnded):
            raise outcome
        (answer,) = outcome
        return answer

    async def close(self) -> None:
        """End the child; returns when it is gone."""
        self.child.close()
        await self.child.wait_gone()


def is_alive(pid: int) -> bool:
    """Whether the process runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def count_open_files() -> int:
    """How many descriptors this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
