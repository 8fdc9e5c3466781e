"""The client of a running server: forecasts of one model or of many, requests as they are, and word of new archives."""

import json
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self, TypeVar
from urllib.parse import quote

import msgspec
from msgspec import structs

from model_store.names import ModelName
from server.contract import (
    ACTUALS_PATH,
    FORECASTS_PATH,
    HEADER_TIMEOUT_MS,
    INFERENCE_PORT,
    JSON,
    MODELS_PATH,
    NPY,
    OPEN_INFERENCE_MODELS_PATH,
    verb_path,
)
from server.routes.example_requests import make_example
from server.sdk.arrays import has_fields, read_fields, write_fields
from server.sdk.errors import FleetcastError, Unavailable, Unreachable, error_from_item
from server.sdk.forecasts import (
    ForecastOptions,
    ForecastRequest,
    ForecastResult,
    OutputType,
    Start,
    encode_json,
    format_start,
)
from server.sdk.http_connection import HttpConnection
from server.sdk.protocols import Protocol, write_request
from server.sdk.signing import AccessKey, sign_request
from server.sdk.tables import ARROW, read_table, write_table

DEFAULT_URL = f"http://127.0.0.1:{INFERENCE_PORT}"
TIMEOUT_S = 50.0
GRACE_S = 5.0  #: how much longer than the deadline a client waits: the server's own message is better than none
ITEM_RETRY_S = 0.2  #: before an item of a call is asked again, doubled with each retry
RELOAD_TIMEOUT_S = 60.0
NOT_FOUND = 404


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a request that was sent as it is. `headers` by lower-case name."""

    body: bytes
    content_type: str
    headers: Mapping[str, str]


#: Prices of one model by time.
ObservedPrices = Mapping[str, float | None] | Mapping[datetime, float | None]

#: Whose prices they are: a model, or a model of several products and the name of one.
Priced = TypeVar("Priced", bound=str | tuple[str, str])


class PairedPrices(msgspec.Struct, frozen=True):
    """What became of a model's observed prices: paired with a forecast, had before, or not forecast."""

    target_model: str
    paired: int
    repeated: int
    unmatched: int
    product: str = ""


class _Paired(msgspec.Struct):
    results: list[PairedPrices]


class _Item(msgspec.Struct):
    error: dict[str, Any] | None = None


class _Predictions(msgspec.Struct):
    predictions: list[msgspec.Raw]


_PREDICTIONS = msgspec.json.Decoder(_Predictions)
_PAIRED = msgspec.json.Decoder(_Paired)
_ITEM, _RESULT = msgspec.json.Decoder(_Item), msgspec.json.Decoder(ForecastResult)


def _name_priced(priced: str | tuple[str, str]) -> dict[str, str]:
    if isinstance(priced, str):
        return {"target_model": priced}
    model, product = priced
    return {"target_model": model, "product": product}


class Client:
    """A running server's inference listener. Thread-safe; keeps `connections` open between requests.

    `timeout_s` is each request's deadline, which the server keeps. A request that the server cannot take now is sent
    again up to `retries` times, as soon as the server advises. A server that has tokens or access keys demands `token`,
    or `access_key`, which signs requests (SigV4); the token wins. `ssl_context` says, for an https URL, which
    authorities are trusted and which certificate is shown; None: the system's authorities, no certificate.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: int = 3,
        connections: int = 8,
        access_key: AccessKey | None = None,
        token: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Raises ValueError for a URL that is not one of HTTP."""
        self._http = HttpConnection(
            url,
            timeout_s=timeout_s + GRACE_S,
            retries=retries,
            connections=connections,
            token=token,
            ssl_context=ssl_context,
        )
        self._deadline = {HEADER_TIMEOUT_MS: str(round(timeout_s * 1000))}
        self._access_key, self._retries = None if token else access_key, retries

    def __repr__(self) -> str:
        return f"<Client {self._http.url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def forecast(
        self,
        model: str,
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
        """What the model (a key under the store, `au/nsw1.mar`) forecasts: see ForecastRequest and ForecastOptions.

        Raises FleetcastError: one of its classes, with the server's message.
        """
        request = ForecastRequest(model=model, target=target, start=start, cat=cat, dynamic_feat=dynamic_feat)
        options = ForecastOptions(quantiles=quantiles, num_samples=num_samples, seed=seed, output_types=output_types)
        (result,) = self.forecast_many([request], options)
        if isinstance(result, FleetcastError):
            raise result
        return result

    def forecast_many(
        self, requests: Sequence[ForecastRequest], options: ForecastOptions | None = None
    ) -> list[ForecastResult | FleetcastError]:
        """What each request's model forecasts, by one call, in order; an item that fails has an exception in its place.

        Raises FleetcastError where the whole call fails.
        """
        options = options or ForecastOptions()
        results = self._ask_many(requests, options)
        for attempt in range(self._retries):
            again = [i for i, result in enumerate(results) if isinstance(result, Unavailable)]
            if not again:
                break
            time.sleep(ITEM_RETRY_S * 2**attempt)
            for i, result in zip(again, self._ask_many([requests[i] for i in again], options), strict=True):
                results[i] = result
        both = zip(results, requests, strict=True)
        return [_add_request(result, i, request) for i, (result, request) in enumerate(both)]

    def forecast_table(self, table: Any, *, start: Start | None = None, options: ForecastOptions | None = None) -> Any:
        """Forecasts of many models as a table, by one call: the fastest way to ask hundreds of models.

        `table`: of pyarrow, pandas or polars, or a mapping of columns: `model`, `target` (lists, or an array [rows,
        steps]), `start` unless it is given for all, and covariates under their names; see docs/tables.md. Returns a
        pyarrow table with a row for each step (`item`, `model`, `start`, `step`, `mean`, the levels, `error`); an item
        that failed has one row with its error, and is not asked again. An array of numpy whose rows have such fields is
        answered by another, and needs no pyarrow. Raises ImportError without pyarrow, ValueError for what is no call,
        FleetcastError where the whole call fails.
        """
        shared, options = None if start is None else format_start(start), options or ForecastOptions()
        if has_fields(table):
            body = write_fields(table, shared, options)
            return read_fields(self._post(FORECASTS_PATH, body, {"Content-Type": NPY}).body, self._http.url)
        body = write_table(table, shared, options)
        return read_table(self._post(FORECASTS_PATH, body, {"Content-Type": ARROW}).body, self._http.url)

    def send_prices(self, prices: Mapping[Priced, ObservedPrices]) -> dict[Priced, PairedPrices]:
        """Send observed prices by model and time; those that are None or NaN are left out. All are taken, or none.

        Of a model of several products they are by `(model, product)`. The bands follow them (`serve --actuals`). A time
        without an offset is on the clock of the model's zone. Raises FleetcastError.
        """
        items = [
            {**_name_priced(priced), "stamps": list(map(str, series)), "prices": list(series.values())}
            for priced, series in prices.items()
        ]
        answer = self._post(ACTUALS_PATH, encode_json({"actuals": items}), {"Content-Type": JSON}).body
        try:
            return dict(zip(prices, _PAIRED.decode(answer).results, strict=True))
        except ValueError as error:  # MsgspecError is one
            raise Unreachable(f"{self._http.url}: the answer is not one to prices: {error}") from error

    def _ask_many(
        self, requests: Sequence[ForecastRequest], options: ForecastOptions
    ) -> list[ForecastResult | FleetcastError]:
        """`forecast_many` by one call, whose items are not retried."""
        items = [{"target_model": request.model, **request.to_instance()} for request in requests]
        body = encode_json({"requests": items, "configuration": options.to_configuration()})
        answer = self._post(FORECASTS_PATH, body, {"Content-Type": JSON}).body
        try:
            return [_decode_item(item) for item in _PREDICTIONS.decode(answer).predictions]
        except msgspec.MsgspecError as error:
            raise Unreachable(f"{self._http.url}: the answer is not one of forecasts: {error}") from error

    def invoke(
        self,
        model: str,
        body: bytes,
        *,
        content_type: str = JSON,
        accept: str = "",
        protocol: Protocol = Protocol.SAGEMAKER,
        version: str = "",
    ) -> Reply:
        """Send a request to one model as it is: DeepAR JSON, JSON Lines, tensor JSON or npy. Raises FleetcastError.

        In another `protocol` the body is that protocol's, and `version` is the model's; see `write_request`. Raises
        ValueError as that does.
        """
        asked = write_request(protocol, model, body, version)
        headers = {**asked.headers, "Content-Type": content_type, **({"Accept": accept} if accept else {})}
        return self._post(asked.path, asked.body, headers)

    def describe(self, model: str) -> dict[str, Any]:
        """What the model says of itself: its metadata in the Open Inference Protocol, with `parameters.forecast`.

        This has the length of the history, frequency, zone, covariates by name and order, levels and products. The
        model is loaded for that where it is not. Raises FleetcastError.
        """
        headers = self._sign("GET", path := f"{OPEN_INFERENCE_MODELS_PATH}/{quote(model)}", b"", self._deadline)
        found: dict[str, Any] = json.loads(self._http.request("GET", path, None, headers).data)
        return found

    def example(self, model: str) -> dict[str, Any]:
        """A body that the model answers, with invented numbers. Raises FleetcastError, and NoExample (a ValueError)."""
        return make_example(self.describe(model))

    def _sign(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Mapping[str, str]:
        if self._access_key is None:
            return headers
        return sign_request(self._access_key, method, self._http.url.rstrip("/") + path, headers, body)

    def _post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        headers = self._sign("POST", path, body, {**headers, **self._deadline})
        reply = self._http.request("POST", path, body, headers)
        found = {name.lower(): value for name, value in reply.headers.items()}
        return Reply(reply.data, found.get("content-type", ""), found)


def reload_model(url: str, model: ModelName, token: str | None = None) -> None:
    """Tell the management listener at `url` that the archive has changed; a model that it does not hold is left alone.

    `token`: one of the server's with the scope manage. Returns when the new version serves. Raises FleetcastError that
    names the server and says why it does not, ValueError for a URL that is not one of HTTP.
    """
    with HttpConnection(url, timeout_s=RELOAD_TIMEOUT_S, retries=0, connections=1, token=token) as http:
        try:
            http.request("GET", f"{MODELS_PATH}/{quote(model)}")
            http.request("POST", f"{verb_path('reload')}/{quote(model)}")
        except Unreachable:
            raise
        except FleetcastError as error:
            if error.status != NOT_FOUND:
                raise type(error)(f"{url} did not take {model}: {error}", status=error.status) from error


def _decode_item(item: msgspec.Raw) -> ForecastResult | FleetcastError:
    error = _ITEM.decode(item).error
    return _RESULT.decode(item) if error is None else error_from_item(error)


def _add_request(
    result: ForecastResult | FleetcastError, index: int, request: ForecastRequest
) -> ForecastResult | FleetcastError:
    """What only the caller's request knows: the step of an answer, the place of an error in a call."""
    if isinstance(result, FleetcastError):
        result.instance = index
        return result
    return result if request.step is None else structs.replace(result, step=request.step)
