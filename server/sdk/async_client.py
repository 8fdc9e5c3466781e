"""The client for programs of asyncio: `Client`'s calls on threads of its own, at most one for each connection."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, Self, TypeVar

from server.contract import JSON
from server.sdk.client import DEFAULT_URL, TIMEOUT_S, Client, ObservedPrices, PairedPrices, Priced, Reply
from server.sdk.errors import FleetcastError
from server.sdk.forecasts import ForecastOptions, ForecastRequest, ForecastResult, OutputType, Start
from server.sdk.protocols import Protocol

P = ParamSpec("P")
T = TypeVar("T")


class AsyncClient:
    """`Client` with awaitable calls; the same arguments, answers and exceptions.

    As many calls run at once as there are `connections`; others wait for their turn. A call that is cancelled is not
    waited for, and ends by its own deadline.
    """

    def __init__(
        self, url: str = DEFAULT_URL, *, timeout_s: float = TIMEOUT_S, connections: int = 8, **others: Any
    ) -> None:
        """`others` are those of `Client`: retries, access_key, token, ssl_context. Raises ValueError as it does."""
        self._client = Client(url, timeout_s=timeout_s, connections=connections, **others)
        self._threads = ThreadPoolExecutor(connections, thread_name_prefix="fleetcast-client")

    def __repr__(self) -> str:
        return f"<Async{repr(self._client)[1:]}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Calls that wait for their turn are cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    async def forecast(
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
        """As `Client.forecast`. Raises FleetcastError."""
        return await self._run(
            self._client.forecast,
            model,
            target=target,
            start=start,
            cat=cat,
            dynamic_feat=dynamic_feat,
            quantiles=quantiles,
            num_samples=num_samples,
            seed=seed,
            output_types=output_types,
        )

    async def forecast_many(
        self, requests: Sequence[ForecastRequest], options: ForecastOptions | None = None
    ) -> list[ForecastResult | FleetcastError]:
        """As `Client.forecast_many`. Raises FleetcastError where the whole call fails."""
        return await self._run(self._client.forecast_many, requests, options)

    async def forecast_table(
        self, table: Any, *, start: Start | None = None, options: ForecastOptions | None = None
    ) -> Any:
        """As `Client.forecast_table`. Raises ImportError, ValueError, FleetcastError."""
        return await self._run(self._client.forecast_table, table, start=start, options=options)

    async def send_prices(self, prices: Mapping[Priced, ObservedPrices]) -> dict[Priced, PairedPrices]:
        """As `Client.send_prices`. Raises FleetcastError."""
        return await self._run(self._client.send_prices, prices)

    async def invoke(
        self,
        model: str,
        body: bytes,
        *,
        content_type: str = JSON,
        accept: str = "",
        protocol: Protocol = Protocol.SAGEMAKER,
        version: str = "",
    ) -> Reply:
        """As `Client.invoke`. Raises FleetcastError, ValueError."""
        return await self._run(
            self._client.invoke,
            model,
            body,
            content_type=content_type,
            accept=accept,
            protocol=protocol,
            version=version,
        )

    async def describe(self, model: str) -> dict[str, Any]:
        """As `Client.describe`. Raises FleetcastError."""
        return await self._run(self._client.describe, model)

    async def example(self, model: str) -> dict[str, Any]:
        """As `Client.example`. Raises FleetcastError, NoExample."""
        return await self._run(self._client.example, model)

    async def _run(self, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(call, *args, **named))
