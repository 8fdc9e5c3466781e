"""What the kernel sends to a child when its supervisor dies. Called once, at a child's start.

The channel's end says the same to a child that listens. One that is stopped, or in a native call that does not return,
would stay for ever, with its memory and its part of the GPU.
"""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1


def send_on_parent_death(number: signal.Signals) -> None:
    """Have the signal sent when the thread that has started this process ends: the supervisor's only one.

    SIGCONT lets a process that is stopped go on, and does nothing to another.
    """
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
    except (OSError, AttributeError):
        pass  # no such call in this libc: the channel's end must do
