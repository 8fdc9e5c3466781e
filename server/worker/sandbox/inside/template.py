"""The template: imports torch once, then forks a child for each archive, and kills what children leave behind.

Started as `python -P -m server.worker.sandbox.inside.template FD FOLDER` with one end of the control channel, a socket
of packets, and the folder of the children's folders. It ends when the worker closes the channel or
dies: then it kills its children, and removes the folder. A child ends when the worker kills it, which is seen here.

INVARIANT: it has one thread, so that a fork of it is sound. So it imports torch and what handlers of TorchServe derive
from, but no ONNX Runtime, which starts a thread when it is imported.
"""

import gc
import io
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from server.worker.sandbox.inside import landlock, torchserve_package
from server.worker.sandbox.inside.child import run_child
from server.worker.sandbox.inside.child_users import FIRST_USER, ChildUsers
from server.worker.sandbox.inside.confinement import python_paths, set_subreaper
from server.worker.sandbox.inside.module_space import index_modules
from server.worker.sandbox.messages import (
    MAX_PACKET,
    ForkChild,
    Forked,
    TemplateReady,
    decode_for_template,
    encode_packet,
)

SWEEP_MS = 250  #: how often processes that children left behind are looked for
REAP_S = 0.002  #: between two looks at processes that have been killed


class Template:
    """See the module. `children`: the living ones, pid -> pidfd. INVARIANT: a user is free when nothing runs as it."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, int] = {}
        self._users = ChildUsers() if os.geteuid() == 0 else None
        self._user_of: dict[int, int] = {}  # of the same children, where each has one
        self._landlock = landlock.find_version()
        self._unreadable = ""  # by other users, of Python and the packages

    def __repr__(self) -> str:
        """For example `<Template 3 children>`."""
        return f"<Template {len(self._children)} children>"

    def serve(self) -> None:
        """Tell that it is ready, and do what the worker says until it closes the channel."""
        problem, self._unreadable = try_user()
        if self._unreadable and not self._landlock:
            problem = (
                f"the server runs as root, but its children run as other users, who may not read {self._unreadable}: "
                "install the packages where every user may read them, or run the server as a user that is not root"
            )
        self._control.send(encode_packet(TemplateReady(problem, self._landlock)))
        while True:
            poll = select.poll()
            for descriptor in (self._control.fileno(), *self._children.values()):
                poll.register(descriptor, select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll(SWEEP_MS if self._children else None)}
            for pid in [pid for pid, pidfd in self._children.items() if pidfd in ready]:
                self._bury(pid)
            if has_orphans(self._children):
                self._kill_orphans()
            if self._control.fileno() in ready and not self._obey():
                break
        for pid in list(self._children):
            os.kill(pid, signal.SIGKILL)
            self._bury(pid)
        if self._users is not None:
            self._users.close()

    def _obey(self) -> bool:
        """Do one thing that the worker says; False when it has gone."""
        packet, descriptors, _, _ = socket.recv_fds(self._control, MAX_PACKET, 2)
        if not packet:
            return False
        try:
            pid = self._fork(decode_for_template(packet), *descriptors)
        except OSError as error:
            self._control.send(encode_packet(Forked(problem=f"no process could be forked: {error}")))
        else:
            socket.send_fds(self._control, [encode_packet(Forked(pid))], [self._children[pid]])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _fork(self, asked: ForkChild, channel: int, output: int) -> int:
        """The pid of a new child. In the child this does not return."""
        user = None if self._users is None else self._users.take()
        try:
            pid = os.fork()
        except OSError:
            self._free_user(user)
            raise
        if pid == 0:
            self._control.detach()  # its descriptor is closed by number, and may be another's then
            use_landlock, keep_reading = self._landlock > 0, bool(self._unreadable)
            run_child(asked, user, channel, output, use_landlock=use_landlock, keep_reading=keep_reading)
        self._children[pid] = os.pidfd_open(pid)
        if user is not None:
            self._user_of[pid] = user
        return pid

    def _free_user(self, user: int | None) -> None:
        if self._users is not None and user is not None:
            self._users.give_back(user)

    def _bury(self, pid: int) -> None:
        """The child is dead or dying: kill its group, reap it, and kill what it leaves behind.

        INVARIANT: its pid stays its own until it is reaped, so that no other group is killed.
        """
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it has died before it had a group, or nothing of the group is left
        os.waitpid(pid, 0)
        os.close(self._children.pop(pid))
        self._kill_orphans()
        self._free_user(self._user_of.pop(pid, None))

    def _kill_orphans(self) -> None:
        """Kill processes whose parents, children of archives, have ended: this process has adopted them.

        They are stopped before they are killed, with all that they have started, until none is found that runs. A
        stopped process forks nothing and keeps its place under the limit of processes, so that this comes to an end
        also where each forks others all the time.
        """
        while self._list_orphans():
            stopped: set[int] = set()
            while running := self._list_orphans() - stopped:
                for pid in running:
                    _signal(pid, signal.SIGSTOP)
                stopped |= running
            for pid in stopped:
                _signal(pid, signal.SIGKILL)
            while any(map(_is_unburied, stopped)):
                time.sleep(REAP_S)

    def _list_orphans(self) -> set[int]:
        """Adopted processes and their descendants, zombies too.

        All processes are looked at: `/proc/PID/task/TID/children` leaves some out while others come and go.
        """
        started: dict[int, list[int]] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                started.setdefault(_find_parent(folder), []).append(int(folder.name))
        todo = [pid for pid in started.get(os.getpid(), []) if pid not in self._children]
        found: set[int] = set()
        while todo:
            pid = todo.pop()
            found.add(pid)
            todo += started.get(pid, [])
        return found


def _find_parent(folder: Path) -> int:
    """The parent of the process that the folder of /proc is of; 0 where it has ended."""
    try:
        return int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _is_unburied(pid: int) -> bool:
    """Reap the process if it is a child that has ended; whether it is still there."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except ChildProcessError:  # its parent is dying too: it becomes a child of this process
        return Path(f"/proc/{pid}").exists()


def _signal(pid: int, number: signal.Signals) -> None:
    """Signal a descendant, unless it has been reaped meanwhile."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def has_orphans(known: Container[int]) -> bool:
    """Whether this process has children beside the known ones. Cheap; may leave some out while others come and go."""
    pid = os.getpid()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return any(int(each) not in known for each in children)


def try_user() -> tuple[str, str]:
    """Whether children can run as users of their own where this process is root: why not, and what they may not read.

    Such a user should be able to read Python and the packages. A process that is forked for it tries.
    """
    if os.geteuid() != 0:
        return "", ""
    paths = python_paths()
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writes, "\n".join(_become_user(FIRST_USER, paths)).encode()[: MAX_PACKET // 2])
        os._exit(0)
    os.close(writes)
    problem, _, unreadable = os.read(reads, MAX_PACKET).decode(errors="replace").partition("\n")
    os.close(reads)
    try:
        os.kill(pid, 0)
    except PermissionError:
        problem = "the server runs as root without the right to end its children (CAP_KILL): run it as another user"
    os.waitpid(pid, 0)
    return problem, unreadable


def _become_user(user: int, paths: Sequence[Path]) -> tuple[str, str]:
    existing = [path for path in paths if path.exists()]
    try:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError as error:
        return f"the server runs as root without the right to change its children's user ({error})", ""
    return "", next((str(path) for path in existing if not os.access(path, os.R_OK)), "")


def _use_torch_once(torch: Any) -> None:
    """Have done what most archives do first, and torch prepares when it is first done: each child would do it again.

    On one thread, so that no other is started.
    """
    torch.set_num_threads(1)
    layer, saved = torch.nn.Linear(2, 1), io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    layer.load_state_dict(torch.load(saved, map_location="cpu"))
    with torch.inference_mode():
        layer.eval()(torch.zeros(1, 2)).tolist()


def main() -> None:
    """Import torch, and serve the worker at the other end of the channel, until that is closed."""
    set_subreaper()
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    import numpy.random  # noqa: F401, PLC0415 -- numpy imports it when it is first used, and each child seeds it
    import torch  # noqa: PLC0415 -- the template is warm by it

    _use_torch_once(torch)
    torchserve_package.preload()
    index_modules()

    gc.collect()
    gc.freeze()  # a child's collector writes to no page of the template's objects
    try:
        Template(control).serve()
    except BrokenPipeError:
        pass  # the worker has gone before this process was warm
    finally:
        shutil.rmtree(sys.argv[2], ignore_errors=True)


if __name__ == "__main__":
    main()
