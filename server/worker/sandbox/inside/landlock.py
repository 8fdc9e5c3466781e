"""Landlock: a process gives up what it may do with files, sockets and signals, for itself and all that it starts.

The kernel has it since 5.13 and asks for no privileges. What a version does not know yet is left out; `find_version`
says which there is. Numbers are those of the kernel's `linux/landlock.h`, equal on all architectures of today.
"""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _RULE_PATH_BENEATH = 1, 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_ALL_FILES: Final = (1 << 13) - 1  #: what the first version handles
_SINCE: Final = {2: _REFER, 3: _TRUNCATE, 5: _IOCTL_DEV}  #: version -> what it added
_NET_VERSION, _NET = 4, 0b11  #: bind and connect of TCP
_SCOPE_VERSION, _SCOPES = 6, 0b11  #: abstract sockets and signals of processes outside
_OF_FILES: Final = EXECUTE | WRITE_FILE | READ_FILE | _TRUNCATE | _IOCTL_DEV  #: what a rule for one file may name
READ: Final = EXECUTE | READ_FILE | READ_DIR


class LandlockError(Exception):
    """The kernel refused a restriction that its version has."""


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def find_version() -> int:
    """The kernel's version of Landlock; 0 where there is none, or it is off."""
    found: int = ctypes.CDLL(None, use_errno=True).syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    return max(0, found)


def restrict(
    readable: Iterable[Path], writable: Iterable[Path], devices: Iterable[Path], controlled: Iterable[Path]
) -> None:
    """Let this process read only below `readable`, and do anything with files only below `writable`.

    `devices` may be read and written, `controlled` ones be given commands too. From then on it has no TCP connections,
    and sends signals to none but its own kind, as far as the kernel's version goes. Paths that do not exist are left
    out. Raises LandlockError.
    """
    version, libc = find_version(), ctypes.CDLL(None, use_errno=True)
    handled = _ALL_FILES | sum(right for since, right in _SINCE.items() if version >= since)
    rules = _Ruleset(
        handled, _NET if version >= _NET_VERSION else 0, _SCOPES if version >= _SCOPE_VERSION else 0
    )  # older kernels read only the fields that they know
    size = 24 if version >= _SCOPE_VERSION else 16 if version >= _NET_VERSION else 8
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(rules), size, 0)
    _check(ruleset, "no ruleset")
    plain = READ_FILE | WRITE_FILE
    for paths, rights in (
        (readable, READ),
        (writable, handled),
        (devices, plain),
        (controlled, READ | plain | _IOCTL_DEV),
    ):
        for path in paths:
            _allow(libc, ruleset, path, rights & handled)
    _check(libc.syscall(_RESTRICT_SELF, ruleset, 0), "not restricted")
    os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rule = _PathBeneath(rights if path.is_dir() else rights & _OF_FILES, descriptor)
        _check(libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0), f"no rule for {path}")
    finally:
        os.close(descriptor)


def _check(result: int, what: str) -> None:
    if result < 0:
        raise LandlockError(f"{what}: {os.strerror(ctypes.get_errno())}")
