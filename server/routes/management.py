"""The routes of the management and metrics listeners. A test proves that the applications have these and no others."""

from server import contract
from server.routes.record import JSON, TEXT, Protocol, Route

_PAGE = (
    ("prefix", "only names that begin so"),
    ("after", "only names that follow this one"),
    ("limit", "rows of a page, at most 1000"),
)
_VERBS = {
    "load": "Load the model, or what its name stands for",
    "unload": "Unload the model everywhere; answered when its memory is free",
    "pin": "Load the model and never evict it",
    "unpin": "Let workers evict the model again",
    "reload": "Ask the store for a new version, and swap it in",
    "release": "Let a model that is in quarantine run again",
    "rollback": "Serve the version that served before",
    "follow": "Follow the store again",
    "forget": "Forget the model's forecasts, scores and adaptive bands",
}

FLEET = Protocol(
    "fleet",
    "Management",
    "operators, `fleetcast retrain --reload`",
    (
        Route("GET", "/fleet/models", "models", "Resident, loading, failed and pinned models, by name", query=_PAGE),
        Route("GET", "/fleet/models/{model}", "describe", "State, holders, what a forecast needs, and an example body"),
        *(Route("POST", f"/fleet/{verb}/{{model}}", verb, summary) for verb, summary in _VERBS.items()),
        Route("GET", "/fleet/versions/{model}", "versions", "Versions that served and can be rolled back to"),
        Route("POST", "/fleet/alias/{model}", "alias", "Set an alias", (JSON,), schema="alias_body"),
        Route("DELETE", "/fleet/alias/{model}", "alias", "Remove an alias"),
        Route("GET", "/fleet/aliases", "aliases", "All aliases"),
        Route("GET", "/fleet/processes", "processes", "Fronts and workers"),
        Route("GET", "/fleet/overview", "overview", "What the fleet is doing, in counts since the server's start"),
        Route("GET", "/fleet/nodes", "nodes", "The nodes of the cluster: how each is, and what it does"),
        Route("GET", "/fleet/sample/{model}", "sample", "The request of the golden sample, or an example"),
        Route("POST", "/fleet/try/{model}", "try", "Answer a request as a client's, to try a model", (JSON,),
              schema="any_object"),
        Route("POST", contract.EVENTS_PATH, "events", "What a store says of changed archives", (JSON,),
              statuses=(202,), schema="any_object"),
        Route("GET", contract.ACCURACY_PATH, "accuracy", "Coverage, loss and drift of the models of which prices came",
              query=(*_PAGE, ("days", "1: with the scores of each day"))),
        Route("GET", contract.ACCURACY_PAGE_PATH, "accuracy-page", "The same as a page", gives=("text/html",)),
        Route("GET", f"{contract.ACCURACY_PAGE_PATH}/{{file}}", "accuracy-page", "What the page needs",
              gives=("text/css",)),
        Route("GET", contract.PING_PATH, "ping", "Whether the process runs"),
        Route("GET", contract.READY_PATH, "ready", "Whether requests are served, by worker", statuses=(200, 503)),
        Route("GET", "/", "console", "The operators' page", gives=("text/html",)),
        Route("GET", "/console/{file}", "console", "What that page needs",
              gives=("text/css", "text/javascript", "image/svg+xml")),
        Route("GET", contract.OPENAPI_PATH, "openapi", "This document"),
        Route("GET", contract.DOCS_PATH, "docs", "A page of all routes", gives=("text/html",)),
        Route("GET", f"{contract.DOCS_PATH}/{{file}}", "docs", "What the page needs",
              gives=("text/css", "text/javascript")),
    ),
    (400, 401, 403, 404, 405, 413, 422, 500, 503, 504, 507),
    "error_object",
)  # fmt: skip
METRICS = Protocol(
    "metrics",
    "Metrics",
    "Prometheus",
    (
        Route("GET", "/metrics", "metrics", "All series, merged over all processes", gives=(TEXT,)),
        Route("GET", contract.TARGETS_PATH, "targets", "The metrics listeners of all nodes, for Prometheus"),
    ),
    (401, 403, 503),
    "error_object",
)


_REGISTRATION = (
    ("url", "the archive: its key, or where it is"),
    ("model_name", "the name to register, by default that of the archive"),
    ("initial_workers", "workers at once"),
    ("synchronous", "whether the answer waits for them"),
)
_WORKERS = (("min_worker", "fewest workers"), ("max_worker", "most workers"), ("synchronous", "whether it waits"))
_LIST = (("limit", "models of a page"), ("next_page_token", "where the page begins"))
_ALTERED = (200, 202)


def _list_registrations(path: str) -> tuple[Route, ...]:
    """The routes of one registered model, or of one of its versions."""
    return (
        Route("GET", path, "describe", "The description of a registered model"),
        Route("PUT", path, "scale", "Give a registered model more or fewer workers", statuses=_ALTERED, query=_WORKERS),
        Route("DELETE", path, "unregister", "Take a registration back", statuses=_ALTERED),
    )


def _list_collection() -> tuple[Route, ...]:
    return (
        Route("GET", "/models", "list", "Registered models", query=_LIST),
        Route(
            "POST", "/models", "register", "Register an archive under a name", statuses=_ALTERED, query=_REGISTRATION
        ),
    )


_DESCRIPTIONS = (
    Route("OPTIONS", "/", "description", "The description of this protocol"),
    Route("GET", "/api-description", "description", "The description of this protocol"),
)
TORCHSERVE_MANAGEMENT = Protocol(
    "torchserve-management",
    "TorchServe's management",
    "clients of TorchServe",
    (
        *_list_collection(),
        *_list_registrations("/models/{model}"),
        Route("OPTIONS", "/models/{model}", "options", "The description of a registered model"),
        *_list_registrations("/models/{model}/{version}"),
        Route("PUT", "/models/{model}/{version}/set-default", "set-default", "Make a version the default"),
        Route("GET", "/v1/models/{model}", "readiness", "Whether a model is ready, as KServe asks"),
        *_DESCRIPTIONS,
    ),
    (400, 401, 403, 404, 405, 409, 413, 500, 503, 507),
    "server_error",
)
MMS_MANAGEMENT = Protocol(
    "mms-management",
    "Multi Model Server's management",
    "clients of Multi Model Server (`--model-server-api mms`), SageMaker's platform (`--container`)",
    (
        *_list_collection(),
        *_list_registrations("/models/{model}"),
        *_DESCRIPTIONS,
        Route("OPTIONS", "/api-description", "description", "The description of this protocol"),
    ),
    (400, 401, 403, 404, 405, 409, 413, 500, 503, 507),
    "server_error",
)


def choose_management(model_server_api: str, container: str) -> tuple[Protocol, ...]:
    """The protocols of the management listener with these settings."""
    is_mms = model_server_api == "mms" or container != "off"
    return FLEET, MMS_MANAGEMENT if is_mms else TORCHSERVE_MANAGEMENT
