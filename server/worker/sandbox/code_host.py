"""Starts the children of one worker: owns the template, the children's folders, and who of them has died lately.

`prepare` and `PreparedCode.start` run on threads of the loads; everything else may be called from any thread.
"""

import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog

from handlers.kinds import find_kind
from handlers.kinds.code.entry_point import (
    SAGEMAKER_PROGRAM,
    find_entry_point,
    list_requirements,
    refuse_requirements,
)
from model_store.archives.archive import Archive
from model_store.archives.manifest import Kind
from model_store.errors import CodeFailed, UnsupportedKind
from model_store.names import ModelName, split_version
from server.code_messages import ProtocolError
from server.host import WorkerPlan
from server.ipc.operations import Batching
from server.settings import Settings
from server.temporary_folders import make_folder
from server.worker.sandbox.child_process import ChildProcess
from server.worker.sandbox.inside.confinement import keep_variables
from server.worker.sandbox.memory_use import is_folder_larger
from server.worker.sandbox.messages import (
    MAX_PACKET,
    ChildLimits,
    Entry,
    ForkChild,
    Forked,
    FromTemplate,
    TemplateReady,
    decode_from_template,
    encode_packet,
)
from server.worker.sandbox.requirements import install, read_requirements

PREFIX = "fleetcast-code-"
EVERY_KEY = "*"
WARM_S, FORK_S = 120.0, 20.0  #: how long a template may take to import torch, and to fork
END_S = 10.0  #: how long a killed process may take to end before its folder is removed all the same
CLEANERS = 4
MOST_DEATHS, DEATHS_S = 3, 60.0  #: so many deaths of a model's processes in this time, and it is not started for now
MAX_METRICS_FILE = 16 * 1024  #: bytes of a metrics.yaml
MAX_DEAD = 4096  #: models of which deaths are remembered

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CodePolicy:
    """Whose code may run, and what it may take. `keys`: beginnings of keys.

    `install_s`: seconds in which an archive's packages are installed; 0: an archive that names packages is refused.
    `cores`: that children may run on; empty: those of this process. `gpu`: they may use the worker's GPU.
    `replicas`: processes of one archive at most. `envelope`: of TorchServe's archives that name none. `metrics`: the
    text of TorchServe's metrics.yaml.
    """

    keys: tuple[str, ...]
    memory_bytes: int
    timeout_s: float
    threads: int = 1
    processes: int = 64
    install_s: float = 0.0
    program: str = SAGEMAKER_PROGRAM
    disk_bytes: int = 4 * 1024 * 1024 * 1024
    cores: frozenset[int] = frozenset()
    gpu: bool = False
    replicas: int = 4
    envelope: str = ""
    metrics: str = ""

    @classmethod
    def of(cls, settings: Settings, plan: WorkerPlan, cores: frozenset[int]) -> "CodePolicy":
        """What the settings say, for a worker on a server that has these cores. Raises ValueError, OSError."""
        return cls(
            tuple(settings.allow_code),
            int(settings.code_memory_bytes),
            settings.code_timeout_s,
            plan.threads,
            settings.code_processes,
            settings.code_install_s if settings.code_requirements == "install" else 0.0,
            settings.code_program,
            int(settings.code_disk_bytes),
            cores,
            settings.code_device == "device" and plan.device != "cpu",
            settings.code_replicas,
            settings.code_envelope,
            read_metrics_file(settings.code_metrics) if settings.code_metrics else "",
        )

    def allows(self, model: ModelName) -> bool:
        """Whether the archive's code may run."""
        return any(key == EVERY_KEY or model.startswith(key) for key in self.keys)


def read_metrics_file(path: Path) -> str:
    """TorchServe's metrics.yaml, which travels to each child. Raises ValueError, OSError."""
    with path.open("rb") as file:
        raw = file.read(MAX_METRICS_FILE + 1)
    if len(raw) > MAX_METRICS_FILE:
        raise ValueError(f"{path} (code_metrics) has more than {MAX_METRICS_FILE} bytes")
    return raw.decode()


class Template:
    """The template process of a worker, from the worker's side. One thread at a time talks to it."""

    def __init__(self, folder: Path, cores: frozenset[int]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            variables = keep_variables(dict(os.environ))
            module = ("-P", "-m", "server.worker.sandbox.inside.template")
            self._process = subprocess.Popen(  # noqa: S603 -- our own interpreter and module
                [sys.executable, *module, str(theirs.fileno()), str(folder)],
                pass_fds=[theirs.fileno()], env=variables, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._control, self._ready = ours, False
        if cores:
            with contextlib.suppress(OSError):  # cores were taken offline: it keeps the worker's
                os.sched_setaffinity(self._process.pid, cores)

    def __repr__(self) -> str:
        """For example `<Template 4711>`."""
        return f"<Template {self._process.pid}>"

    @property
    def lives(self) -> bool:
        """Whether the process runs and can be asked."""
        return self._control.fileno() >= 0 and self._process.poll() is None

    def fork(self, asked: ForkChild, descriptors: Sequence[int]) -> tuple[int, int]:
        """The pid and pidfd of a new child. Raises CodeFailed, UnsupportedKind."""
        try:
            self._await_ready()
            self._control.settimeout(FORK_S)
            socket.send_fds(self._control, [encode_packet(asked)], descriptors)
            forked, received = self._receive()
        except (OSError, ProtocolError) as error:
            self._process.kill()  # its children die with it
            self.end()
            raise CodeFailed(
                f"{asked.model}: the template process failed: {error}", f"{asked.model}: try again"
            ) from error
        if not isinstance(forked, Forked) or not received:
            problem = forked.problem if isinstance(forked, Forked) else "it has lost its place in the talk"
            raise CodeFailed(f"{asked.model}: no process for its code: {problem}")
        return forked.pid, received[0]

    def _await_ready(self) -> None:
        """Wait until torch is imported. Raises UnsupportedKind where no child can run on this host."""
        if self._ready:
            return
        self._control.settimeout(WARM_S)
        ready, _ = self._receive()
        if not isinstance(ready, TemplateReady):
            raise ProtocolError("it did not say that it is ready")
        if ready.problem:
            self.end()
            raise UnsupportedKind(f"no code archive can run: {ready.problem}", "no code archive can run on this server")
        if not ready.landlock:
            log.warning("code_without_landlock", then="code archives may read and write what their user may")
        self._ready = True

    def _receive(self) -> tuple[FromTemplate, list[int]]:
        packet, descriptors, _, _ = socket.recv_fds(self._control, MAX_PACKET, 1)
        if not packet:
            raise ProtocolError("it has ended")
        return decode_from_template(packet), descriptors

    def end(self) -> None:
        """Close the channel: the template kills its children, and ends. Waits for that."""
        self._control.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class PreparedCode:
    """An archive's files in a folder, not running yet. The folder goes with this object, or with its child."""

    def __init__(self, host: "CodeHost", model: ModelName, folder: Path, entry: Entry, requirements: list[str]) -> None:
        self._host, self._model, self._folder, self._entry = host, model, folder, entry
        self._requirements = requirements
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._remove.atexit = False

    def __repr__(self) -> str:
        """For example `<PreparedCode of au/NSW1.mar>`."""
        return f"<PreparedCode of {self._model}>"

    def start(self) -> ChildProcess:
        """The running child, its handler loaded. Raises CodeFailed, UnsupportedKind."""
        packages = None
        if self._requirements:
            packages = install(self._model, self._requirements, self._folder, self._host.policy.install_s)
            if is_folder_larger(self._folder, self._host.policy.disk_bytes):
                raise CodeFailed(f"{self._model}: its packages take more than code_disk_bytes of disk")
        child = self._host.fork(self._model, self._folder, self._entry, packages)
        self._remove.detach()
        try:
            child.wait_loaded()
        except BaseException:
            child.close()
            raise
        return child


class CodeHost:
    """See the module."""

    def __init__(self, policy: CodePolicy) -> None:
        self.policy = policy
        self._lock = threading.Lock()  # who talks to the template, which may take long to be warm
        self._folder_lock = threading.Lock()
        self._template: Template | None = None
        self._folder: Path | None = None
        self._batching: dict[str, Batching] = {}
        self._deaths: OrderedDict[ModelName, deque[float]] = OrderedDict()
        self._cleaners = ThreadPoolExecutor(CLEANERS, thread_name_prefix="code-end")

    def __repr__(self) -> str:
        """For example `<CodeHost <Template 4711>>`."""
        return f"<CodeHost {self._template!r}>"

    def warm(self) -> None:
        """Start the template, which then imports torch while the worker goes on. Raises OSError."""
        with self._lock:
            self._keep_template()

    def runs(self, model: ModelName, archive: Archive) -> bool:
        """Whether the archive is one with code, and this model's may run."""
        return self.policy.allows(model) and find_kind(archive).kind is Kind.CODE

    def prepare(self, model: ModelName, archive: Archive) -> PreparedCode:
        """Write the archive's files to a folder of their own. Raises LoadError."""
        entry = find_entry_point(archive, self.policy.program)
        if not self.policy.install_s:
            refuse_requirements(archive)
        wanted = [line for name in list_requirements(archive) for line in read_requirements(model, archive.read(name))]
        self._refuse_dying(model)
        try:
            folder = Path(tempfile.mkdtemp(dir=self._find_folder()))
        except OSError as error:
            raise CodeFailed(f"{model}: no folder for its code: {error}", f"{model}: no folder for its code") from error
        prepared = PreparedCode(
            self,
            model,
            folder,
            Entry(str(entry.style), entry.module, entry.function, entry.folder, entry.from_package),
            wanted,
        )
        try:
            _unpack(archive, folder / "model")
            (folder / "tmp").mkdir()
        except OSError as error:
            what = f"{model}: its files could not be unpacked"
            raise CodeFailed(f"{what}: {error}", what) from error
        return prepared

    def fork(self, model: ModelName, folder: Path, entry: Entry, packages: Path | None) -> ChildProcess:
        """A child that begins to load the handler. Raises CodeFailed, UnsupportedKind."""
        ours, theirs = socket.socketpair()
        reads, writes = os.pipe()
        with theirs, self._lock:
            cpu_s = self.policy.timeout_s * (self.policy.threads + 1)  # all threads' processor time counts
            limits = ChildLimits(self.policy.memory_bytes, cpu_s, self.policy.processes, gpu=self.policy.gpu)
            try:
                template = self._keep_template()
                batching = self._find_batching(model)
                told = (self.policy.threads, str(packages or ""), *batching, self.policy.envelope, self.policy.metrics)
                asked = ForkChild(model, str(folder), entry, limits, *told)
                pid, pidfd = template.fork(asked, [theirs.fileno(), writes])
            except BaseException as error:
                ours.close()
                os.close(reads)
                if isinstance(error, OSError):
                    raise CodeFailed(f"{model}: no process for its code: {error}") from error
                raise
            finally:
                os.close(writes)
        release = _Release(self._cleaners, folder)
        return ChildProcess(model, pid, pidfd, ours, reads, folder, timeout_s=self.policy.timeout_s, release=release)

    def follow_batching(self, models: Mapping[str, Batching | None], *, whole: bool) -> None:
        """How these archives are batched from their next load on; see `server.ipc.operations.SetBatching`."""
        if whole:
            self._batching = {}
        for name, batching in models.items():
            if batching is None:
                self._batching.pop(name, None)
            else:
                self._batching[name] = batching

    def _find_batching(self, model: ModelName) -> tuple[int, float]:
        found = self._batching.get(split_version(model)[0])
        return (found.size, found.delay_s) if found else (0, 0.0)

    def note_death(self, model: ModelName) -> None:
        """A child of the model has ended by itself, or had to be ended."""
        deaths = self._deaths.setdefault(model, deque(maxlen=MOST_DEATHS))
        deaths.append(time.monotonic())
        self._deaths.move_to_end(model)
        if len(self._deaths) > MAX_DEAD:
            self._deaths.popitem(last=False)

    def close(self) -> None:
        """End the template, and with it all children."""
        with self._lock:
            if self._template is not None:
                self._template.end()
                self._template = None

    def _refuse_dying(self, model: ModelName) -> None:
        """Raises CodeFailed if the model's processes have died so often lately that no other is started for now."""
        deaths = list(self._deaths.get(model, []))
        since = time.monotonic() - deaths[0] if len(deaths) == MOST_DEATHS else DEATHS_S
        if since < DEATHS_S:
            raise CodeFailed(
                f"{model}: its process has ended {MOST_DEATHS} times within {DEATHS_S:g} s, and is started again in "
                f"{DEATHS_S - since:.0f} s; the server's log says how it ended (code_ended)"
            )

    def _keep_template(self) -> Template:
        """The template that lives, or a new one. Raises OSError."""
        if self._template is None or not self._template.lives:
            if self._template is not None:
                self._template.end()
            self._template = Template(self._find_folder(), self.policy.cores)
        return self._template

    def _find_folder(self) -> Path:
        """The folder of the children's folders, which only it can be listed. Raises OSError."""
        with self._folder_lock:
            if self._folder is None or not self._folder.exists():
                self._folder, _ = make_folder(Path(tempfile.gettempdir()), PREFIX)  # locked until this process ends
                self._folder.chmod(0o711)  # children of other users enter their own folders in it
            return self._folder


@dataclass(frozen=True, slots=True)
class _Release:
    """Removes a killed child's folder on another thread, once the process has ended. Keeps nothing else alive."""

    cleaners: ThreadPoolExecutor
    folder: Path

    def __call__(self, pidfd: int) -> "Future[None]":
        """The future of its end."""
        try:
            return self.cleaners.submit(self._clean, pidfd)
        except RuntimeError:  # the worker ends: the template removes all
            done: Future[None] = Future()
            done.set_result(None)
            return done

    def _clean(self, pidfd: int) -> None:
        with contextlib.suppress(OSError):
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(END_S * 1e3)
            os.close(pidfd)
        shutil.rmtree(self.folder, ignore_errors=True)


def _unpack(archive: Archive, folder: Path) -> None:
    """Write all members below the folder. Their names are safe: the archive's reader has checked them."""
    folder.mkdir()
    for name in archive.members:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(archive.read(name))
