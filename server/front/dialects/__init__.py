"""The protocols that clients speak, one file each. `DIALECTS` is the registry: a new protocol is a file and a line.

A request goes to the first dialect that matches its method and path; the last one also answers paths that none has.
"""

from collections.abc import Callable

from server.front.dialects.actuals import Actuals
from server.front.dialects.forecasts import Forecasts
from server.front.dialects.health import Health
from server.front.dialects.kserve_timeseries import KServeTimeSeries
from server.front.dialects.mlflow import MLflow
from server.front.dialects.multi_model_server import MultiModelServer
from server.front.dialects.nixtla import Nixtla
from server.front.dialects.open_inference import OpenInference
from server.front.dialects.sagemaker import SageMaker
from server.front.dialects.sagemaker_streams import SageMakerStreams
from server.front.dialects.torchserve import TorchServe
from server.front.exchange import Dialect
from server.settings import Settings

MakeDialect = Callable[[Settings], Dialect]

DIALECTS: tuple[MakeDialect, ...] = (
    SageMaker,
    Forecasts,
    Actuals,
    Nixtla,
    MLflow,
    KServeTimeSeries,
    SageMakerStreams,
    OpenInference,
    Health,
    TorchServe,
)


def choose_dialects(settings: Settings) -> tuple[MakeDialect, ...]:
    """The dialects of a listener with these settings.

    Multi Model Server's stands in TorchServe's place where it is chosen, and in a container: there clients speak with
    SageMaker's platform, and this with the container, so that SageMaker's own dialect would have no client.
    """
    others = tuple(dialect for dialect in DIALECTS if dialect is not TorchServe)
    if settings.container != "off":
        return (*(dialect for dialect in others if dialect is not SageMaker), MultiModelServer)
    return (*others, MultiModelServer) if settings.model_server_api == "mms" else DIALECTS
