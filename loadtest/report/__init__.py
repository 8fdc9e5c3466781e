"""Renders one load run, or two compared, as one HTML file that needs no network, no server and no other file."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from loadtest.report.charts import NOTHING, TAGS, Chart, build_charts, format_number
from loadtest.report.results_schema import NotAResult, check_record, load_record
from loadtest.report.tables import are_comparable, build_tables, judge_run, list_headlines, list_remarks

__all__ = ["NotAResult", "load_record", "render_document", "render_page", "render_standalone", "write_report"]

HERE = Path(__file__).parent
MOST_RUNS = len(TAGS)
MOST_ROWS = 200  #: most rows of the table behind a chart; a longer one is thinned evenly


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Write the report of one run, or of two compared. Raises NotAResult, OSError, ValueError."""
    names = [path.name for path in paths]
    labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
    out.write_text(render_page([load_record(path) for path in paths], labels), encoding="utf-8")


def render_page(runs: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """Render the HTML of one run, or of two side by side with the names `labels`.

    Raises NotAResult if a run is not the record of a load run, ValueError for another number of runs.
    """
    if not 1 <= len(runs) <= MOST_RUNS or len(labels) != len(runs):
        raise ValueError(f"a report is of one run or two, each with a label, not of {len(runs)} with {len(labels)}")
    records = [check_record(run) for run in runs]
    found = [record["results"] for record in records]
    return render_document(
        "page.html",
        build_charts(found),
        runs=[
            {"tag": tag, "label": label, "record": record, "verdict": judge_run(run), "remarks": list_remarks(run)}
            for tag, label, record, run in zip(TAGS, labels, records, found, strict=False)
        ],
        headlines=list_headlines(found),
        comparable=are_comparable(found),
        tables=build_tables(records),
    )


def render_document(template: str, drawn: Sequence[Chart], **more: Any) -> str:
    """Render a template of this folder with the charts and its other values, as a self-contained page."""
    return render_standalone(
        template, ["page.css"], "page.js", [_describe_chart(chart) for chart in drawn], charts=drawn, **more
    )


def render_standalone(template: str, styles: Sequence[str], script: str, data: object, **more: Any) -> str:
    """Render a template of this folder with uPlot, style sheets, a script and its data, all within the page."""
    library = _find_uplot()
    style = Markup("\n".join(map(_read_text, (library / "uPlot.min.css", *(HERE / name for name in styles)))))  # noqa: S704
    code = Markup("\n".join(map(_read_text, (library / "uPlot.iife.js", HERE / script))))  # noqa: S704
    return (
        _make_environment()
        .get_template(template)
        .render(
            style=style,
            script=code,
            style_hash=_hash_text(style),
            script_hash=_hash_text(code),
            data=_embed_json(data),
            **more,
        )
    )


def _make_environment() -> jinja2.Environment:
    """Make the environment. All text of a run is escaped; only our own style, script and encoded data are safe."""
    house = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    house.globals = {"number": format_number, "behind": _list_table_rows, "nothing": NOTHING}
    return house


def _list_table_rows(chart: Chart) -> tuple[list[list[float | None]], str]:
    """List the rows of the table behind a chart, and a note if there were too many."""
    every = -(-len(chart.rows) // MOST_ROWS)
    said = f"Every {every}th of {len(chart.rows):,} rows." if every > 1 else ""
    return chart.rows[:: max(every, 1)], said


def _describe_chart(chart: Chart) -> dict[str, Any]:
    """Describe a chart for the script of the page. Each line keeps its own x, so that gaps of one run stay gaps."""
    lines = [line._asdict() | {"hue": hue} for line, hue in zip(chart.lines, chart.hues, strict=True)]
    return {"x": asdict(chart.x), "y": asdict(chart.y), "lines": lines}


def _embed_json(data: object) -> Markup:
    """Encode JSON that cannot close the element that contains it."""
    text = msgspec.json.encode(data).decode()
    return Markup(text.replace("<", "\\u003c"))  # noqa: S704


def _find_uplot() -> Path:
    """Find the uPlot (MIT licence) of `uplot-python` without importing the package, which would import IPython."""
    found = find_spec("uplot")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("reports need uPlot: pip install 'fleetcast[load]'")
    return Path(found.submodule_search_locations[0], "static")


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _hash_text(text: str) -> str:
    """Hash an inline script or style for the Content-Security-Policy."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
