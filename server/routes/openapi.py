"""The OpenAPI 3.1 document of a server, made of the table of routes. Pure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from server.contract import HEADER_QUALITY, HEADER_WARNING
from server.routes.record import ANY, JSON, Protocol, Route

Schema = dict[str, Any]
_PARAMETER = re.compile(r"\{(\w+)\}")
_TEXT: Schema = {"type": "string"}
_PLACED: Schema = {
    "type": "object",
    "required": ["code", "message"],
    "properties": {"code": _TEXT, "message": _TEXT, "instance": {"type": "integer"}, "field": _TEXT},
}
_NUMBER: Schema = {"type": ["number", "null", "string"]}
_INSTANCE: Schema = {
    "type": "object",
    "required": ["start", "target"],
    "properties": {
        "start": {"type": "string", "examples": ["2026-01-01 00:00:00"]},
        "target": {"type": "array", "items": {"anyOf": [_NUMBER, {"type": "array", "items": _NUMBER}]}},
        "cat": {"type": "array", "items": {"type": "integer"}},
        "dynamic_feat": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        "item_id": {"type": ["string", "integer"]},
    },
}
_CONFIGURATION: Schema = {
    "type": "object",
    "properties": {
        "output_types": {"type": "array", "items": {"enum": ["mean", "quantiles", "samples", "marginal"]}},
        "quantiles": {"type": "array", "items": _TEXT},
        "num_samples": {"type": "integer", "minimum": 1, "maximum": 10_000},
        "seed": {"type": "integer", "minimum": 0},
        "joint": {"type": "boolean"},
        "correlation": _TEXT,
    },
}
_MARKS = {
    HEADER_QUALITY: {
        "description": "codes of doubtful histories and how many predictions have each: `missing=2, flat=1`",
        "schema": _TEXT,
    },
    HEADER_WARNING: {"description": "what else an answer is warned of: `narrow-levels=1`", "schema": _TEXT},
}
#: Schemas of the bodies of routes that may answer a forecast, and then may have these headers.
_FORECASTING = ("model_body", "forecasts_body", "nixtla_body", "mlflow_body", "kserve_body", "v2_infer")
_ITEM: Schema = {
    **_INSTANCE,
    "required": ["target_model", "start", "target"],
    "properties": {"target_model": _TEXT, **_INSTANCE["properties"]},
}
_TENSOR: Schema = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": _TEXT,
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": _TEXT,
        "data": {},
    },
}
SCHEMAS: Mapping[str, Schema] = {
    "any_object": {"type": "object"},
    "error_object": {"type": "object", "required": ["error"], "properties": {"error": _PLACED}},
    "error_text": {"type": "object", "required": ["error"], "properties": {"error": _TEXT}},
    "sagemaker_error": {
        "type": "object",
        "required": ["message"],
        "properties": {"message": _TEXT, "error": _PLACED, "OriginalStatusCode": {"type": "integer"}},
    },
    "server_error": {
        "type": "object",
        "required": ["code", "type", "message"],
        "properties": {"code": {"type": "integer"}, "type": _TEXT, "message": _TEXT},
    },
    "model_body": {
        "type": "object",
        "properties": {"instances": {"type": "array", "items": _INSTANCE}, "configuration": _CONFIGURATION},
    },
    "forecasts_body": {
        "type": "object",
        "required": ["requests"],
        "properties": {"requests": {"type": "array", "items": _ITEM}, "configuration": _CONFIGURATION},
    },
    "actuals_body": {
        "type": "object",
        "required": ["actuals"],
        "properties": {
            "actuals": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["target_model", "stamps", "prices"],
                    "properties": {
                        "target_model": _TEXT,
                        "product": _TEXT,
                        "stamps": {"type": "array", "items": _TEXT, "examples": [["2026-01-01 00:00:00"]]},
                        "prices": {"type": "array", "items": {"type": ["number", "null"]}},
                    },
                },
            }
        },
    },
    "v2_infer": {
        "type": "object",
        "required": ["inputs"],
        "properties": {"inputs": {"type": "array", "items": _TENSOR}, "id": _TEXT, "parameters": {"type": "object"}},
    },
    "error_detail": {"type": "object", "required": ["detail"], "properties": {"detail": _TEXT}},
    "error_code": {
        "type": "object",
        "required": ["error_code", "message"],
        "properties": {"error_code": _TEXT, "message": _TEXT},
    },
    "kserve_error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message", "param", "type"],
                "properties": {"code": _TEXT, "message": _TEXT, "param": {"type": ["string", "null"]}, "type": _TEXT},
            },
            "detail": {"type": "array", "items": {"type": "object"}},
        },
    },
    "nixtla_body": {
        "type": "object",
        "required": ["series", "model", "h", "freq"],
        "properties": {
            "series": {
                "type": "object",
                "required": ["y", "sizes"],
                "properties": {
                    "y": {"type": "array", "items": {"type": ["number", "null"]}},
                    "sizes": {"type": "array", "items": {"type": "integer"}},
                    "start_datetime": {"type": "array", "items": _TEXT},
                },
            },
            "model": _TEXT,
            "h": {"type": "integer", "minimum": 1},
            "freq": _TEXT,
            "level": {"type": "array", "items": {"type": "number"}},
            "n_windows": {"type": "integer", "minimum": 1},
            "detection_size": {"type": "integer", "minimum": 1},
            "multivariate": {"type": "boolean"},
            "n_paths": {"type": "integer", "minimum": 1, "maximum": 10_000},
            "seed": {"type": ["integer", "null"]},
        },
    },
    "mlflow_body": {
        "type": "object",
        "properties": {
            "instances": {"type": "array", "items": _INSTANCE},
            "inputs": {},
            "dataframe_split": {"type": "object"},
            "dataframe_records": {"type": "array", "items": {"type": "object"}},
            "params": _CONFIGURATION,
        },
    },
    "kserve_body": {
        "type": "object",
        "required": ["model", "inputs", "options"],
        "properties": {
            "model": _TEXT,
            "inputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["type", "name", "series", "frequency"],
                    "properties": {
                        "type": {"enum": ["univariate_time_series", "multivariate_time_series"]},
                        "name": _TEXT,
                        "series": {"type": "array"},
                        "frequency": _TEXT,
                        "start_timestamp": _TEXT,
                    },
                },
            },
            "options": {
                "type": "object",
                "required": ["horizon"],
                "properties": {
                    "horizon": {"type": "integer", "minimum": 1},
                    "quantiles": {"type": "array", "items": {"type": "number"}},
                },
            },
        },
    },
    "alias_body": {"type": "object", "required": ["model"], "properties": {"model": _TEXT, "version": _TEXT}},
}


def build_document(version: str, listeners: Sequence[tuple[str, Sequence[Protocol]]]) -> dict[str, Any]:
    """Build the document of these listeners: each its address, and the protocols that it answers.

    A path that two protocols have is described by the first; a route with a query in its path is another's path, and is
    told by that one's parameters.
    """
    paths: dict[str, dict[str, Any]] = {}
    for address, protocols in listeners:
        for protocol in protocols:
            for route in protocol.routes:
                if "?" in route.path:
                    continue
                item = paths.setdefault(route.path, {"servers": [{"url": address}]})
                item.setdefault(route.method.lower(), _describe_operation(protocol, route))
    protocols_by_name = {each.name: each for _, protocols in listeners for each in protocols}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Fleetcast",
            "version": version,
            "description": "A fleet of forecast models in many protocols.",
        },
        "servers": [{"url": address} for address, _ in listeners],
        "tags": [
            {"name": each.name, "description": f"{each.title}: {each.clients}"} for each in protocols_by_name.values()
        ],
        "paths": paths,
        "components": {"schemas": dict(SCHEMAS)},
    }


def _describe_operation(protocol: Protocol, route: Route) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": f"{protocol.name} {route.method} {route.path}",
        "summary": route.summary,
        "tags": [protocol.name],
        "parameters": [*_list_parameters(route)],
        "responses": {
            **{str(status): _describe_answer(protocol.error_schema) for status in protocol.errors},
            **{str(status): _describe_success(route) for status in route.statuses},
        },
    }
    if route.takes:
        schema = {"$ref": f"#/components/schemas/{route.schema}"} if route.schema else {}
        content = {media: {"schema": schema} if media == JSON else {} for media in route.takes if media != ANY}
        found["requestBody"] = {"content": content}
    return found


def _list_parameters(route: Route) -> list[Schema]:
    names = _PARAMETER.findall(route.path)
    listed: list[Schema] = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]
    for place, parameters in (("header", route.headers), ("query", route.query)):
        listed += [
            {"name": name, "in": place, "required": name in route.needed, "description": what, "schema": _TEXT}
            for name, what in parameters
        ]
    return listed


def _describe_success(route: Route) -> dict[str, Any]:
    headers = {"headers": _MARKS} if route.schema in _FORECASTING else {}
    return {"description": "done", "content": {media: {} for media in route.gives}, **headers}


def _describe_answer(schema: str) -> dict[str, Any]:
    return {"description": "refused", "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}
