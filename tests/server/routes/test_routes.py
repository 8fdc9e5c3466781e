"""The table of routes says what the dialects do, and the document that is made of it is one of OpenAPI 3.1."""

import asyncio
import re
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.routing import BaseRoute, Match

from loadtest.driver.dialects import DIALECTS
from server.contract import HEADER_QUALITY, HEADER_WARNING
from server.errors import Refused
from server.front.dialects import (
    choose_dialects,
    forecasts,
    kserve_timeseries,
    mlflow,
    nixtla,
    open_inference,
    sagemaker,
    torchserve,
)
from server.front.exchange import Dialect
from server.model_server_api import mms_errors
from server.routes.inference import PROTOCOLS, choose_protocols
from server.routes.management import FLEET, METRICS, MMS_MANAGEMENT, TORCHSERVE_MANAGEMENT, choose_management
from server.routes.openapi import SCHEMAS, build_document
from server.routes.record import Route
from server.settings import Settings
from server.supervisor.management_api import management_app
from server.supervisor.supervisor import Supervisor

CHOSEN = [("torchserve", "off"), ("mms", "off"), ("torchserve", "multi-model")]


def make_dialects(api: str, container: str) -> list[Dialect]:
    """The dialects of a listener with these settings."""
    settings = Settings.model_validate({"store": "models", "model_server_api": api, "container": container})
    return [make(settings) for make in choose_dialects(settings)]


def fill_in(path: str) -> tuple[str, bytes]:
    """A path and a query of a template, with a name that has slashes."""
    filled = path.replace("{model}", "au/m.mar").replace("{version}", "1").replace("{endpoint}", "any")
    place, _, query = filled.partition("?")
    return place, query.encode()


def find_operation(dialect: Dialect, route: Route) -> str | None:
    """What the dialect calls it; None where it is not its route."""
    path, query = fill_in(route.path)
    found = dialect.match(route.method, path, query)
    return None if found is None else found.name


@pytest.mark.parametrize(("api", "container"), CHOSEN)
def test_the_table_has_the_dialects_of_a_listener(api: str, container: str) -> None:
    """The same protocols in the same order, by the same names; each dialect has its own part of the table."""
    dialects = make_dialects(api, container)
    assert [each.name for each in dialects] == [each.name for each in choose_protocols(api, container)]
    assert all(each.routes is PROTOCOLS[each.name] for each in dialects)


@pytest.mark.parametrize(("api", "container"), CHOSEN)
def test_each_route_is_matched_as_the_table_says(api: str, container: str) -> None:
    """By the dialect that has it, before any other takes it, with the operation of that name."""
    dialects = make_dialects(api, container)
    for owner in dialects:
        for route in owner.routes.routes:
            for dialect in dialects:
                found = find_operation(dialect, route)
                if found is not None:
                    assert (dialect.name, found) == (owner.name, route.operation), route
                    break
            else:
                pytest.fail(f"no dialect takes {route}")


@pytest.mark.parametrize("dialect", make_dialects("torchserve", "off"), ids=lambda dialect: dialect.name)
def test_no_operation_is_missing_from_the_table(dialect: Dialect) -> None:
    """What `match` gives for any of the paths and methods of any protocol is a route of the table."""
    listed = {(route.method, *fill_in(route.path)): route.operation for route in dialect.routes.routes}
    paths = {fill_in(route.path) for each in PROTOCOLS.values() for route in each.routes}
    for path, query in sorted(paths):
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            try:
                found = dialect.match(method, path, query)
            except Refused:
                assert (method, path, query) not in listed
                continue
            if found is not None and (method, path, query) not in listed:
                takes_any = dialect.name in ("health", "torchserve", "mms")  # archived servers take any method
                assert takes_any, (method, path)
                assert any(path == place for _, place, _ in listed), path


@pytest.mark.parametrize(
    ("name", "statuses"),
    [
        ("sagemaker", {code.status for code in sagemaker.ERRORS.values()} | {429}),
        ("forecasts", set(forecasts.STATUS.values()) | {429}),
        ("nixtla", set(nixtla.STATUS.values()) | {429, 501}),
        ("mlflow", set(mlflow.STATUS.values()) | {429}),
        ("kserve", set(kserve_timeseries.STATUS.values()) | {422, 429}),
        ("sagemaker_streams", {code.status for code in sagemaker.ERRORS.values()} | {429}),
        ("v2", set(open_inference.STATUS.values())),
        ("torchserve", {code.status for code in torchserve.ERRORS.values()}),
        ("mms", {status for status, _ in mms_errors.ERRORS.values()}),
    ],
)
def test_the_table_has_each_status_of_an_error(name: str, statuses: set[int]) -> None:
    """Of the dialect's own table of situations, and no other."""
    assert set(PROTOCOLS[name].errors) == statuses


def test_the_load_tester_asks_routes_of_the_table() -> None:
    """Each path that it builds is one of a protocol."""
    patterns = [
        re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(route.path.partition("?")[0])))
        for each in PROTOCOLS.values()
        for route in each.routes
    ]
    for dialect in (each for each in DIALECTS.values() if not each.is_grpc):
        path = dialect.path.partition("?")[0].replace("{model}", "au/m.mar")
        assert any(pattern.fullmatch(path) for pattern in patterns), path


@pytest.mark.slow
def test_the_document_is_one_of_openapi() -> None:
    """Valid, with every route that has no query in its path, and no schema that is not there."""
    listeners = [
        ("http://i", tuple(PROTOCOLS.values())),
        ("http://m", (FLEET, TORCHSERVE_MANAGEMENT, MMS_MANAGEMENT)),
        ("http://s", (METRICS,)),
    ]
    document = build_document("1", listeners)
    OpenAPIV31SpecValidator(document).validate()
    everywhere = [route for _, protocols in listeners for each in protocols for route in each.routes]
    assert {route.path for route in everywhere if "?" not in route.path} == set(document["paths"])
    named = {route.schema for route in everywhere if route.schema} | {each.error_schema for each in PROTOCOLS.values()}
    assert named <= SCHEMAS.keys()
    (model_name,) = [each for each in document["paths"]["/invocations"]["post"]["parameters"] if each["in"] == "query"]
    assert (model_name["name"], model_name["required"]) == ("model_name", False)
    assert find_server(document, "/v1/forecasts") == "http://i"
    assert find_server(document, "/fleet/models") == "http://m"


def find_server(document: dict[str, Any], path: str) -> str:
    """The address of the listener that has the path."""
    server: str = document["paths"][path]["servers"][0]["url"]
    return server


@pytest.mark.parametrize(("api", "container"), CHOSEN)
def test_the_management_listener_has_the_routes_of_the_table(api: str, container: str) -> None:
    """Each method and path of the table is taken by the application, and it has no other path."""
    given = {"store": "models", "model_server_api": api, "container": container}

    async def list_routes() -> list[BaseRoute]:
        return management_app(Supervisor(Settings.model_validate(given)), {}).routes

    routes = asyncio.run(list_routes())
    listed = [route for each in choose_management(api, container) for route in each.routes]
    for route in listed:
        path, _ = fill_in(route.path.replace("{file}", "docs.js"))
        scope = {"type": "http", "method": route.method, "path": path, "root_path": ""}
        assert any(each.matches(scope)[0] is Match.FULL for each in routes), route
    paths = [fill_in(route.path.replace("{file}", "docs.js"))[0] for route in listed]
    paths.append("/models/")  # another spelling, which clients of TorchServe use
    for each in routes:
        scopes = [{"type": "http", "method": "GET", "path": path, "root_path": ""} for path in paths]
        assert any(each.matches(scope)[0] is not Match.NONE for scope in scopes), each


def test_forecasting_routes_say_their_marks() -> None:
    """Routes that take a forecast request have the headers of doubtful histories and warnings, probes have none."""
    paths = build_document("1", [("http://a", choose_protocols("torchserve", "off"))])["paths"]
    for path in ("/invocations", "/v1/forecasts", "/v1/timeseries/forecast", "/v2/forecast"):
        headers = paths[path]["post"]["responses"]["200"]["headers"]
        assert list(headers) == [HEADER_QUALITY, HEADER_WARNING], path
    assert "headers" not in paths["/ping"]["get"]["responses"]["200"]
