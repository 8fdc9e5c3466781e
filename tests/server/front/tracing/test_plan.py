"""Settings and OpenTelemetry's variables: what is traced, where to, and what is wrong."""

from collections.abc import Mapping

import pytest

from server.front.tracing.plan import MISSING, plan_tracing, require_exporter

URL = "http://localhost:4318"


def find_url(endpoint: str | None, environment: Mapping[str, str]) -> str | None:
    """Where traces go."""
    plan = plan_tracing(endpoint, None, 20.0, environment)
    return None if plan is None else plan.url


def test_nothing_is_traced_by_itself() -> None:
    """Neither a setting nor a variable: off."""
    assert find_url(None, {}) is None
    assert find_url(None, {"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on"}) is None
    assert find_url("", {"OTEL_EXPORTER_OTLP_ENDPOINT": URL}) is None


def test_the_setting_wins_over_the_variables() -> None:
    """The base gets its path; the variable for traces alone is taken as it is."""
    assert find_url(f"{URL}/", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://other"}) == f"{URL}/v1/traces"
    assert find_url(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": f"{URL}/otlp"}) == f"{URL}/otlp/v1/traces"
    whole = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://other", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://c/t"}
    assert find_url(None, whole) == "https://c/t"


def test_the_variables_turn_it_off() -> None:
    """As the specification says; a setting of ours turns it on all the same."""
    base = {"OTEL_EXPORTER_OTLP_ENDPOINT": URL}
    for off in ({"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}):
        assert find_url(None, {**base, **off}) is None
        assert find_url(URL, off) == f"{URL}/v1/traces"


def test_the_sampler_is_that_of_the_setting_or_the_variable() -> None:
    """Without either all requests are traced whose clients do not say otherwise."""
    plan = plan_tracing(URL, None, 20.0, {})
    assert plan is not None
    assert (plan.sampler.ratio, plan.sampler.follows_parent) == (1.0, True)
    variables = {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}
    plan = plan_tracing(URL, None, 20.0, variables)
    assert plan is not None
    assert (plan.sampler.ratio, plan.sampler.follows_parent) == (0.25, False)
    plan = plan_tracing(URL, 0.5, 20.0, variables)
    assert plan is not None
    assert (plan.sampler.ratio, plan.sampler.follows_parent) == (0.5, True)


@pytest.mark.parametrize(
    ("endpoint", "environment", "named"),
    [
        ("localhost:4318", {}, "otlp_endpoint"),
        ("ftp://host", {}, "otlp_endpoint"),
        ("http://host:port", {}, "otlp_endpoint"),
        ("http://", {}, "otlp_endpoint"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector"}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        (URL, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
        (URL, {"OTEL_TRACES_SAMPLER": "often"}, "OTEL_TRACES_SAMPLER"),
    ],
)
def test_what_is_wrong_is_named(endpoint: str | None, environment: Mapping[str, str], named: str) -> None:
    """The setting or the variable that says it."""
    with pytest.raises(ValueError, match=named):
        plan_tracing(endpoint, None, 20.0, environment)


def test_a_plan_says_what_it_does_without_a_password() -> None:
    """For the lines at the start of a server."""
    plan = plan_tracing("https://me:secret@host/otlp", 0.1, 5.0, {})
    assert plan is not None
    said = "https://host/otlp/v1/traces, 0.1 of requests, others as their clients decided, at most 5 a second and front"
    assert plan.describe() == said


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter is looked for, and not imported."""
    require_exporter()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install 'fleetcast"):
        require_exporter()
    assert "fleetcast[otel]" in MISSING
