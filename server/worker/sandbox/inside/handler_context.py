"""The `context` that handlers of TorchServe and Multi Model Server get: what their documentation says it has.

Source of the names: TorchServe 0.12 and Multi Model Server 1.1, "Custom service" and "Advanced custom handlers".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from server.worker.sandbox.inside.handler_metrics import HandlerMetrics
from server.worker.sandbox.inside.partial_answers import PartialAnswers
from server.worker.sandbox.inside.request_parts import RequestHeaders

MakeHeaders = Callable[[], RequestHeaders]

OK: Final = 200
FIRST_GPU: Final = 0  #: a worker sees one


class RequestProperties:
    """One request of a batch, and what the handler sets for its answer (`context.request_processor[i]`).

    Its headers are made when the handler first asks for one: most ask for none.
    """

    def __init__(self, make_headers: MakeHeaders) -> None:
        self._make_headers = make_headers
        self._headers: RequestHeaders | None = None
        self._status, self._phrase = OK, ""
        self._answered: dict[str, str] = {}

    def __repr__(self) -> str:
        """For example `<RequestProperties 200, 2 headers>`."""
        return f"<RequestProperties {self._status}, {len(self._answered)} headers>"

    def get_request_property(self, key: str) -> Any:
        """A header of the request, or what is known of a part of its body."""
        return self.get_request_properties().get(key)

    def get_request_properties(self) -> RequestHeaders:
        """All of them."""
        if self._headers is None:
            self._headers = self._make_headers()
        return self._headers

    def report_status(self, code: int, reason_phrase: str | None = None) -> None:
        """Set the status of the answer."""
        self._status, self._phrase = code, reason_phrase or ""

    def get_response_status_code(self) -> int:
        """The status of the answer."""
        return self._status

    def get_response_status_phrase(self) -> str:
        """Its phrase."""
        return self._phrase

    def add_response_property(self, key: str, value: str) -> None:
        """Set a header of the answer."""
        self._answered[key] = value

    @property
    def has_said_nothing(self) -> bool:
        """Whether the answer is the usual one: most handlers set neither status nor headers."""
        return self._status == OK and not (self._phrase or self._answered)

    def get_response_headers(self) -> dict[str, str]:
        """The headers of the answer."""
        return self._answered

    def get_response_header(self, key: str) -> str | None:
        """A header of the answer."""
        return self._answered.get(key)


class HandlerContext:
    """See the module. One for each handler; `begin` gives it the requests of a batch."""

    def __init__(
        self,
        model_name: str,
        model_dir: str,
        manifest: Mapping[str, Any],
        batch_size: int,
        config: Mapping[str, Any],
        gpu_id: int | None = None,
        metrics: HandlerMetrics | None = None,
    ) -> None:
        self.model_name, self.manifest = model_name, manifest
        self.model_yaml_config = config
        self.system_properties: dict[str, Any] = {
            "model_dir": model_dir,
            "gpu_id": gpu_id,
            "batch_size": batch_size,
            "server_name": "MMS",  # as both servers say
            "server_version": "fleetcast",
            "limit_max_image_pixels": True,
        }
        self.metrics = metrics or HandlerMetrics()
        self.cl_socket = PartialAnswers()  #: where TorchServe's function for parts of answers writes
        self.request_ids: dict[int, str] = {}
        self.request_processor: Sequence[RequestProperties] = ()
        self.stopping_criteria = None
        self.header_key_sequence_id = "ts_request_sequence_id"
        self.header_key_sequence_start = "ts_request_sequence_start"
        self.header_key_sequence_end = "ts_request_sequence_end"

    def __repr__(self) -> str:
        """For example `<HandlerContext of au/NSW1.mar, 2 requests>`."""
        return f"<HandlerContext of {self.model_name}, {len(self.request_processor)} requests>"

    def begin_one(self, ident: str, headers: MakeHeaders) -> None:
        """The same of a batch of one request."""
        self.request_ids = {0: ident}
        self.request_processor = [RequestProperties(headers)]

    def begin(self, ids: Sequence[str], headers: Sequence[MakeHeaders]) -> None:
        """The requests of the next batch: the id of each, and what makes its headers."""
        self.request_ids = dict(enumerate(ids))
        self.request_processor = [RequestProperties(each) for each in headers]

    def get_request_id(self, idx: int = 0) -> str | None:
        """The request's id."""
        return self.request_ids.get(idx)

    def get_request_header(self, idx: int, key: str) -> Any:
        """A header of the request."""
        return self.request_processor[idx].get_request_property(key)

    def get_all_request_header(self, idx: int) -> RequestHeaders:
        """All headers of the request."""
        return self.request_processor[idx].get_request_properties()

    def set_response_content_type(self, idx: int, value: str) -> None:
        """Set the content type of an answer."""
        self.set_response_header(idx, "content-type", value)

    def get_response_content_type(self, idx: int) -> str | None:
        """The content type of an answer, if the handler has set it."""
        return self.get_response_headers(idx).get("content-type")

    def set_response_status(self, code: int = OK, phrase: str = "", idx: int = 0) -> None:
        """Set the status of an answer."""
        self.request_processor[idx].report_status(code, phrase)

    def set_all_response_status(self, code: int = OK, phrase: str = "") -> None:
        """Set the status of all answers of the batch."""
        for each in self.request_processor:
            each.report_status(code, phrase)

    def get_response_status(self, idx: int) -> tuple[int, str]:
        """The status of an answer and its phrase."""
        each = self.request_processor[idx]
        return each.get_response_status_code(), each.get_response_status_phrase()

    def get_sequence_id(self, idx: int) -> Any:
        """The header of a stateful client that names its sequence; requests of one may come to any process here."""
        return self.get_request_header(idx, self.header_key_sequence_id)

    def get_response_headers(self, idx: int) -> dict[str, str]:
        """The headers of an answer."""
        return self.request_processor[idx].get_response_headers()

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        """Set a header of an answer."""
        self.request_processor[idx].add_response_property(key, value)
