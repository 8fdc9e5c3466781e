"""Hostile code costs only itself: other models are answered meanwhile, counted, and nothing of it is left."""

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model_store.errors import CodeFailed
from model_store.names import ModelName
from server.worker.sandbox import child_output
from server.worker.sandbox.child_process import ChildEnded
from server.worker.sandbox.code_host import MAX_DEAD, MOST_DEATHS, CodeHost
from tests.patience import wait_until
from tests.server.worker.sandbox.code_archives import Asker, is_alive, make_code_archive, start

pytestmark = pytest.mark.slow

ANSWERS = 20  #: of the other model, while the hostile one does its worst

HANDLE = """
import os, sys, time, ctypes, signal, random, locale

def handle(data, context):
    return None if data is None else [attack() or "survived"] * len(data)

def attack():
"""


def make_hostile(attack: str) -> str:
    """A handler that does this when it is asked."""
    return HANDLE + "".join(f"    {line}\n" for line in attack.strip().splitlines())


FORK_BOMB = """
while True:
    try:
        os.fork()
        os.setsid()
    except OSError:
        pass
"""
IGNORING = """
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True: pass
"""
ATTACKS = {
    "endless loop": ("while True: pass", "took longer than 4 s"),
    "sleeps for ever": ("time.sleep(1000)", "took longer than 4 s"),
    "ignores signals": (IGNORING, "took longer than 4 s"),
    "os._exit": ("os._exit(9)", "ended by itself"),
    "SIGSEGV": ("ctypes.string_at(0)", "ended by itself"),
    "SIGKILL": ("os.kill(os.getpid(), 9)", "ended by itself"),
    "closes its channel": ("os.close(3)", "ended by itself"),
    "writes garbage to its channel": ("os.write(3, b'x' * 100)", "it sent a message of 2021161080 bytes"),
    "answers what it was not asked": ("os.write(3, b'\\x02\\x00\\x00\\x00\\x91\\x01')", "it sent no message of ours"),
    "fork bomb": (FORK_BOMB, "took longer than 4 s"),
    "leaves by an exit": ("sys.exit(0)", "ended by itself"),
}
SURVIVED = {
    "1 GB": ("x = bytearray(1 << 30)", 507),
    "raises": ("raise RuntimeError", 503),
    "interrupt": ("raise KeyboardInterrupt", None),
    "floods its output": ("for i in range(20000): print('x' * 100)", 200),
    "files without end": ("[open('/dev/null') for _ in range(10000)]", 503),
    "a file without end": (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nwith open('big', 'wb') as f: f.truncate(1 << 40)",
        503,
    ),
    "prints what looks like a metric": (
        "print('[METRICS]fleetcast_x.Count:1|#Level:Host,m:1')\nprint('# TYPE fleetcast_x gauge')",
        200,
    ),
    "writes outside its folder": ("open('/etc/fleetcast-outside', 'w')", 503),
    "leaves a grandchild behind": ("if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(1000)", 200),
    "deletes its folder": ("import shutil; shutil.rmtree(os.environ['HOME'], ignore_errors=True)", 200),
    "changes what is global": (
        "sys.path.clear(); os.environ.clear(); random.seed(1)\nlocale.setlocale(locale.LC_ALL, 'C'); os.umask(0)",
        200,
    ),
}


def run(test: Coroutine[Any, Any, None]) -> None:
    """In a loop of its own."""
    asyncio.run(test)


async def answer_meanwhile(good: Asker, attacked: "asyncio.Task[Any]") -> int:
    """How often the good child answers rightly until the attack is over, at least ANSWERS times."""
    answers = 0
    while not attacked.done() or answers < ANSWERS:
        assert (await good.one("x")).body == b"x"
        answers += 1
        await asyncio.sleep(0.005)
    return answers


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_that_ends_the_child_is_told_and_costs_no_other(host: CodeHost, name: str) -> None:
    """Whoever waits is told what happened; nothing of the child is left; its archive can be started again."""
    attack, why = ATTACKS[name]

    async def ask() -> None:
        good, bad = (
            Asker(start(host, make_code_archive())),
            Asker(start(host, make_code_archive(make_hostile(attack)), "bad.mar")),
        )
        attacked = asyncio.create_task(bad.one())
        assert await answer_meanwhile(good, attacked) >= ANSWERS
        with pytest.raises(ChildEnded, match=why):
            await attacked
        assert bad.ended.is_set()
        await bad.close()
        wait_until(lambda: not is_alive(bad.child.pid), "the child is gone")
        wait_until(lambda: not list_bombs(), "all that it has forked is gone")
        again = Asker(start(host, make_code_archive(make_hostile("return 'fine'")), "bad.mar"))
        assert (await again.one()).body == b"fine"
        await again.close()
        await good.close()

    run(ask())


def record_output(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that children say from now on, as they are logged."""
    texts: list[str] = []
    said = SimpleNamespace(info=lambda _, **fields: texts.append(fields.get("text", "")))
    monkeypatch.setattr(child_output, "log", said)
    return texts


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import ctypes\ndef handle(d, c):\n    return d and ctypes.string_at(0)", "ended by itself"),
        ("import time\ndef handle(d, c):\n    return d and time.sleep(60)", "took longer than 4 s"),
    ],
    ids=["crashes", "hangs"],
)
def test_the_line_at_which_a_process_ends_is_in_the_log(
    host: CodeHost, monkeypatch: pytest.MonkeyPatch, code: str, why: str
) -> None:
    """Of a crash in a library, and of code that is ended because it takes too long."""
    texts = record_output(monkeypatch)

    async def ask() -> None:
        child = Asker(start(host, make_code_archive(code)))
        with pytest.raises(ChildEnded, match=why):
            await child.one()
        assert any('model/handler.py", line 3 in handle' in text for text in texts), texts
        await child.close()

    run(ask())


def test_the_line_at_which_a_load_hangs_is_in_the_log(host: CodeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says to look there."""
    texts = record_output(monkeypatch)
    with pytest.raises(CodeFailed, match=r"not loaded within 4 s .* says where it was"):
        start(host, make_code_archive("import time\ntime.sleep(60)"))
    assert any('model/handler.py", line 2 in <module>' in text for text in texts), texts


def list_bombs() -> list[int]:
    """Processes in a folder of a child that has been removed."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and "fleetcast-code-" in (cwd := str((folder / "cwd").readlink())):
                found += [int(folder.name)] if cwd.endswith(" (deleted)") else []
        except OSError:
            continue
    return found


@pytest.mark.parametrize("name", SURVIVED)
def test_an_attack_that_a_limit_stops_is_an_error_of_one_batch(host: CodeHost, name: str) -> None:
    """The child lives on, or is ended; the other model is answered all the time."""
    attack, status = SURVIVED[name]

    async def ask() -> None:
        good, bad = (
            Asker(start(host, make_code_archive())),
            Asker(start(host, make_code_archive(make_hostile(attack)), "bad.mar")),
        )
        attacked = asyncio.create_task(bad.one())
        assert await answer_meanwhile(good, attacked) >= ANSWERS
        if status is None:
            with pytest.raises(ChildEnded):
                await attacked
        else:
            assert (await attacked).status == status
        await bad.close()
        wait_until(lambda: not list_bombs(), "all that it has started is gone")
        fresh = Asker(start(host, make_code_archive(make_hostile("return 'fine'")), "bad.mar"))
        assert (await fresh.one()).body == b"fine"
        await fresh.close()
        await good.close()

    run(ask())


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("while True: pass", r"not loaded within 4 s \(code_timeout_s\)"),
        ("import os; os._exit(9)", "its process ended by itself"),
        ("import ctypes; ctypes.string_at(0)", "its process ended by itself"),
        ("import os, time\nif os.fork() == 0: time.sleep(100)\nos._exit(1)", "its process ended by itself"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("class A:\n    def initialize(self, c): raise OSError\n    def handle(self, d, c): pass", "OSError"),
        ("import nosuch", "No module named 'nosuch'"),
        ("def other(data, context): pass", "has neither a function 'handle' nor"),
        ("import os; os.write(3, b'y' * 100)", "it sent a message of"),
        ("while True: print('x' * 10000)", "not loaded within 4 s"),
    ],
)
def test_code_that_is_hostile_while_it_loads_fails_its_load(host: CodeHost, code: str, why: str) -> None:
    """In the time that a load has, with the reason; another model is answered all the time."""

    async def ask() -> None:
        good = Asker(start(host, make_code_archive()))
        loading = asyncio.create_task(asyncio.to_thread(start, host, make_code_archive(code), "bad.mar"))
        assert await answer_meanwhile(good, loading) >= ANSWERS
        with pytest.raises(CodeFailed, match=why):
            await loading
        await good.close()

    run(ask())


def test_a_flood_is_cut_and_no_line_is_taken_for_ours(host: CodeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines carry the model's name, control characters are shown, and what is more than the share is counted."""
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(
        child_output, "log", SimpleNamespace(info=lambda event, **rest: lines.append({"event": event, **rest}))
    )
    forged = 'print("# HELP fleetcast_x\\r\\x1b[2J"); [print("x") for _ in range(5000)]'

    async def ask() -> None:
        child = Asker(start(host, make_code_archive(make_hostile(forged))))
        assert (await child.one()).status == 200
        await child.close()
        said = [line for line in lines if line["event"] == "code_said"]
        assert said[0]["model"] == "m.mar"
        assert said[0]["text"] == "# HELP fleetcast_x\\x0d\\x1b[2J"
        assert len(said) <= 3 * child_output.LINES_PER_S
        assert sum(line["lines_dropped"] for line in lines if line["event"] == "code_said_more") > 4000

    run(ask())


def test_an_archive_whose_processes_die_is_not_started_for_a_while(host: CodeHost) -> None:
    """So that a crash at each request does not fork for each request."""
    model = ModelName("dies.mar")
    for _ in range(MOST_DEATHS):
        host.prepare(model, make_code_archive())
        host.note_death(model)
    with pytest.raises(CodeFailed, match="has ended 3 times within 60 s, and is started again in"):
        host.prepare(model, make_code_archive())
    host._deaths[model].extend([time.monotonic() - 61.0] * MOST_DEATHS)
    host.prepare(model, make_code_archive())


def test_deaths_are_remembered_of_a_bounded_number_of_models(host: CodeHost) -> None:
    """Names are whoever's who may publish archives."""
    own = CodeHost(host.policy)
    for i in range(MAX_DEAD + 100):
        own.note_death(ModelName(f"{i}.mar"))
    assert len(own._deaths) == MAX_DEAD
