"""The supervisor's child processes, fronts and workers: started, restarted when they end or hang, and ended.

Runs on the supervisor's event loop. A child is known by its kind and index; the processes that are it in turn are its
incarnations.
"""

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import structlog

import server
from server.errors import Situation
from server.host import WorkerPlan
from server.ipc.control import ChannelClosed, ControlChannel, ControlError
from server.ipc.operations import AskedByFront, AskedByWorker, Drain, Operation, Ping, Reply
from server.ipc.pulse import PulseReader
from server.supervisor.spare_worker import SpareWorker, StartedProcess

BACK_OFF_S = (0.1, 10.0)
STABLE_S = 30.0
MAX_FALSE_STARTS = 3
HEARTBEAT_S = 2.0
FRONT_SILENCE_S = 15.0  #: a front that has not answered for so long is killed
WATCH_S = 0.25  #: between two looks at the workers' pulses
SECRETS = {"FLEETCAST_ACCESS_KEYS", "FLEETCAST_TOKEN"}  #: variables that no child needs: fronts get keys by channel
EXPORTER_VARIABLES = "OTEL_EXPORTER_"  #: prefix of variables with the collector's address and keys, for fronts alone
STORE_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_")  #: prefixes of variables with the store's credentials

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class Child:
    """A front or a worker, over all its incarnations."""

    kind: Literal["front", "worker"]
    index: int
    plan: WorkerPlan | None = None  #: a worker's
    grpc: Mapping[str, str] = field(default_factory=dict)  #: where a gRPC front listens; HTTP fronts get a socket
    has_output: bool = False  #: whether a front writes answers to a bucket, for which it needs credentials
    incarnation: int = 0
    failures: int = 0
    condemned: bool = False  #: killed by us, because it was silent
    proven: bool = False  #: has been ready at least once
    rows: int | None = None  #: a worker's descriptor of `server.ipc.row_memory`, for all its incarnations
    own_deaths: int = 0  #: of a worker, without one from outside or STABLE_S of peace in between
    process: asyncio.subprocess.Process | None = None
    channel: ControlChannel | None = None
    pulse: PulseReader | None = None  #: a worker's that has been ready
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        """For example `worker-0.2`: kind, index, incarnation."""
        return f"{self.kind}-{self.index}.{self.incarnation}"

    @property
    def is_silent(self) -> bool:
        """Whether it is a worker whose step loop does not turn."""
        return self.pulse is not None and self.pulse.is_silent

    def __repr__(self) -> str:
        """For example `<worker-0.2 ready>`."""
        return f"<{self.name} {'ready' if self.ready.is_set() else 'not ready'}>"

    async def ask(self, operation: Operation[Reply], timeout_s: float) -> Reply:
        """The reply. Raises ControlError, also where the child is not up, dies meanwhile or does not answer in time."""
        if self.channel is None or not self.ready.is_set():
            raise ControlError(f"{self.kind} {self.index} is not up; try again", Situation.NOT_READY)
        try:
            return await self.channel.ask(operation, timeout_s)
        except ChannelClosed as error:
            raise ControlError(f"{self.kind} {self.index} died meanwhile; try again", Situation.WORKER_LOST) from error
        except TimeoutError as error:
            raise ControlError(f"{self.kind} {self.index} did not answer in time", Situation.DEADLINE) from error


class Parent(Protocol):
    """Answers the children, and is told what becomes of them."""

    async def answer_child(self, child: Child, operation: Any) -> object:
        """The reply to an operation of `AskedByFront` or `AskedByWorker`."""

    def note_end(self, child: Child) -> None:
        """The incarnation has ended."""

    def note_silence(self, child: Child) -> None:
        """The worker has fallen silent, or is silent no more."""

    def note_restart(self, child: Child) -> None:
        """The next incarnation will be started."""


class Children:
    """Keeps the children running. `fatal` resolves with the reason when they cannot run with these settings.

    `spare_for`: a worker for whose likes a spare is started ahead; None: there is no spare.
    """

    def __init__(
        self, children: Sequence[Child], parent: Parent, silence_s: float, *, spare_for: Child | None = None
    ) -> None:
        self.fatal: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._children, self._parent, self._silence_s = children, parent, silence_s
        self._stopping = False
        self._listen: Sequence[socket.socket] = ()
        self.spare = None if spare_for is None else SpareWorker(spare_for, self._start, self._are_workers_up)
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        """For example `<Children 2 of 3 up>`."""
        return f"<Children {sum(child.ready.is_set() for child in self._children)} of {len(self._children)} up>"

    def start(self, listen: Sequence[socket.socket]) -> None:
        """Start all; fronts of HTTP get `listen`: the inference listener's socket, and in a cluster the nodes'."""
        self._listen = listen
        self._tasks = [asyncio.create_task(self._keep(child)) for child in self._children]
        self._tasks += [asyncio.create_task(self._heartbeat()), asyncio.create_task(self._watch())]
        if self.spare is not None:
            self._tasks.append(asyncio.create_task(self.spare.keep()))

    def stop_restarting(self) -> None:
        """From now on a child that ends is not started again."""
        self._stopping = True

    async def stop(self) -> None:
        """Give up watching: the children have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.spare is not None:
            await self.spare.end()

    async def end(self, children: Sequence[Child], patience_s: float) -> None:
        """Drain fronts, let workers go; kill the ones that have not ended in time."""
        for child in children:
            if child.kind == "front" and child.ready.is_set() and child.channel is not None:
                child.channel.tell(Drain())
            elif child.channel is not None:
                child.channel.close()  # a child ends with its channel; this one has no requests to finish
            else:
                _kill_process(child)  # it has only just been started
        waits = [asyncio.create_task(child.process.wait()) for child in children if child.process is not None]
        if waits:
            await asyncio.wait(waits, timeout=max(0.0, patience_s))
        for child in children:
            if _kill_process(child) and child.process is not None:
                log.warning("killed", child=child.name, why="did not end in time")
                await child.process.wait()

    def kill(self) -> None:
        """Kill all, without waiting for their ends."""
        self._stopping = True
        for child in self._children:
            _kill_process(child)
        if self.spare is not None:
            self.spare.kill()

    def set_fatal(self, reason: str) -> None:
        """The server cannot run: the first reason counts."""
        if not self.fatal.done():
            self.fatal.set_result(reason)

    async def _keep(self, child: Child) -> None:
        """Start the child, and again whenever it ends, each time a little later while it keeps failing."""
        while not self._stopping:  # asked again after the pause: no child is started during a drain
            started = time.monotonic()
            await self._run_once(child)
            if self._stopping or self.fatal.done():
                return
            lived = time.monotonic() - started
            was_stable = lived > STABLE_S
            child.failures = 0 if was_stable else child.failures + 1
            child.own_deaths = min(child.own_deaths, 1) if was_stable else child.own_deaths
            pause = choose_pause(child.failures, lived)
            log.warning("restarting", child=child.name, in_s=round(pause, 2))
            self._parent.note_restart(child)
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 -- jitter

    async def _run_once(self, child: Child) -> None:
        """One incarnation, from spawn to its end."""
        child.incarnation += 1
        child.condemned = False
        started = None if self.spare is None or child.kind != "worker" else self.spare.claim(child)
        if started is None:
            started = await self._start(child)
        child.process, child.channel, served = started
        code = await child.process.wait()
        await served
        if not child.proven and child.incarnation >= MAX_FALSE_STARTS:
            self.set_fatal(f"{child.name} ended with code {code} before it was ready, as those before it did")
        child.ready.clear()
        self._parent.note_end(child)
        if not (self._stopping or self.fatal.done()):
            log.error("ended", child=child.name, code=code)

    async def _start(self, child: Child, claimed: "Callable[[], Awaitable[Child]] | None" = None) -> StartedProcess:
        """Start a process for the child. `claimed`: it is a spare, and this says which child it is once it is one."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await self._spawn(child, theirs, ahead=claimed is not None)

        async def answer(asked: Any) -> object:
            return await self._parent.answer_child(child if claimed is None else await claimed(), asked)

        accepted = AskedByFront if child.kind == "front" else AskedByWorker
        channel = await ControlChannel.open(ours, accepted, answer)
        return StartedProcess(process, channel, asyncio.create_task(channel.run()))

    def _are_workers_up(self) -> bool:
        return all(child.ready.is_set() for child in self._children if child.kind == "worker")

    async def _spawn(self, child: Child, control: socket.socket, *, ahead: bool) -> asyncio.subprocess.Process:
        fds = [control.fileno()]
        if child.kind == "front" and not child.grpc:
            fds += [each.fileno() for each in self._listen]
        rows_of = self._children if ahead else [child]  # a spare may become any worker
        fds += [each.rows for each in rows_of if each.rows is not None]
        module = "server.front.grpc.main" if child.grpc else f"server.{child.kind}.main"
        module = "server.worker.spare" if ahead else module
        return await asyncio.create_subprocess_exec(
            # -P: the working folder is not on the path, a user's own server/ or handlers/ there is never ours
            sys.executable, "-P", "-m", module, *map(str, fds),
            pass_fds=fds, env=child_environment(child), stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    async def _heartbeat(self) -> None:
        """Kill a front that has not answered for FRONT_SILENCE_S; `_keep` starts the next one."""
        fronts = [child for child in self._children if child.kind == "front"]
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await asyncio.gather(*map(self._check, fronts))

    async def _watch(self) -> None:
        """Kill a worker whose step loop has not turned for `silence_s`; tell when one falls silent or beats again."""
        while True:
            await asyncio.sleep(WATCH_S)
            for child in self._children:
                if child.pulse is None or child.process is None:
                    continue
                was_silent = child.is_silent
                if child.pulse.observe(time.monotonic()) >= self._silence_s:
                    self._kill(
                        child, child.process, f"its step loop was silent for {self._silence_s:g} s (worker_timeout_s)"
                    )
                if child.is_silent != was_silent:
                    log.warning("silent" if child.is_silent else "beats_again", child=child.name)
                    self._parent.note_silence(child)

    def _kill(self, child: Child, process: asyncio.subprocess.Process, why: str) -> None:
        log.error("killed", child=child.name, why=why)
        child.condemned = True
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)

    async def _check(self, child: Child) -> None:
        if not child.ready.is_set() or child.channel is None or child.process is None:
            return
        process = child.process
        try:
            await child.channel.ask(Ping(), FRONT_SILENCE_S)
        except TimeoutError:
            self._kill(child, process, f"silent for {FRONT_SILENCE_S:g} s")
        except (ControlError, ChannelClosed):
            pass  # it starts or ends; the end of its process says the rest


def _kill_process(child: Child) -> bool:
    """Kill the child's process; False where there is none any more."""
    if child.process is None or child.process.returncode is not None:
        return False
    with contextlib.suppress(ProcessLookupError):
        child.process.kill()
    return True


def child_environment(child: Child) -> dict[str, str]:
    """The child's environment: our packages importable, its GPU alone, and no secrets but the store's.

    Those are for workers, and for fronts that write asynchronous answers to a bucket.
    """
    root = str(Path(server.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {name: value for name, value in os.environ.items() if name.upper() not in SECRETS}
    if (
        child.kind != "front"
    ):  # archives' code inherits what a worker has, and a collector's key is none of its business
        env = {name: value for name, value in env.items() if not name.upper().startswith(EXPORTER_VARIABLES)}
    if child.kind == "front" and not child.has_output:
        env = {name: value for name, value in env.items() if not name.upper().startswith(STORE_VARIABLES)}
    env["PYTHONPATH"] = os.pathsep.join(paths)
    if child.plan is not None:
        env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(child.plan.threads)
        if child.plan.device != "cpu":
            env["CUDA_VISIBLE_DEVICES"] = child.plan.device.removeprefix("cuda:")
    return env


def choose_pause(failures: int, lived_s: float) -> float:
    """Seconds until a child is started again that has failed so often in a row, and lived so long this time.

    From its last start on they double. One that has lived longer is started at once: its requests wait for it.
    """
    first, longest = BACK_OFF_S
    since_start = min(longest, first * 2 ** min(failures - 1, 10)) if failures > 1 else 0.0
    return max(0.0, since_start - lived_s)
