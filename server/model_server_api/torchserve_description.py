"""The OpenAPI descriptions that TorchServe's clients get by `OPTIONS`, of the paths that this server has. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from server.sdk import __version__

TITLE = "TorchServe APIs"
FIRST_ERROR = 400
Parameter = Mapping[str, Any]
Paths = Mapping[str, Mapping[str, Any]]

_ERROR_FIELDS = {
    "code": {"type": "integer", "description": "HTTP status code."},
    "type": {"type": "string", "description": "Kind of error."},
    "message": {"type": "string", "description": "What was wrong, and what to do."},
}
_MEANINGS = {
    200: "OK",
    202: "Accepted: it goes on in the background",
    400: "A parameter is missing or wrong",
    403: "Not allowed in this state",
    404: "No such model or version",
    409: "Registered already",
    500: "The server or the archive's code failed",
    503: "No worker, or too many requests",
    507: "Not enough memory",
}
_BINARY = {"*/*": {"schema": {"type": "string", "format": "binary"}}}


def describe_inference() -> dict[str, Any]:
    """All paths of the inference listener."""
    model, version = _path("model_name", "Name of the model."), _path("model_version", "Version of the model.")
    answers, statuses = "An answer of the model's", (400, 404, 500, 503, 507)
    return _describe(
        {
            "/": {"options": _operation("apiDescription", "This description.")},
            "/ping": {"get": _operation("ping", "Whether the server is alive.")},
            "/v1/models/{model_name}:predict": {"post": _predict("predictions", answers, [model], statuses)},
            "/v1/models/{model_name}:explain": {"post": _predict("explanations", answers, [model], statuses)},
            "/v2/models/{model_name}/infer": {"post": _predict("predictions", "Tensors (V2)", [model], statuses)},
            "/predictions/{model_name}": {"post": _predict("predictions", answers, [model], statuses)},
            "/predictions/{model_name}/{model_version}": {
                "post": _predict("version_predictions", answers, [model, version], statuses)
            },
            "/explanations/{model_name}": {"post": _predict("explanations", answers, [model], statuses)},
            "/models/{model_name}/invoke": {"post": _predict("invoke", answers, [model], statuses)},
            "/invocations": {"post": _predict("invocations", answers, [_query("model_name", "string")], statuses)},
            "/api-description": {"get": _operation("api-description", "This description.")},
        }
    )


def describe_model(name: str) -> dict[str, Any]:
    """The paths of one model on the inference listener."""
    statuses = (404, 500, 503)
    paths = {
        path: {"post": _predict(name, f"An answer of {name}.", [], statuses)}
        for path in (f"/predictions/{name}", "/v1/models/{model_name}:predict", "/v2/models/{model_name}/infer")
    }
    return {"openapi": "3.0.1", "info": {"title": f"RESTful API for: {name}", "version": "1.0.0"}, "paths": paths}


def describe_management(timeout_s: float) -> dict[str, Any]:
    """All paths of the management listener that TorchServe has. `timeout_s`: by default for an answer."""
    own = {"/fleet/models": {"get": _operation("fleet", "Models that are resident, of this server's own API.")}}
    return _describe({**_list_collection(timeout_s), **_list_model_paths(), **_list_description(), **own})


def describe_management_of(name: str) -> dict[str, Any]:
    """The paths of one model on the management listener."""
    info = {"title": f"RESTful Management API for: {name}", "version": __version__}
    return {"openapi": "3.0.1", "info": info, "paths": _list_model_paths()}


def describe_metrics() -> dict[str, Any]:
    """The path of the metrics listener."""
    return _describe(_list_metrics())


def _describe(paths: Paths) -> dict[str, Any]:
    info = {"title": TITLE, "description": "Fleetcast, as clients of TorchServe speak to it", "version": __version__}
    return {"openapi": "3.0.1", "info": info, "paths": paths}


def _list_metrics() -> Paths:
    names = _query("name[]", "string", "Names of the metrics that are wanted; all without it.")
    return {"/metrics": {"get": _operation("metrics", "Metrics in Prometheus's text format.", [names], (500,))}}


def _list_description() -> Paths:
    described = _operation("api-description", "This description.")
    return {"/api-description": {"get": described}, "/": {"options": _operation("apiDescription", "The same.")}}


def _list_collection(timeout_s: float) -> Paths:
    registering = [
        _query("url", "string", "The archive's key in the store, or a URL below it.", required=True),
        _query("model_name", "string", "Name of the model; else the archive's own."),
        _query("handler", "string", "The archive's own handler, which is called; no other."),
        _query("runtime", "string", "python"),
        _query("batch_size", "integer", "Requests of a batch.", default=1),
        _query("max_batch_delay", "integer", "Milliseconds that a batch is collected for.", default=100),
        _query("response_timeout", "integer", "Seconds in which a request is answered.", default=int(timeout_s)),
        _query("startup_timeout", "integer", "Seconds of a load.", default=int(timeout_s)),
        _query("initial_workers", "integer", "0: it answers nothing until it is scaled.", default=0),
        _query("synchronous", "boolean", "Answer when it is loaded.", default=False),
        _query("s3_sse_kms", "boolean", "Of no meaning here: the store's settings decide.", default=False),
    ]
    listing = [
        _query("limit", "integer", "Most models of an answer.", default=100),
        _query("next_page_token", "string", "`nextPageToken` of the answer before."),
    ]
    statuses = (202, 400, 404, 409, 500, 507)
    return {
        "/models": {
            "get": _operation("listModels", "Registered models.", listing, (500,)),
            "post": _operation("registerModel", "Register an archive of the store.", registering, statuses),
        }
    }


def _list_model_paths() -> Paths:
    model, version = _path("model_name", "Name of the model."), _path("model_version", "Version of the model.")
    paths: dict[str, Mapping[str, Any]] = {}
    for path, prefix, where in (
        ("/models/{model_name}", "", [model]),
        ("/models/{model_name}/{model_version}", "version_", [model, version]),
    ):
        paths[path] = {
            "get": _operation(f"{prefix}describeModel", "What is known of a model.", where, (404, 500)),
            "put": _operation(
                f"{prefix}setAutoScale", "Give it workers.", [*where, *_list_scaling()], (202, 400, 404, 500, 507)
            ),
            "delete": _operation(
                f"{prefix}unregisterModel", "Its memory is free then.", [*where, *_list_waiting()], (403, 404, 500)
            ),
        }
    paths["/models/{model_name}/{model_version}/set-default"] = {
        "put": _operation("setDefault", "Answer with this version.", [model, version], (404, 500))
    }
    return paths


def _list_scaling() -> Sequence[Parameter]:
    least = _query("min_worker", "integer", "0: its memory is freed.", default=1)
    most = _query("max_worker", "integer", "Not less than min_worker.", default=1)
    return [least, most, _query("number_gpu", "integer", "Of no meaning here.", default=0), *_list_waiting()]


def _list_waiting() -> Sequence[Parameter]:
    synchronous = _query("synchronous", "boolean", "Answer when it is done.", default=False)
    return [synchronous, _query("timeout", "integer", "Of no meaning here: time-outs are settings.", default=-1)]


def _predict(name: str, text: str, where: Sequence[Parameter], statuses: Sequence[int]) -> Mapping[str, Any]:
    return {
        **_operation(name, text, where, statuses),
        "requestBody": {"description": "As the model has it.", "content": _BINARY, "required": True},
    }


def _operation(
    name: str, text: str, parameters: Sequence[Parameter] = (), statuses: Sequence[int] = (500,)
) -> Mapping[str, Any]:
    error = {"type": "object", "required": ["code", "type", "message"], "properties": _ERROR_FIELDS}
    responses: dict[str, Any] = {"200": {"description": _MEANINGS[200]}}
    for status in statuses:
        described: dict[str, Any] = {"description": _MEANINGS[status]}
        if status >= FIRST_ERROR:
            described["content"] = {"application/json": {"schema": error}}
        responses[str(status)] = described
    return {"description": text, "operationId": name, "parameters": list(parameters), "responses": responses}


def _path(name: str, text: str) -> Parameter:
    return {"in": "path", "name": name, "description": text, "required": True, "schema": {"type": "string"}}


def _query(name: str, kind: str, text: str = "", *, required: bool = False, default: object = None) -> Parameter:
    schema = {"type": kind} if default is None else {"type": kind, "default": default}
    return {"in": "query", "name": name, "description": text, "required": required, "schema": schema}
