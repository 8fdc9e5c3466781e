"""A worker that is started ahead: it does what can be done before it knows what it is to be, and then waits.

Started as `python -m server.worker.spare FD ROWS`, as `server.worker.main` is. What a first request would pay for is
paid here: modules that are imported when they are first used, and the first forward of torch.
"""

import gc
import os
import signal
import sys
from contextlib import suppress

import numpy as np
import uvloop
from botocore.exceptions import BotoCoreError

from handlers.forecasters import build_family
from handlers.kinds import run_row_on_cpu
from model_store.errors import LoadError
from model_store.stores.s3_store import make_session
from server.ipc.parent_death import send_on_parent_death
from server.logs import STANDARD_ERROR
from server.worker.main import main

LONGEST_WAIT_S = 1e9  #: for a worker to die


def run_first_forward() -> None:
    """Run a small network once, so that torch has chosen and made what it needs for products."""
    family = build_family("tcn", {"features": 2, "context_length": 96, "prediction_length": 4, "quantiles": 3})
    row = np.zeros(family.row_floats, np.float32)
    run_row_on_cpu(family, row, np.zeros((2, *family.input_shape), np.float32))


def import_store_clients() -> None:
    """Make a client of S3 once and throw it away: that imports most of boto3, which a worker would do at its start."""
    session, _ = make_session(None, "us-east-1")
    session.client("s3", aws_access_key_id="-", aws_secret_access_key="-").close()  # noqa: S106 -- it asks nobody


if __name__ == "__main__":
    send_on_parent_death(signal.SIGKILL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run_first_forward()
    with suppress(BotoCoreError, LoadError, ValueError, OSError):  # of a profile that does not fit: the worker says it
        import_store_clients()
    gc.freeze()  # a walk over what is imported would stop it in the middle of taking rows over
    uvloop.run(main(int(sys.argv[1]), list(map(int, sys.argv[2:])), patience_s=LONGEST_WAIT_S))
    STANDARD_ERROR.flush()
    os._exit(0)  # as `server.worker.main` does
