"""The model of one archive in this process, for tools, batches, backtests and the SDK. Imports torch.

A worker computes the same numbers, because it verifies rows with the function that runs them here (`run_row_on_cpu`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from handlers import kinds
from handlers.codecs.codec import JSON
from handlers.errors import RequestError, RunFailed
from handlers.kinds import BuiltModel
from model_store.archives.archive import Archive
from model_store.archives.manifest import ForecastSpec

Failure = RequestError | RunFailed


class Model:
    """A built archive that answers requests in the calling thread. Thread-safe; holds no state of a request."""

    def __init__(self, archive: Archive, built: BuiltModel) -> None:
        self.archive, self.built = archive, built

    def __repr__(self) -> str:
        """For example `<Model au/nsw1.mar: tcn-4f1c2a9b0d3e5a71>`."""
        return f"<Model {self.name}: {self.built.summary}>"

    @property
    def name(self) -> str:
        """The archive's name."""
        return self.archive.name

    @property
    def forecast(self) -> ForecastSpec | None:
        """What the model forecasts; None if it answers tensors, or correlates the forecasts of others."""
        return self.archive.spec.forecast if self.archive.spec else None

    def prove(self) -> bool:
        """Run the archive's golden sample; returns False if it has none. Raises GoldenMismatch."""
        return kinds.prove_model(self.archive, self.built)

    def answer(self, body: bytes, content_type: str = JSON, accept: str = "") -> bytes:
        """Answer the body of a request. Without `accept` the answer has the type of the request.

        Raises RequestError for a wrong request, RunFailed if the model fails or its output is not finite.
        """
        decode: Callable[..., Any] = self.built.body.codec.decode
        call = decode(body, content_type, accept)
        answer: bytes = call.encode(self.built.body.run(call, self.built.row))[0]
        return answer

    def answer_many(self, bodies: Sequence[bytes]) -> list[bytes | Failure]:
        """Answer each request in JSON; returns answers or errors. The requests to a row model share one forward."""
        decode: Callable[..., Any] = self.built.body.codec.decode
        calls = [_try_work(decode, each, JSON, JSON) for each in bodies]
        good = [call for call in calls if not isinstance(call, Failure)]
        found = _try_work(self.built.body.run_all, good, self.built.row) if good else ()
        outputs = iter([found] * len(good) if isinstance(found, RunFailed) else found)  # one failed run fails all
        return [call if isinstance(call, Failure) else _try_work(_encode_answer, call, next(outputs)) for call in calls]


def open_model(archive: Archive) -> Model:
    """Build the model of an archive and check all but the golden sample, which `Model.prove` runs. Raises LoadError."""
    return Model(archive, kinds.build_model(archive))


def _encode_answer(call: Any, outputs: Any) -> bytes:
    if isinstance(outputs, RunFailed):
        raise outputs
    answer: bytes = call.encode(outputs)[0]
    return answer


def _try_work(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of `work`, or the RequestError or RunFailed that it raises."""
    try:
        return work(*arguments)
    except (RequestError, RunFailed) as error:
        return error
