"""Long jobs for tests of other parts."""

import asyncio
import math
from typing import cast

from server.worker.long_jobs import LongJobs
from server.worker.quarantine import Running


def make_unsliced_jobs() -> LongJobs:
    """Long jobs for which no request is long, so that batches do not depend on how fast this machine is."""
    return LongJobs(asyncio.get_running_loop(), cast("Running", None), slice_s=math.inf, long_s=math.inf)
