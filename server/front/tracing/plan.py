"""Whether a server traces, where to and how much: the settings and OpenTelemetry's own variables together. Pure.

The exporter reads further variables itself: OTEL_EXPORTER_OTLP_HEADERS, _TIMEOUT, _COMPRESSION, _CERTIFICATE and the
like, and OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from server.front.tracing.sampling import ALWAYS, Sampler, read_sampler

TRACES_PATH = "v1/traces"  #: of OTLP/HTTP, below the endpoint
MISSING = "traces need OpenTelemetry's exporter: pip install 'fleetcast[otel]'"


@dataclass(frozen=True, slots=True)
class TracingPlan:
    """`url`: where traces are POSTed as OTLP/HTTP. `per_second`: traces that one front begins on average, at most."""

    url: str
    sampler: Sampler
    per_second: float

    def describe(self) -> str:
        """What it does, for who starts the server; without what the URL may hold of a password."""
        parts = urlsplit(self.url)
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        decided = ", others as their clients decided" if self.sampler.follows_parent else ""
        return f"{place}, {self.sampler.ratio:.3g} of requests{decided}, at most {self.per_second:g} a second and front"


def plan_tracing(
    endpoint: str | None, ratio: float | None, per_second: float, environment: Mapping[str, str]
) -> TracingPlan | None:
    """The plan; None: nothing is traced. `endpoint` and `ratio` are settings, which win over the variables.

    Raises ValueError that says which of them is wrong.
    """
    if endpoint is None:
        if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return None
        if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() not in ("otlp", ""):
            return None
    url, origin = _find_url(endpoint, environment)
    if not url:
        return None
    _check_url(url, origin)
    _check_protocol(environment)
    if ratio is None:
        name = environment.get("OTEL_TRACES_SAMPLER", "").strip() or ALWAYS
        sampler = read_sampler(name, environment.get("OTEL_TRACES_SAMPLER_ARG", "").strip())
    else:
        sampler = Sampler(follows_parent=True, ratio=ratio)
    return TracingPlan(url, sampler, per_second)


def require_exporter() -> None:
    """Raises ValueError where OpenTelemetry's exporter is not installed. It is not imported here."""
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ModuleNotFoundError:
        found = None
    if found is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        raise ValueError(MISSING)


def _find_url(endpoint: str | None, environment: Mapping[str, str]) -> tuple[str, str]:
    """The URL, and what says so."""
    whole = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip()
    if endpoint is None and whole:
        return whole, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    origin = "otlp_endpoint" if endpoint is not None else "OTEL_EXPORTER_OTLP_ENDPOINT"
    base = endpoint if endpoint is not None else environment.get(origin, "")
    return (f"{base.strip().rstrip('/')}/{TRACES_PATH}" if base.strip() else ""), origin


def _check_url(url: str, origin: str) -> None:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError(f"{origin}: {url[:80]!r} is no URL such as http://localhost:4318")


def _check_protocol(environment: Mapping[str, str]) -> None:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        given = environment.get(name, "").strip()
        if given:
            if given != "http/protobuf":
                raise ValueError(f"{name}: traces leave as http/protobuf (port 4318 by custom), not {given[:40]!r}")
            return
