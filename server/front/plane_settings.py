"""The data plane of a front as the settings have it, whatever its listener speaks."""

import os

from server.front.background import BackgroundJobs
from server.front.backlog import Bounds
from server.front.dataplane import DataPlane
from server.front.handler_calls import open_code_calls
from server.front.together import TogetherPlane
from server.front.torchserve_metrics import RegisteredFamilies
from server.metrics import FrontMetrics
from server.settings import Settings

DRAIN_SHARE = 0.7  #: of `drain_s` that background jobs may go on for; in the rest they say what became of them


def open_plane(settings: Settings, metrics: FrontMetrics) -> DataPlane:
    """A data plane without workers. What its registered models count is shown with `metrics`."""
    bounds = Bounds(settings.queue_per_worker, settings.queue_per_model)
    plane = TogetherPlane(int(settings.max_inflight_bytes), bounds, open_code_calls(settings))
    plane.background = BackgroundJobs(settings.drain_s * DRAIN_SHARE)
    plane.clients_control = settings.repository_control == "on"
    metrics.registry.register(RegisteredFamilies(plane.registrations, os.uname().nodename))
    return plane
