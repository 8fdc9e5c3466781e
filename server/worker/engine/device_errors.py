"""Errors after which a GPU answers nothing in this process any more, and the end of the process that has them.

After an illegal access, a failed assertion or a hardware fault CUDA's context fails every call with the same error, for
as long as the process lives. Such a worker would refuse its requests faster than the others answer theirs, and so draw
more of them. So it ends at once, its models noted as running: the fronts ask other workers, the supervisor starts it
anew, and a model that does it again is quarantined as any that ends workers. On any thread of a worker.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import torch

from handlers.errors import DeviceFailed
from server.logs import STANDARD_ERROR
from server.worker.engine.cuda_start import shorten_error

EXIT_CODE = 74  #: of a worker that has lost its device (EX_IOERR of sysexits.h)
MOST_CAUSES = 16  #: of an error that are looked at
#: What CUDA says in lower case when there is no memory, or when work cannot be captured: neither outlasts the call.
PASSING = ("out of memory", "captur")
#: How torch begins an error of CUDA that it raises as a plain RuntimeError.
PLAIN = ("cuda error", "cuda driver error", "cudnn error", "cufft error", "cusolver error")
#: Of these, what a kernel that failed before looks like to the libraries.
FAILED = ("execution_failed", "internal_error", "mapping_error", "execution failed")

log = structlog.get_logger()


@contextmanager
def ending_if_lost() -> Iterator[None]:
    """End this process if what runs inside loses the device. Every other error is raised as it is."""
    try:
        yield
    except Exception as error:
        end_if_lost(error)
        raise


def end_if_lost(error: BaseException) -> None:
    """End this process if the error says that the device is lost.

    Nothing is closed: what would be, hangs on a lost device or fails on it.
    """
    if is_lost(error):
        log.error("device_lost", why=shorten_error(error), then="this worker ends and is started again")
        STANDARD_ERROR.flush()
        os._exit(EXIT_CODE)


def is_lost(error: BaseException) -> bool:
    """Whether the error, or one that it followed from, is of a CUDA context that fails from now on. Pure."""
    found: BaseException | None = error
    for _ in range(MOST_CAUSES):
        if found is None:
            return False
        if _says_lost(found):
            return True
        found = found.__cause__ or found.__context__
    return False


def _says_lost(error: BaseException) -> bool:
    if isinstance(error, DeviceFailed):
        return True
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    if any(each in text for each in PASSING):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return text.startswith(PLAIN) and any(each in text for each in FAILED)
