"""What the faults act on: a store, a server in processes of its own, its disk and its clock. Runs in the main thread.

The disk tier lies on a small file system of its own where this user may mount one, and the wall clock of the server's
processes is a file where there is a C compiler. Where not, the report says which faults are left out.
"""

import hashlib
import io
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.chaos.checker import History
from tests.e2e.models import SMALL_MLP, SMALL_TCN, Model, Question, onnx_model, pack_fleet, pack_forecaster
from tests.e2e.server import ROOT, Server, run_server, upload
from tests.e2e.test_crashes import FAULT
from tests.s3 import S3Server

ROWS = 48  #: models that are rows, which do not all fit beside the ONNX models
WIDE = {**SMALL_TCN, "channels": 32}
SLAB = 80 * 1024  #: bytes: four of the models
REVALIDATE_S = 2.0  #: often, so that disk, store and the copies in memory are compared all the time
FOLLOW_S = REVALIDATE_S + 3.0  #: how long after its replacement a version may answer, on a busy machine
DISK_BYTES = 512 * 1024  #: of the disk tier: not all archives fit
MOUNT = "4m"
QUESTIONS = 3  #: to each model
BROKEN = {"broken/rubbish.mar": b"PK\x03\x04 rubbish", "broken/empty.mar": b""}
CLOCK_SOURCE = Path(__file__).with_name("clock.c")
SETTINGS: dict[str, Any] = {
    "workers": 2,
    "fronts": 2,
    "slab_bytes": SLAB,
    "model_cache_bytes": 2 * 9 * SLAB,  # an ONNX model takes four
    "disk_cache_bytes": DISK_BYTES,
    "revalidate_s": REVALIDATE_S,
    "store_timeout_s": 2,
    "store_retries": 1,
    "drain_s": 5,
}


class Answers:
    """What each version of each model answers to each of its questions. Written by one thread, read by others."""

    def __init__(self) -> None:
        self.bodies: dict[str, list[bytes]] = {}
        self._versions: dict[str, dict[str, list[Question]]] = {}

    def __repr__(self) -> str:
        """For example `<Answers of 36 models>`."""
        return f"<Answers of {len(self._versions)} models>"

    def add(self, model: Model, version: str) -> None:
        """A version that will be in the store. All versions of a model are asked the same questions."""
        questions = [model.question(seed) for seed in range(QUESTIONS)]
        self._versions[model.name] = {**self._versions.get(model.name, {}), version: questions}
        self.bodies[model.name] = [question.body for question in questions]

    def find_agreeing(self, name: str, question: int, body: bytes) -> frozenset[str]:
        """The versions whose answer it is, within the tolerance of `tests.e2e.models`."""
        versions = self._versions.get(name, {}).items()
        return frozenset(version for version, questions in versions if _is_right(questions[question], body))


def _is_right(question: Question, body: bytes) -> bool:
    try:
        question.check(body)
    except (AssertionError, ValueError, KeyError, TypeError, IndexError):
        return False
    return True


@dataclass
class World:
    """See the module. `server` is the running one: after the supervisor's end another one on the same ports."""

    s3: S3Server
    bucket: str
    folder: Path
    models: dict[str, Model]
    rng: random.Random
    poisonous: Model = field(default_factory=lambda: pack_forecaster("poisonous.mar", 666, config=WIDE))
    answers: Answers = field(default_factory=Answers)
    history: History = field(default_factory=lambda: History(FOLLOW_S))
    notes: list[str] = field(default_factory=list)
    disk: Path | None = None  #: the mounted file system that has nothing but the disk tier
    clock: Path | None = None
    _server: Server | None = None
    _running: ExitStack = field(default_factory=ExitStack)
    _ports: dict[str, int] = field(default_factory=dict)
    _revision: int = 1

    @property
    def server(self) -> Server:
        """The running server."""
        assert self._server is not None, "the server is started"
        return self._server

    @property
    def disk_cache(self) -> Path:
        """The folder of the disk tier."""
        return (self.disk or self.folder) / "cache"

    def say(self, note: str) -> None:
        """Something for the report that is no count."""
        self.notes.append(note)

    # --- the server ------------------------------------------------------------------------------------------------

    def start(self) -> float:
        """Start the server, on the ports of the one before. Seconds until it was ready."""
        began = time.monotonic()
        environment: dict[str, str | None] = {"PYTHONPATH": f"{self.folder}:{ROOT}"}
        if self.clock is not None:
            environment |= {"CHAOS_CLOCK": str(self.clock), "LD_PRELOAD": str(self.folder / "clock.so")}
        settings = {**SETTINGS, **self._ports, "disk_cache": self.disk_cache, "environment": environment}
        running = ExitStack()
        self._server = running.enter_context(run_server(self.s3, self.folder, f"s3://{self.bucket}", **settings))
        self._running = running
        self._ports = {f"{name}_port": int(url.rpartition(":")[2]) for name, url in self.server.addresses.items()}
        return time.monotonic() - began

    def stop(self) -> None:
        """End the server, unless it has ended. Raises AssertionError for what `serving` finds: processes left behind,
        tracebacks in the log, an exit code.
        """
        with redirect_stdout(io.StringIO()):  # the logs stay in the folder
            self._running.close()

    def pids(self, kind: str) -> list[int]:
        """Process ids of the fronts or workers."""
        return [int(row["pid"]) for row in self.server.processes(kind) if row["pid"]]

    def is_whole(self) -> bool:
        """Whether all fronts and workers are up, and none is silent."""
        rows = [row for kind in ("front", "worker") for row in self.server.processes(kind)]
        return all(row["up"] and "silent_s" not in row for row in rows)

    # --- models ----------------------------------------------------------------------------------------------------

    def publish(self, model: Model) -> str:
        """Put a version into the store; nothing is told to the server. Its version, which is the archive's MD5."""
        version = hashlib.md5(model.data, usedforsecurity=False).hexdigest()
        self.answers.add(model, version)  # before: it may be answered as soon as it is there
        self.history.publish(model.name, version, time.monotonic())
        assert upload(self.s3, self.bucket, [model]) == {model.name: version}
        self.history.replace(model.name, time.monotonic())
        self.models[model.name] = model
        return version

    def revise(self, model: Model) -> Model:
        """The same model with other weights."""
        self._revision += 1
        return pack_forecaster(model.name, 10_000 * self._revision + self.rng.randrange(1000), config=WIDE)

    def command(self, verb: str, model: str) -> dict[str, Any]:
        """The answer of `POST /fleet/{verb}/{model}`; empty, with a note, where it is refused."""
        try:
            answer = self.server.fleet(verb, model)
        except httpx.HTTPError as error:
            self.say(f"{verb} of {model}: {error!r}")
            return {}
        if answer.is_success:
            return dict(answer.json())
        self.say(f"{verb} of {model}: {answer.status_code} {answer.text[:200]}")
        return {}

    # --- disk and clock --------------------------------------------------------------------------------------------

    def step_clock(self, seconds: float) -> None:
        """Set the wall clock of the server's processes to the true one and so many seconds."""
        assert self.clock is not None
        with self.clock.open("r+b") as file:  # in place: it is mapped
            file.write(struct.pack("q", int(seconds * 1e9)))


@contextmanager
def open_world(s3: S3Server, folder: Path, seed: int) -> Iterator[World]:
    """A fleet in a fresh bucket and a server that is ready. At the end it must end well."""
    rng = random.Random(seed)
    models = pack_fleet("tcn", ROWS - 6, seed, WIDE)
    models += [pack_forecaster(f"mlp/{i:02}.mar", seed + i, "mlp", SMALL_MLP) for i in range(6)]
    models += [onnx_model(f"onnx/{i}.mar", seed + i) for i in range(2)]
    world = World(s3, s3.bucket(), folder, {}, rng)
    for model in models:
        world.publish(model)
    upload(s3, world.bucket, [world.poisonous])
    for name, data in BROKEN.items():
        s3.put(world.bucket, name, data)
    (folder / "sitecustomize.py").write_text(FAULT)
    with ExitStack() as stack:
        world.clock = make_clock(folder)
        world.disk = stack.enter_context(mount_disk(folder))
        world.start()
        stack.callback(world.stop)
        yield world


def make_clock(folder: Path) -> Path | None:
    """The file of the server's clock and the library that reads it; None where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(folder / "clock.so"), str(CLOCK_SOURCE), "-ldl"]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        return None
    clock = folder / "clock"
    clock.write_bytes(bytes(8))
    return clock


@contextmanager
def mount_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of a few MiB in memory; None where this user may not mount one."""
    disk = folder / "disk"
    disk.mkdir()
    if os.geteuid() or mount("-t", "tmpfs", "-o", f"size={MOUNT},mode=700", "chaos", str(disk)):
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False, capture_output=True)


def mount(*arguments: str) -> int:
    """The exit code of `mount`; 127 where there is none."""
    try:
        return subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode
    except FileNotFoundError:
        return 127
