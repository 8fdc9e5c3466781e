"""`docs/tracing.md`: its flags, variables, metrics and spans are those of the program."""

import re
from pathlib import Path

import server
from server import contract
from server.front.tracing import plan, spans
from server.front.tracing.sampling import SAMPLERS
from server.settings import Settings

ROOT = Path(server.__file__).parent.parent
PAGE = (ROOT / "docs/tracing.md").read_text()


def test_flags_of_the_page_are_settings() -> None:
    """And it has all settings of tracing."""
    flags = {name.replace("-", "_") for name in re.findall(r"--((?:otlp|trace)[\w-]*)", PAGE)}
    assert flags == {"otlp_endpoint", "trace_ratio", "traces_per_s"}
    assert flags <= Settings.model_fields.keys()


def test_variables_of_the_page_are_read() -> None:
    """Those of the plan; OpenTelemetry's exporter and resource read the others."""
    source = Path(str(plan.__file__)).read_text() + (ROOT / "server/front/tracing/sampling.py").read_text()
    ours = set(re.findall(r'"(OTEL_\w+)"', source)) - {
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    }
    assert {name for name in ours if name not in PAGE} == set()
    assert all(name.removeprefix("parentbased_") in PAGE for name in SAMPLERS)


def test_spans_of_the_page_are_those_of_the_program() -> None:
    """The tree of the page and that of the module name the same spans."""
    tree = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert tree is not None
    for name in ("read", "infer", "admission", "load", "load.disk", "load.store.get", "queue", "decode", "forward"):
        assert re.search(rf"\b{re.escape(name)}\b", tree[1]), name
        assert name in str(spans.__doc__), name


def test_results_of_traces_are_explained() -> None:
    """Each label of the counter."""
    assert contract.TRACES.series == "fleetcast_traces_total"
    assert all(f"`{result}`" in PAGE for result in contract.TRACE_RESULTS)
