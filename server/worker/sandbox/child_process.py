"""One child as the worker sees it: loaded on a thread of the code lane, then owned by the step thread.

Nothing here waits for a child but `wait_loaded`. The kernel tells its end by a pidfd.
"""

import asyncio
import contextlib
import os
import select
import signal
import socket
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import structlog

from model_store.errors import CodeFailed, CodeNoMemory
from model_store.names import ModelName
from server.code_messages import (
    ENDED,
    MAX_ANSWER_BYTES,
    MAX_PARTS,
    RECEIVE_BYTES,
    BatchAnswered,
    ChildMessages,
    CodeAnswer,
    CodeRequest,
    FromChild,
    HandlerLoaded,
    LoadFailed,
    Measure,
    PartAnswered,
    ProtocolError,
    RunBatch,
    frame,
)
from server.worker.sandbox.child_output import ChildOutput
from server.worker.sandbox.memory_use import measure_memory

SHOW_AND_END = signal.SIGXCPU  #: at which a child says where its code is, and ends, as where a limit sends it
SHOW_S = 0.2  #: that it has for it
TICK_S = 0.1  #: how often a loading child's output is looked at again after it has had its share

log = structlog.get_logger()


class ChildEnded(Exception):
    """The child has ended; the message says why, as far as that is known."""


Outcome = Sequence[CodeAnswer] | ChildEnded


class ChildProcess:
    """See the module. `release` is called with the pidfd once the process is killed, from any thread.

    INVARIANT: the process is killed when this object is closed or collected.
    """

    family_key = None

    def __init__(
        self,
        model: ModelName,
        pid: int,
        pidfd: int,
        channel: socket.socket,
        output: int,
        folder: Path,
        *,
        timeout_s: float,
        release: "Callable[[int], Future[None]]",
    ) -> None:
        self.pid, self.folder, self.loaded = pid, folder, HandlerLoaded()
        self.charge = 0  #: bytes as measured last
        self.ended = ""  #: why it has ended; empty while it lives
        self.load_s = 0.0  #: from its fork until its handler was loaded
        self.measures: list[Measure] = []  #: what its handler has measured until the last answer
        self._forked, self._late = time.monotonic(), ""
        self._model, self._pidfd, self._channel, self._timeout_s = model, pidfd, channel, timeout_s
        self._output, self._messages = ChildOutput(model, output), ChildMessages()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_end: Callable[[], None] = _ignore
        self._done: Callable[[Outcome], None] | None = None
        self._note_lost: Callable[[str], None] | None = None  # told why a lent child has ended
        self._take_part: Callable[[int, CodeAnswer], None] = _ignore_part
        self._parts, self._part_bytes = 0, 0  # of the batch under way
        self._timer: asyncio.TimerHandle | None = None
        self._batch, self._unsent = 0, memoryview(b"")
        self._gone: Future[None] | None = None
        channel.setblocking(False)
        os.set_blocking(output, False)
        self._finalizer = weakref.finalize(self, _release, pidfd, channel, self._output, release)
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        """For example `<ChildProcess 4711 of au/NSW1.mar>`."""
        return f"<ChildProcess {self.pid} of {self._model}{f', ended: {self.ended}' if self.ended else ''}>"

    @property
    def is_busy(self) -> bool:
        """Whether it answers a batch now, or is lent to a front."""
        return self._done is not None or self._note_lost is not None

    @property
    def timeout_s(self) -> float:
        """What a batch may take."""
        return self._timeout_s

    @property
    def is_gone(self) -> bool:
        """Whether it was closed, and nothing of it is left."""
        return self._gone is not None and self._gone.done()

    def charge_bytes(self, row: object) -> int:
        """Bytes that it takes in the cache's budget; it has no row."""
        assert row is None, "a process has no row"
        return self.charge

    # --- loading, on a thread of the code lane ----------------------------------------------------------------------

    def wait_loaded(self) -> None:
        """Wait until the handler is loaded. Raises CodeFailed."""
        deadline, reads = time.monotonic() + self._timeout_s, True
        while (left := deadline - time.monotonic()) > 0:
            poll = select.poll()
            for descriptor in (self._channel.fileno(), self._pidfd, *([self._output.descriptor] if reads else ())):
                poll.register(descriptor, select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll(min(left, TICK_S) * 1e3)}
            reads = not self._output.ended and self._output.read(time.monotonic())
            if ready & {self._channel.fileno(), self._pidfd} and self._take_loaded():
                self.load_s = time.monotonic() - self._forked
                self.charge = measure_memory(self.pid)
                return
            if self._pidfd in ready:  # what it has started may hold the channel open
                raise CodeFailed(f"{self._model}: its code could not be loaded: {ENDED}")
        self._show_where()
        raise CodeFailed(
            f"{self._model}: its code was not loaded within {self._timeout_s:g} s (code_timeout_s); the server's log "
            "says where it was (code_said)"
        )

    def _show_where(self) -> None:
        """Have a child that is to be ended say where its code is, and wait for that for a moment."""
        _send_signal(self._pidfd, SHOW_AND_END)
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.poll(SHOW_S * 1e3)
        self._output.read_last()

    def _take_loaded(self) -> bool:
        """Whether the child says that it has loaded its handler. Raises CodeFailed."""
        try:
            messages = self._receive()
        except (ProtocolError, OSError) as error:
            raise CodeFailed(f"{self._model}: its code could not be loaded: {error}") from error
        for message in messages:
            if isinstance(message, LoadFailed):
                failed = CodeNoMemory if message.no_memory else CodeFailed
                raise failed(f"{self._model}: its code could not be loaded: {message.message}")
            if not isinstance(message, HandlerLoaded) or len(messages) > 1:
                raise CodeFailed(f"{self._model}: its code could not be loaded: it answered before it was asked")
            self.loaded = message
        return bool(messages)

    def _receive(self) -> list[FromChild]:
        """The messages that are complete now. Raises ProtocolError, also when the child has closed the channel."""
        try:
            data = self._channel.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise ProtocolError(ENDED)
        return list(self._messages.feed(data))

    # --- batches, on the step thread --------------------------------------------------------------------------------

    def attach(self, loop: asyncio.AbstractEventLoop, on_end: Callable[[], None]) -> None:
        """Watch the child from now on; `on_end` is called once if it ends before it is closed."""
        self._loop, self._on_end = loop, on_end
        loop.add_reader(self._channel.fileno(), self._read_channel)
        loop.add_reader(self._pidfd, self._note_end)
        self._watch_output()

    def run(
        self,
        requests: Sequence[CodeRequest],
        done: Callable[[Outcome], None],
        take_part: "Callable[[int, CodeAnswer], None] | None" = None,
    ) -> None:
        """Have the child answer these, and call `done`. INVARIANT: one batch at a time, and `done` once.

        `take_part` gets parts of answers before that, with the index of the request.
        """
        assert self._done is None, "a child answers one batch at a time"
        assert self._loop is not None, "a child is watched before it is asked"
        if self.ended:
            done(ChildEnded(self.ended))
            return
        self._done, self._batch = done, len(requests)
        self._take_part, self._parts, self._part_bytes = take_part or _ignore_part, 0, 0
        self._timer = self._loop.call_later(self._timeout_s, self.tell_late)
        self._unsent = memoryview(frame(RunBatch(list(requests))))
        self._send()

    def lend(self, note_lost: Callable[[str], None]) -> socket.socket:
        """Leave the channel, on which nothing is under way, to who gets a copy of it, until `take_back`.

        INVARIANT: a channel has one owner. `note_lost` is told why, should the child end meanwhile.
        """
        assert self._loop is not None, "a child is watched before it is lent"
        assert not self.is_busy, "an idle child is lent"
        assert not self.ended, "a living child is lent"
        self._note_lost = note_lost
        self._loop.remove_reader(self._channel.fileno())
        return self._channel

    def take_back(self) -> None:
        """The channel is this object's again, and nothing is under way on it. No-op where the child has ended."""
        self._note_lost = None
        if self._loop is not None and not self.ended:
            self._loop.add_reader(self._channel.fileno(), self._read_channel)

    def tell_late(self) -> None:
        """End it: a batch has taken too long. Before that it says where its code is."""
        if self.ended or self._late:
            return
        assert self._loop is not None, "a child is watched before it is asked"
        self._late = f"it took longer than {self._timeout_s:g} s for a batch (code_timeout_s)"
        _send_signal(self._pidfd, SHOW_AND_END)
        self._loop.call_later(SHOW_S, self.end, self._late)

    def end(self, why: str) -> None:
        """Kill the child, and tell whoever waits for it why. No-op if it has ended.

        Of one that was told that it is late this is why, however it ends.
        """
        if self.ended:
            return
        self.ended = why = self._late or why
        log.warning("code_ended", model=self._model, pid=self.pid, why=why)
        self._stop_watching()
        self._output.read_last()
        _kill(self._pidfd)
        self._finish(ChildEnded(why))
        note_lost, self._note_lost = self._note_lost, None
        if note_lost is not None:
            note_lost(why)
        self._on_end()

    def close(self) -> None:
        """Kill the child; nobody is told. Its folder is removed."""
        if not self.ended:
            self.ended = "it was unloaded"
            self._stop_watching()
            self._finish(ChildEnded(self.ended))
        if self._gone is None:
            self._gone = self._finalizer()

    async def wait_gone(self) -> None:
        """Wait until a closed child and its folder are gone."""
        if self._gone is not None:
            await asyncio.wrap_future(self._gone)

    def _send(self) -> None:
        assert self._loop is not None
        try:
            sent = self._channel.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # it has ended: its pidfd says so
        self._unsent = self._unsent[sent:]
        if self._unsent:
            self._loop.add_writer(self._channel.fileno(), self._send)
        else:
            self._loop.remove_writer(self._channel.fileno())

    def _read_channel(self) -> None:
        try:
            messages = self._receive()
        except (ProtocolError, OSError) as error:
            self.end(str(error))
            return
        for message in messages:
            if isinstance(message, PartAnswered) and self._done is not None and message.index < self._batch:
                if not self._pass_part(message):
                    return
                continue
            if not isinstance(message, BatchAnswered) or self._done is None or len(message.answers) != self._batch:
                self.end("it answered what it was not asked")
                return
            self.measures = message.measures
            self._finish(message.answers)

    def _pass_part(self, part: PartAnswered) -> bool:
        """Hand a part on; False when the child was ended for too many of them."""
        self._parts += 1
        self._part_bytes += len(part.answer.body)
        if self._parts > MAX_PARTS or self._part_bytes > MAX_ANSWER_BYTES:
            self.end(f"the answers of a batch have {MAX_PARTS} parts and {MAX_ANSWER_BYTES} bytes at most")
            return False
        self._take_part(part.index, part.answer)
        return True

    def _read_output(self) -> None:
        assert self._loop is not None
        if not self._output.read(time.monotonic()):
            self._loop.remove_reader(self._output.descriptor)
            if not self._output.ended:
                self._loop.call_later(1.0 - time.monotonic() % 1.0, self._watch_output)

    def _watch_output(self) -> None:
        if self._loop is not None and not self.ended:
            self._loop.add_reader(self._output.descriptor, self._read_output)

    def _note_end(self) -> None:
        """The process has ended. What it has said before counts, up to the closed channel's end.

        Of a lent child the front reads it.
        """
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        while not self.ended and self._note_lost is None and poll.poll(0):
            self._read_channel()
        self.end(ENDED)

    def _finish(self, outcome: Outcome) -> None:
        done, self._done = self._done, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if done is not None:
            done(outcome)

    def _stop_watching(self) -> None:
        if self._loop is None:
            return
        for descriptor in (self._channel.fileno(), self._pidfd, self._output.descriptor):
            if descriptor >= 0:
                self._loop.remove_reader(descriptor)
        self._loop.remove_writer(self._channel.fileno())


def _ignore_part(_: int, __: CodeAnswer) -> None:
    """Nobody takes parts of answers: the answers are complete without them."""


def _ignore() -> None:
    """Nobody waits for the child's end yet."""


def _kill(pidfd: int) -> None:
    _send_signal(pidfd, signal.SIGKILL)


def _send_signal(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _release(
    pidfd: int, channel: socket.socket, output: ChildOutput, release: "Callable[[int], Future[None]]"
) -> "Future[None]":
    """Kill the process and close what leads to it. From any thread, also when the handle is collected."""
    _kill(pidfd)
    channel.close()
    output.close()
    return release(pidfd)
