"""Code archives in a whole step loop, with real children: who waits for whom, and what becomes of late requests."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from model_store.cache.cache import Cache
from model_store.names import ModelName
from server.errors import Refused, Situation
from server.ipc.frames import Request
from server.metrics import WorkerMetrics
from server.worker import code_batches
from server.worker.engine.cpu import Engine
from server.worker.engine.memory_pool import Pool
from server.worker.host_cache import HostCache
from server.worker.model_loader import LoadedModel, LoadSteps, StartCode
from server.worker.sandbox.child_process import ChildProcess
from server.worker.sandbox.code_host import CodeHost
from server.worker.scheduler import Job, Scheduler
from server.worker.step_loop import StepLoop
from tests.patience import PATIENCE_S
from tests.server.worker.long_jobs import make_unsliced_jobs
from tests.server.worker.sandbox.code_archives import is_alive, make_code_archive
from tests.server.worker.sandbox.conftest import run_host
from tests.server.worker.test_step_loop import SLAB, FakeLoader, Front, let_loop_run

pytestmark = pytest.mark.slow

SLEEPER = """
import time
def handle(data, context):
    if data is None:
        return None
    time.sleep(float(data[0]["body"]))
    return [len(data)] * len(data)
"""


#: Says its pid; `wait`: when its folder has a file `go`; `die`: it ends.
WAITER = """
import os, time
def handle(data, context):
    if data is None:
        return None
    for row in data:
        if row["body"] == "die":
            os._exit(1)
        while row["body"] == "wait" and not os.path.exists(os.path.join(os.environ["HOME"], "go")):
            time.sleep(0.005)
    return [os.getpid()] * len(data)
"""

SPLITTER = """
def handle(data, context):
    if data is None:
        return None
    for i, row in enumerate(data):
        context.set_response_content_type(i, "text/a\\r\\nX-Evil: 1" if row["body"] == "1" else "text/\\u20ac")
    return ["x"] * len(data)
"""


class CodeLoader(FakeLoader):
    """As `FakeLoader`; names that begin with `code` are archives of this handler, of 3 slabs a process."""

    def __init__(self, host: CodeHost, handler: str) -> None:
        super().__init__()
        self._host, self._handler = host, handler

    def load(self, model: ModelName, *, revalidate: bool = False, stale: bool = False) -> LoadSteps:
        """In the code lane."""
        if not model.startswith("code"):
            return (yield from super().load(model, revalidate=revalidate, stale=stale))
        prepared = self._host.prepare(model, make_code_archive(self._handler))
        yield StartCode()
        child = prepared.start()
        child.charge = 3 * SLAB
        return LoadedModel(model, f"v{self.versions.get(model, 1)}", "store", 0.0, child, None, None)


@dataclass
class CodeFront:
    """Asks code archives, and keeps what they are answered."""

    steps: StepLoop
    answers: dict[int, bytes] = field(default_factory=dict)
    refusals: dict[int, Refused] = field(default_factory=dict)

    def ask(self, ident: int, model: str, what: float | str, *, deadline_s: float = 60.0) -> Job:
        """One request; a number says for how many seconds the handler sleeps."""
        body = str(what).encode()
        deadline = time.monotonic_ns() + int(deadline_s * 1e9)
        return self.steps.submit(Request(ident, deadline, model, "text/plain", "", len(body), body), self)

    def answer_part(self, job: Job, content_type: str, body: bytes, head: bytes) -> bool:
        """No model here answers in parts."""
        raise AssertionError((job, content_type, body, head))

    def answer(
        self, job: Job, content_type: str, body: bytes, *, queue_s: float, inference_s: float, head: bytes = b""
    ) -> None:
        """Once for a job."""
        assert (content_type, job.request.id in self.refusals) == ("application/json", False)
        assert queue_s >= 0 <= inference_s
        self.answers[job.request.id] = body

    def refuse(self, job: Job, refused: Refused) -> None:
        """Once for a job."""
        assert job.request.id not in self.answers
        self.refusals[job.request.id] = refused


Scenario = Callable[[StepLoop, CodeFront], Coroutine[Any, Any, None]]


def play(
    host: CodeHost, scenario: Scenario, *, handler: str = "", slabs: int = 4, loader: CodeLoader | None = None
) -> None:
    """Run a scenario in a step loop of so many slabs; in the end no lease is left, and no child."""

    async def run() -> None:
        cache = Cache(slabs * SLAB, SLAB)
        steps = StepLoop(
            cache,
            Scheduler(2000, 5000),
            Engine(Pool(slabs * SLAB, torch.device("cpu")), 512),
            loader or CodeLoader(host, handler or SLEEPER),
            WorkerMetrics(0, "cpu"),
            shelf=HostCache(torch.empty(0), 60),
            long=make_unsliced_jobs(),
            batch=64,
            loader_threads=2,
            patience_s=30,
            code=host,
        )
        try:
            await scenario(steps, CodeFront(steps))
            await let_loop_run(lambda: all(slot.leases == 0 for slot in cache))
            pids = [row["pid"] for row in steps.describe() if "pid" in row]
            for slot in list(cache):
                assert await steps.unload(slot.model)
            assert not any(map(is_alive, pids))
        finally:
            steps.close()

    asyncio.run(run())


@pytest.fixture(scope="module")
def slow_host() -> Iterator[CodeHost]:
    """One whose children may wait for as long as the test does."""
    yield from run_host(PATIENCE_S)


def list_children(steps: StepLoop, model: str) -> list[ChildProcess]:
    """The processes of a model; none where it is not loaded."""
    return [
        child
        for slot, replicas in steps._residents.children.items()
        if slot.model == model
        for child in replicas.children
    ]


def let_go(child: ChildProcess) -> None:
    """Let the request that waits in this process be answered."""
    (child.folder / "go").write_text("")


def test_code_that_waits_for_memory_lets_others_go_first(slow_host: CodeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """One child is busy and cannot go; another waits for its room; a row behind that is loaded and answered."""
    monkeypatch.setattr(code_batches, "SAMPLE_S", 1e9)  # children are charged what the test says

    async def scenario(steps: StepLoop, front: CodeFront) -> None:
        rows = Front(steps)
        rows.send("a/row")  # what its family needs once is made before the clock counts
        await rows.settled()
        await steps.unload(ModelName("a/row"))
        front.ask(1, "code/busy", "wait")
        await let_loop_run(lambda: "code/busy" in {row["model"] for row in steps.describe() if row["state"] == "ready"})
        front.ask(2, "code/waits", "pid")
        await let_loop_run(lambda: len(steps._loads.built) == 1)
        rows.send("a/row")
        await rows.settled()
        assert len(rows.answers) == 2
        assert front.answers == {}
        (busy,) = list_children(steps, "code/busy")
        let_go(busy)
        await let_loop_run(lambda: len(front.answers) == 2)

    play(slow_host, scenario, handler=WAITER)


def test_a_request_is_told_its_deadline_while_the_code_runs_on(slow_host: CodeHost) -> None:
    """The child is not ended for it, and answers the next one."""

    async def scenario(steps: StepLoop, front: CodeFront) -> None:
        front.ask(1, "code/slow", "pid")
        await let_loop_run(lambda: 1 in front.answers)
        (child,) = list_children(steps, "code/slow")
        front.ask(2, "code/slow", "wait", deadline_s=2.0)
        front.ask(3, "code/slow", "pid")
        await let_loop_run(lambda: 2 in front.refusals)
        assert front.refusals[2].situation is Situation.DEADLINE
        assert 3 not in front.answers
        let_go(child)
        await let_loop_run(lambda: 3 in front.answers)
        assert [row["pid"] for row in steps.describe()] == [child.pid]

    play(slow_host, scenario, handler=WAITER)


def test_requests_of_a_child_that_dies_are_refused_and_the_next_starts_another(host: CodeHost) -> None:
    """Those that are queued behind it too: their leases end with it."""

    async def scenario(steps: StepLoop, front: CodeFront) -> None:
        front.ask(1, "code/dies", 0)
        await let_loop_run(lambda: 1 in front.answers)
        (before,) = (row["pid"] for row in steps.describe())
        front.ask(2, "code/dies", 100)
        front.ask(3, "code/dies", 0)
        await let_loop_run(lambda: front.refusals.keys() == {2, 3})  # after the host's time for a batch
        assert {refused.situation for refused in front.refusals.values()} == {Situation.MODEL_FAILED}
        assert {refused.detail.status for refused in front.refusals.values()} == {500}
        assert steps.describe() == []
        front.ask(4, "code/dies", 0)
        await let_loop_run(lambda: 4 in front.answers)
        assert [row["pid"] for row in steps.describe()] != [before]

    play(host, scenario)


def test_no_handler_writes_the_head_of_a_response(host: CodeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A content type that would end its line, or could not be encoded, fails the request."""
    monkeypatch.setitem(globals(), "SLEEPER", SPLITTER)

    async def scenario(steps: StepLoop, front: CodeFront) -> None:
        front.ask(1, "code/splits", 1)
        front.ask(2, "code/splits", 2)
        await let_loop_run(lambda: len(front.refusals) == 2)
        messages = sorted(refused.detail.message for refused in front.refusals.values())
        assert messages == [
            f"the handler's content type {shown!r} is no value of a header"
            for shown in ("text/a\r\nX-Evil: 1", "text/\u20ac")
        ]

    play(host, scenario)
