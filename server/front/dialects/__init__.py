"""The protocols that clients speak, one file each. `DIALECTS` is the registry: a new protocol is a file and a line.

A request goes to the first dialect that matches its method and path; the last one also answers paths that none has.
"""

from collections.abc import Callable

from server.front.dialects.forecasts import Forecasts
from server.front.dialects.health import Health
from server.front.dialects.open_inference import OpenInference
from server.front.dialects.sagemaker import SageMaker
from server.front.dialects.torchserve import TorchServe
from server.front.exchange import Dialect
from server.settings import Settings

DIALECTS: tuple[Callable[[Settings], Dialect], ...] = (SageMaker, Forecasts, OpenInference, Health, TorchServe)
