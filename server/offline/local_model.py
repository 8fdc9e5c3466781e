"""A model in this process for users of the SDK: `fleetcast.open_model(where).forecast(...)`. Imports torch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from handlers.errors import RequestError, RunFailed
from handlers.model import Model
from handlers.model import open_model as open_archive_model
from model_store.errors import LoadError, ModelNotFound, StoreDenied, StoreUnavailable
from server import contract
from server.offline.archive_location import locate_archive, settings_of_store, split_location
from server.sdk import errors
from server.sdk.forecasts import (
    ForecastOptions,
    ForecastRequest,
    ForecastResult,
    OutputType,
    Start,
    decode_predictions,
    encode_instances,
)


class LocalModel:
    """The model of an archive in this process, with the answers of a server and the exceptions of the client."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __repr__(self) -> str:
        """For example `<LocalModel nsw1.mar: tcn-4f1c2a9b0d3e5a71>`."""
        return f"<LocalModel {self.name}: {self._model.built.summary}>"

    @property
    def name(self) -> str:
        """The archive's name in its store."""
        return self._model.name

    def forecast(
        self,
        *,
        target: Any,
        start: Start,
        cat: Sequence[int] | None = None,
        dynamic_feat: Any = None,
        quantiles: Sequence[float | str] | None = None,
        num_samples: int = 0,
        seed: int | None = None,
        output_types: Sequence[OutputType] | None = None,
    ) -> ForecastResult:
        """Forecast as `Client.forecast` does, without a server. Raises InvalidRequest, ModelFailed."""
        request = ForecastRequest(target=target, start=start, cat=cat, dynamic_feat=dynamic_feat)
        options = ForecastOptions(quantiles=quantiles, num_samples=num_samples, seed=seed, output_types=output_types)
        return self.forecast_many([request], options)[0]

    def forecast_many(
        self, requests: Sequence[ForecastRequest], options: ForecastOptions | None = None
    ) -> list[ForecastResult]:
        """Forecast several series by one forward, in order. Raises InvalidRequest, ModelFailed if any is wrong."""
        found = decode_predictions(self.answer(encode_instances(requests, options or ForecastOptions())))
        return [replace(each, step=one.step) for each, one in zip(found, requests, strict=True)]

    def answer(self, body: bytes, content_type: str = contract.JSON, accept: str = "") -> bytes:
        """Answer the body of a request as `Client.invoke` does. Raises InvalidRequest, ModelFailed."""
        try:
            return self._model.answer(body, content_type, accept)
        except RequestError as error:
            place, field = error.instance, error.field
            raise errors.InvalidRequest(error.message, code="bad_request", instance=place, field=field) from error
        except RunFailed as error:
            raise errors.ModelFailed(str(error), code="model_failed") from error

    def prove(self) -> bool:
        """Run the archive's golden sample; False if it has none. Raises ModelFailed if the answer differs."""
        with _sdk_errors():
            return self._model.prove()


def open_model(where: str | Path) -> LocalModel:
    """Open the model of the archive at `where`: a path, or a store URL such as `s3://models/au/nsw1.mar`.

    A store is reached as `fleetcast serve` reaches it: by the settings' variables and file, and by boto3's chain.
    Raises ModelNotFound, ModelFailed where the archive does not load, Unavailable where the store cannot be reached.
    """
    with _sdk_errors():
        store, name = split_location(str(where))
        archive, _ = locate_archive(settings_of_store(store), name).fetch()
        return LocalModel(open_archive_model(archive))


@contextmanager
def _sdk_errors() -> Iterator[None]:
    try:
        yield
    except ModelNotFound as error:
        raise errors.ModelNotFound(str(error), code="not_found") from error
    except (StoreUnavailable, StoreDenied) as error:
        raise errors.Unavailable(str(error), code="store_failed") from error
    except LoadError as error:
        raise errors.ModelFailed(str(error), code="archive_failed") from error
