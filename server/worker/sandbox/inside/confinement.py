"""A child gives up what it inherited, before the archive's first line runs. In a process that was just forked.

The order matters: what needs the worker's rights comes before the change of the user, and Landlock comes last.
"""

import ctypes
import fcntl
import math
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

from server.worker.sandbox.inside import landlock
from server.worker.sandbox.inside.module_space import find_checkout
from server.worker.sandbox.messages import ChildLimits

CHANNEL = 3  #: the child's only descriptor beside standard input, output and error
MORE_MEMORY_BYTES = 64 * 1024 * 1024  #: of address space, for stacks of threads and the like
NICE = 5  #: below the worker and the fronts: where cores are few, these go first
CPU_SLACK_S = 0.5  #: of processor time between two renewals of the limit
OOM_SCORE = "800"  #: of 1000: when the host has no memory left, the kernel ends children before workers
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_KEEP_CAPABILITIES, _SET_SUBREAPER, _SET_NO_NEW_PRIVILEGES = 1, 4, 8, 36, 38
_CAPABILITY_VERSION, _DAC_READ_SEARCH = 0x20080522, 1 << 2

#: Variables that a child may see: where programs and libraries are, language, time zone, threads.
KEPT_VARIABLES = frozenset(
    {
        "PATH", "LD_LIBRARY_PATH", "LANG", "LANGUAGE", "TZ", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
    }
)  # fmt: skip
#: What Python, torch and the C library read beside the packages. Nothing here holds secrets.
SYSTEM_PATHS = (
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/opt/conda", "/nix/store", "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/localtime", "/etc/timezone", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf",
    "/etc/hosts", "/etc/host.conf", "/etc/resolv.conf", "/etc/ssl/certs", "/etc/mime.types", "/etc/alternatives",
    "/etc/os-release", "/etc/fonts", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys", "/proc/version",
    "/proc/filesystems", "/sys/devices/system", "/sys/fs/cgroup",
)  # fmt: skip
#: Where CUDA finds its driver and what the host is, beside the devices themselves.
GPU_PATHS = ("/proc/driver/nvidia", "/proc/modules", "/proc/devices", "/sys/module", "/sys/bus/pci", "/etc/nvidia")
GPU_DEVICES = "nvidia*"  #: in /dev
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")


def keep_variables(variables: dict[str, str]) -> dict[str, str]:
    """Those of the variables that a template and its children may have."""
    return {name: value for name, value in variables.items() if name in KEPT_VARIABLES or name.startswith("LC_")}


def confine(folder: Path, limits: ChildLimits, user: int | None, *, use_landlock: bool, keep_reading: bool) -> None:
    """Give up all but the folder, the channel and the output, and become the user. Raises OSError, LandlockError.

    `keep_reading`: another user may not read the packages: the child keeps root's right to read, under Landlock.
    """
    assert use_landlock or not keep_reading, "only Landlock bounds what root may read"
    os.setsid()
    os.nice(NICE)
    Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    if user is not None:
        _change_user(folder, user, keep_reading=keep_reading)
    libc = ctypes.CDLL(None)
    libc.prctl(_SET_DUMPABLE, 1)  # else its /proc would be root's, and torch could not read its own
    libc.prctl(_SET_PDEATHSIG, int(signal.SIGKILL))  # a change of the user clears it
    libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    os.chdir(folder / "model")
    _set_variables(folder, gpu=limits.gpu)
    _set_limits(limits, shares_user=user is None)
    if use_landlock:
        readable = [*map(Path, SYSTEM_PATHS), Path(f"/proc/{os.getpid()}"), *python_paths()]
        devices = Path("/dev").glob(GPU_DEVICES) if limits.gpu else []
        readable += map(Path, GPU_PATHS) if limits.gpu else []
        landlock.restrict(readable, [folder], map(Path, DEVICES), devices)


def keep_descriptors(channel: int, output: int) -> socket.socket:
    """Close every descriptor but these two, which become CHANNEL and standard output and error. The channel."""
    channel, output = (fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, CHANNEL + 1) for each in (channel, output))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(channel, CHANNEL, inheritable=False)
    os.closerange(CHANNEL + 1, os.sysconf("SC_OPEN_MAX"))
    return socket.socket(fileno=CHANNEL)


def python_paths() -> list[Path]:
    """The folders of Python, of its library and of the packages. Ours are among them only where they are installed."""
    folders = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix), *map(Path, sys.path)}
    return sorted(folder for folder in folders if folder.is_absolute() and folder != find_checkout())


def allow_cpu(seconds: float) -> None:
    """Let this process take so many more seconds of processor time; the kernel ends it then."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 1, hard))


class CpuAllowance:
    """The processor time that each batch may take. Renewed when some was used: a renewal is three system calls."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._renewed_at = seconds, -math.inf  # on the clock of this process's own time

    def __repr__(self) -> str:
        """For example `<CpuAllowance 120.0 s>`."""
        return f"<CpuAllowance {self._seconds} s>"

    def renew(self) -> None:
        """Before a batch. INVARIANT: it may take all the seconds, and at most CPU_SLACK_S and a second more."""
        used = time.process_time()
        if used - self._renewed_at >= CPU_SLACK_S:
            self._renewed_at = used
            allow_cpu(self._seconds + CPU_SLACK_S)


def _change_user(folder: Path, user: int, *, keep_reading: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for path, _, files in os.walk(folder):
        for each in (path, *(os.path.join(path, file) for file in files)):  # noqa: PTH118 -- thousands of files
            os.chown(each, user, user, follow_symlinks=False)
    if keep_reading:
        libc.prctl(_SET_KEEP_CAPABILITIES, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if keep_reading:
        head, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (0, 0, 0)  # effective, permitted, inheritable
        wanted = (ctypes.c_uint32 * 6)(_DAC_READ_SEARCH, _DAC_READ_SEARCH, 0, *none)
        if libc.capset(ctypes.byref(head), ctypes.byref(wanted)) != 0:
            raise OSError(ctypes.get_errno(), "capset")


def _set_variables(folder: Path, *, gpu: bool) -> None:
    """What it kept. INVARIANT: a child that may not use the GPU finds none, also where there is no Landlock."""
    kept = keep_variables(dict(os.environ))
    kept.pop("PYTHONPATH", None)  # sys.path is made already
    if not gpu:
        kept["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.clear()
    os.environ.update(kept, HOME=str(folder), TMPDIR=str(folder / "tmp"))


def _set_limits(limits: ChildLimits, *, shares_user: bool) -> None:
    space = _address_space() + limits.memory_bytes + MORE_MEMORY_BYTES
    for which, most in (
        *(() if limits.gpu else ((resource.RLIMIT_AS, space),)),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_NPROC, limits.processes + (_count_own_threads() if shares_user else 0)),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(which)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (least, least))
    allow_cpu(limits.cpu_s)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _count_own_threads() -> int:
    """Threads of all processes of this user, which the limit of processes counts together."""
    found, user = 0, os.getuid()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if folder.stat().st_uid == user:
                    found += sum(1 for _ in (folder / "task").iterdir())
            except OSError:
                continue  # gone meanwhile
    return found


def set_subreaper() -> None:
    """Have this process adopt what its descendants leave behind. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
