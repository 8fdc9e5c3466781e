"""Long jobs for tests of other parts."""

import asyncio
import math

from server.ipc.pulse import Pulse
from server.worker.long_jobs import LongJobs


def make_unsliced_jobs() -> LongJobs:
    """Long jobs for which no request is long, so that batches do not depend on how fast this machine is."""
    return LongJobs(asyncio.get_running_loop(), Pulse(), slice_s=math.inf, long_s=math.inf)
