"""What Multi Model Server's clients get by OPTIONS: an OpenAPI 3.0.1 description of its paths. Pure.

It describes what is served here by the names that those clients know. Fronts answer it, and the supervisor on the
management listener.
"""

from collections.abc import Sequence
from typing import Any

OPENAPI = "3.0.1"
Json = dict[str, Any]

_TEXT, _NUMBER, _FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_BYTES = {"type": "string", "format": "binary"}
_CALL_ERRORS = {
    "404": "Model not found",
    "500": "The model's process ended, or the server failed",
    "503": "No worker takes the request, or the handler raised",
}
_SCALE_ERRORS = {"400": "A parameter is wrong", "404": "Model not found", "500": "The model could not be loaded"}


def describe_api(*, predicts: bool = True, manages: bool = True) -> Json:
    """The paths of a listener that predicts, or manages, or does both."""
    paths: Json = {"/": {"options": _operation("apiDescription", "This description.", answer=_object())}}
    if predicts:
        paths |= _describe_predictions()
    if manages:
        paths |= _describe_management()
    return _document("Model Server APIs", "The API of Multi Model Server, as Fleetcast serves it.", paths)


def describe_model_api(model: str) -> Json:
    """How one model is asked. What a body has to hold is the model's own."""
    call = _operation("predict", f"Ask the model {model}.", body="*/*", answer=_BYTES, errors=_CALL_ERRORS)
    path = "/predictions/" + model
    return _document(f"RESTful API for: {model}", "How this model is asked.", {path: {"post": call}})


def _describe_predictions() -> Json:
    """What a model is asked by."""
    in_path, in_query = _parameter("model_name", _TEXT, place="path"), _parameter("model_name", _TEXT)

    def predict(name: str, text: str, where: Json, body: str = "*/*") -> Json:
        errors = _CALL_ERRORS if where["in"] == "path" else {"400": "No model is named", **_CALL_ERRORS}
        return _operation(name, text, [where], body=body, answer=_BYTES, errors=errors)

    api = _operation("predictionsApi", "How a model is asked.", [in_path], answer=_object())
    one = predict("predictions", "Ask a model.", in_path)
    return {
        "/ping": {"get": _operation("ping", "Whether the server lives.", answer=_object(status=_TEXT))},
        "/api-description": {"get": _operation("apiDescription", "This description.", answer=_object())},
        "/predictions/{model_name}": {"post": one, "options": api},
        "/invocations": {"post": predict("invocations", "Ask a model that a parameter names.", in_query)},
        "/models/{model_name}/invoke": {"post": predict("invocations", "Ask a model, as SageMaker does.", in_path)},
        "/{model_name}/predict": {"post": predict("predict", "Ask a model by its older path.", in_path)},
    }


def _describe_management() -> Json:
    """What registers, scales, lists and removes models."""
    in_path = _parameter("model_name", _TEXT, place="path")
    page = [_parameter("limit", _NUMBER), _parameter("next_page_token", _TEXT), _parameter("model_name_pattern", _TEXT)]
    options = ("batch_size", "max_batch_delay", "response_timeout", "initial_workers")
    register = [
        _parameter("url", _TEXT, required=True),
        *(_parameter(name, _TEXT) for name in ("model_name", "handler", "runtime")),
        *(_parameter(name, _NUMBER) for name in options),
        _parameter("synchronous", _FLAG),
    ]
    scale = [in_path, _parameter("min_worker", _NUMBER), _parameter("max_worker", _NUMBER)]
    listed = _object(nextPageToken=_TEXT, models=_array(_object(modelName=_TEXT, modelUrl=_TEXT)))
    said = _object(status=_TEXT)
    registering = {**_SCALE_ERRORS, "409": "The name is taken", "507": "There is no memory for the model"}
    return {
        "/models": {
            "get": _operation("listModels", "The registered models, by name.", page, answer=listed),
            "post": _operation("registerModel", "Register a model.", register, answer=said, errors=registering),
        },
        "/models/{model_name}": {
            "get": _operation(
                "describeModel", "A model and its workers.", [in_path], answer=_model(), errors={"404": "Not found"}
            ),
            "put": _operation(
                "setAutoScale",
                "Give a model workers, or take them.",
                [*scale, _parameter("synchronous", _FLAG)],
                answer=said,
                errors=_SCALE_ERRORS,
            ),
            "delete": _operation(
                "unregisterModel",
                "Remove a model. Its memory is free when the answer leaves.",
                [in_path],
                answer=said,
                errors={"404": "Model not found"},
            ),
        },
    }


def _model() -> Json:
    """A description of one model."""
    worker = _object(id=_TEXT, startTime=_TEXT, status=_TEXT, gpu=_FLAG, memoryUsage=_NUMBER)
    texts = dict.fromkeys(("modelName", "modelVersion", "modelUrl", "runtime"), _TEXT)
    numbers = dict.fromkeys(("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay"), _NUMBER)
    return _object(**texts, **numbers, loadedAtStartup=_FLAG, workers=_array(worker))


def _document(title: str, description: str, paths: Json) -> Json:
    return {
        "openapi": OPENAPI,
        "info": {"title": title, "description": description, "version": "1.0.0"},
        "paths": paths,
    }


def _operation(
    name: str,
    text: str,
    parameters: Sequence[Json] = (),
    *,
    answer: Json,
    body: str = "",
    errors: dict[str, str] | None = None,
) -> Json:
    kind = "*/*" if answer is _BYTES else "application/json"
    responses: Json = {"200": {"description": "OK", "content": {kind: {"schema": answer}}}}
    failed = {"application/json": {"schema": _object(code=_NUMBER, type=_TEXT, message=_TEXT)}}
    for status, why in {**(errors or {}), "500": (errors or {}).get("500", "The server failed")}.items():
        responses[status] = {"description": why, "content": failed}
    asked: Json = {"requestBody": {"content": {body: {"schema": _BYTES}}, "required": True}} if body else {}
    return {"operationId": name, "description": text, "parameters": list(parameters), **asked, "responses": responses}


def _parameter(name: str, schema: Json, place: str = "query", *, required: bool = False) -> Json:
    return {"in": place, "name": name, "required": required or place == "path", "schema": schema}


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties} if properties else {"type": "object"}


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}
