"""What a child has, and what it cannot reach: its own modules, folder and environment, and nothing of others."""

import asyncio
import dataclasses
import gc
import json
import os
import socket
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from server.worker.sandbox.code_host import CodeHost, CodePolicy
from server.worker.sandbox.inside import landlock
from server.worker.sandbox.inside.module_space import OURS
from server.worker.sandbox.memory_use import measure_memory
from tests.patience import wait_until
from tests.server.worker.sandbox.code_archives import Asker, count_open_files, is_alive, make_code_archive, start

pytestmark = pytest.mark.slow

needs_landlock = pytest.mark.skipif(landlock.find_version() == 0, reason="this kernel has no Landlock")
MIB = 1024 * 1024

EVAL = """
import json, os, sys

def handle(data, context):
    return None if data is None else [json.dumps(repr(attempt(row["body"]))) for row in data]

def attempt(text):
    try:
        return eval(text)
    except BaseException as error:
        return type(error).__name__
"""


def run(test: Coroutine[Any, Any, None]) -> None:
    """In a loop of its own."""
    asyncio.run(test)


def is_there(path: str | Path) -> bool:
    """Whether the path exists."""
    return Path(path).exists()


async def evaluate(child: Asker, text: str) -> str:
    """The repr of an expression's value in the child, or the repr of its error's name."""
    found: str = json.loads((await child.one(text)).body)
    return found


def test_two_archives_with_the_same_names_never_meet(host: CodeHost) -> None:
    """Nor do they meet our packages, or what the template has imported: `server` and `msgspec` are theirs."""
    handler = """
import handler as me, utils, server.answer, handlers, msgspec, ts
def handle(data, context):
    names = (utils.NAME, server.answer.NAME, handlers.NAME, msgspec.NAME, ts.NAME)
    return None if data is None else [" ".join(names)] * len(data)
"""

    async def ask() -> None:
        children = []
        for name in ("a", "b"):
            names = (
                "utils.py",
                "server/__init__.py",
                "server/answer.py",
                "handlers.py",
                "msgspec.py",
                "ts/__init__.py",
            )
            members = dict.fromkeys(names, f"NAME = '{name}'")
            children.append(Asker(start(host, make_code_archive(handler, members), f"{name}.mar")))
        for name, child in zip(("a", "b"), children, strict=True):
            assert (await child.one()).body.decode() == " ".join([name] * 5)
            await child.close()
        child = Asker(start(host, make_code_archive(EVAL)))
        for ours in OURS:
            assert await evaluate(child, f"__import__({ours!r})") == "'ModuleNotFoundError'", ours
        assert await evaluate(child, f"[m for m in sys.modules if m.partition('.')[0] in {OURS}]") == "[]"
        await child.close()

    run(ask())


def test_a_child_has_no_credentials_and_no_descriptors(host: CodeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is what programs need; descriptors are its channel and its output."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
    own = CodeHost(CodePolicy(host.policy.keys, host.policy.memory_bytes, host.policy.timeout_s))

    async def ask() -> None:
        child = Asker(start(own, make_code_archive(EVAL)))
        environment = await evaluate(child, "sorted(os.environ)")
        assert "AWS" not in environment
        assert "PYTHONPATH" not in environment
        assert "sesame" not in await evaluate(child, "open('/proc/self/environ').read()")
        folder = (await evaluate(child, "os.environ['HOME']")).strip("'")
        assert is_there(folder)
        assert await evaluate(child, "os.getcwd() == os.environ['HOME'] + '/model'") == "True"
        # the last one is that of the listing itself
        assert await evaluate(child, "sorted(map(int, os.listdir('/proc/self/fd')))[:4]") == "[0, 1, 2, 3]"
        assert await evaluate(child, "len(os.listdir('/proc/self/fd'))") == "5"
        assert await evaluate(child, "os.getsid(0) == os.getpgid(0) == os.getpid()") == "True"
        await child.close()
        assert not is_there(folder)

    run(ask())
    own.close()


def list_processes(user: int) -> list[int]:
    """The processes that run as this user."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            if folder.name.isdigit() and f"\nUid:\t{user}\t" in (folder / "status").read_text():
                found.append(int(folder.name))
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have children run as other users")
def test_no_process_of_another_child_runs_as_a_childs_user(host: CodeHost) -> None:
    """Neither of another server on the host, nor what an ended child has left behind: they would be counted together,
    and a child that another one keeps from forking would fail.
    """
    bomb = """
import os, time

def handle(data, context):
    if data is None:
        return None
    for _ in range(6):
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)
    return [str(os.getuid())]
"""
    own = CodeHost(host.policy)

    async def ask() -> None:
        children = [Asker(start(each, make_code_archive(EVAL), "m.mar")) for each in (host, own)]
        users = [int(await evaluate(child, "os.getuid()")) for child in children]
        assert len({*users, os.getuid()}) == 3
        for _ in range(4):
            leaving = Asker(start(host, make_code_archive(bomb), "bomb.mar"))
            user = int((await leaving.one()).body)
            assert len(list_processes(user)) == 7
            leaving.child.close()  # nobody waits until all that it has started is gone
            child = Asker(start(host, make_code_archive(EVAL), "m.mar"))
            user = int(await evaluate(child, "os.getuid()"))
            assert list_processes(user) == [child.child.pid]
            children += [leaving, child]
        for child in children:
            await child.close()

    run(ask())
    own.close()


@needs_landlock
def test_a_child_reaches_nothing_outside_its_folder(host: CodeHost, tmp_path: Path) -> None:
    """It reads Python and its packages, writes below its folder, and has no way to sockets, files or processes."""
    secret = tmp_path / "credentials"
    secret.write_text("sesame")
    secret.chmod(0o644)
    tmp_path.chmod(0o755)

    async def ask() -> None:
        child, other = (Asker(start(host, make_code_archive(EVAL), f"{name}.mar")) for name in "ab")
        refused = ("'PermissionError'", "'FileNotFoundError'")
        others = (await evaluate(other, "os.environ['HOME']")).strip("'")
        for path in (secret, f"{others}/model/handler.py", "/etc/shadow", f"/proc/{os.getpid()}/environ"):
            assert await evaluate(child, f"open({str(path)!r}).read()") in refused, path
        for path in (tmp_path / "new", "/tmp/fleetcast-written", f"{others}/new"):
            assert await evaluate(child, f"open({str(path)!r}, 'w')") in refused, path
            assert not is_there(path)
        assert await evaluate(child, "os.listdir('/tmp')") in refused
        assert await evaluate(child, "open(os.environ['TMPDIR'] + '/mine', 'w').write('x')") == "1"
        assert await evaluate(child, "open('beside_the_model', 'w').write('x')") == "1"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            if landlock.find_version() >= 4:
                assert await evaluate(child, f"__import__('socket').create_connection({address})") in refused
        path = tmp_path / "worker.sock"
        with socket.socket(socket.AF_UNIX) as worker:
            worker.bind(str(path))
            worker.listen()
            os.chmod(tmp_path, 0o700)  # noqa: PTH101 -- a Path's method might be taken for one that blocks
            connect = f"__import__('socket').socket(1).connect({str(path)!r})"
            if os.geteuid() == 0:
                assert await evaluate(child, connect) in refused
        if landlock.find_version() >= 6:
            assert await evaluate(child, f"os.kill({os.getpid()}, 0)") in refused
            assert await evaluate(child, f"os.kill({other.child.pid}, 0)") in refused
        assert (await other.one("1 + 1")).status == 200
        await child.close()
        await other.close()

    run(ask())


def test_unloading_ends_a_child_and_all_that_it_started(host: CodeHost) -> None:
    """Also what has left its session and its parents; memory and descriptors come back."""
    daemon = """
import os, time
BALLAST = bytearray(40 * 1024 * 1024)

def handle(data, context):
    if data is None:
        return None
    reads, writes = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.write(writes, b"%d " % os.getpid())
        if os.fork() == 0:
            os.setsid()
            os.write(writes, b"%d " % os.getpid())
        time.sleep(1000)
    said = b""
    while said.count(b" ") < 2:
        said += os.read(reads, 100)
    return [said.decode()]
"""

    async def ask() -> None:
        gc.collect()  # what other tests have left closes now, and not between the two counts
        before = count_open_files()
        for _ in range(3):
            child = Asker(start(host, make_code_archive(daemon)))
            started = [int(pid) for pid in (await child.one()).body.split()]
            assert len(started) == 2
            assert all(map(is_alive, started))
            assert measure_memory(child.child.pid) >= 40 * MIB
            await child.close()
            everything = [child.child.pid, *started]
            wait_until(lambda: not any(map(is_alive, everything)), "all processes are gone")  # noqa: B023
        assert count_open_files() <= before, "what other tests have left may close meanwhile"

    run(ask())


@pytest.mark.parametrize("gpu", [False, True])
def test_a_child_has_a_gpu_only_where_the_policy_says_so(
    host: CodeHost, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    """No process has touched CUDA before it; without one, it finds none. CUDA needs address space without a limit."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    own = CodeHost(dataclasses.replace(host.policy, gpu=gpu))
    handler = EVAL.replace("attempt(row", "attempt(context, row").replace("attempt(text", "attempt(context, text")

    async def ask() -> None:
        child = Asker(start(own, make_code_archive(handler)))
        assert await evaluate(child, "context.system_properties['gpu_id']") == ("0" if gpu else "None")
        assert await evaluate(child, "os.environ['CUDA_VISIBLE_DEVICES']") == ("'3'" if gpu else "''")
        limit = "__import__('resource').getrlimit(__import__('resource').RLIMIT_AS)[0] == -1"
        assert await evaluate(child, limit) == str(gpu)
        torch = "__import__('torch').cuda"
        assert await evaluate(child, f"{torch}.is_initialized() or {torch}._is_in_bad_fork()") == "False"
        await child.close()

    run(ask())
    own.close()


def test_a_child_may_run_on_the_cores_that_the_policy_says(host: CodeHost) -> None:
    """Whichever its worker keeps to: many archives would share one core else."""
    (core, *_), all_cores = sorted(os.sched_getaffinity(0)), os.sched_getaffinity(0)
    own = CodeHost(dataclasses.replace(host.policy, cores=frozenset(all_cores)))
    os.sched_setaffinity(0, {core})
    try:
        child = start(own, make_code_archive())
        assert os.sched_getaffinity(child.pid) == all_cores
        child.close()
    finally:
        os.sched_setaffinity(0, all_cores)
        own.close()


def test_a_child_that_nobody_holds_is_ended(host: CodeHost) -> None:
    """A load whose model found no place is only dropped."""
    child = start(host, make_code_archive())
    pid = child.pid
    del child
    wait_until(lambda: not is_alive(pid), "the child is gone")


def test_a_template_that_dies_is_replaced_and_takes_its_children_along(host: CodeHost) -> None:
    """The next archive starts on a new one; whoever waits for a child of the old one is told."""
    own = CodeHost(host.policy)

    async def ask() -> None:
        child = Asker(start(own, make_code_archive()))
        assert own._template is not None
        own._template._process.kill()
        await asyncio.wait_for(child.ended.wait(), 60)
        wait_until(lambda: not is_alive(child.child.pid), "its child is gone")
        again = Asker(start(own, make_code_archive()))
        assert (await again.one("x")).body == b"x"
        await child.close()
        await again.close()

    run(ask())
    own.close()
