"""Renders a record of `bench accuracy` as one HTML file: accuracy by number of fits, and tables. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loadtest.report import render_document
from loadtest.report.charts import NOTHING, Axis, Chart, ChartLine
from loadtest.report.tables import ReportTable

CURVES = 5  #: most recipes and mixtures of a chart, whose last line is the published ensemble
PEER = "dnn_ensemble"
LEVEL = "DNN ensemble, published, fitted daily"
#: Measure of a row -> title of its table, and the format of its cells.
MEASURES = {
    "rmae": ("rMAE, beside the naive forecast of a day or a week before", ".3f"),
    "rmae_weekly": ("rMAE, beside the week before, as papers print it", ".3f"),
    "rmse": ("RMSE", ".2f"),
    "smape": ("sMAPE", ".1%"),
    "pinball": ("Pinball loss", ".3f"),
    "coverage": ("In the 80 % interval", ".1%"),
    "p_rival": ("p-value, better than the published DNN ensemble (Diebold and Mariano)", ".2g"),
}
Curves = dict[str, dict[int, float]]  #: rMAE by recipe or mixture, and days between two fits


def render_accuracy_page(record: Mapping[str, Any]) -> str:
    """Render the page. Raises KeyError for a record of another benchmark."""
    results = record["results"]
    found, days = results["markets"], results["test_days"]
    curves = {name: _collect_curves(each) for name, each in found.items()}
    kept = _choose_best(list(curves.values()))
    return render_document(
        "page.accuracy.html",
        [_build_chart(name, curves[name], each["published"][PEER]["rmae"], kept, days) for name, each in found.items()],
        record=record,
        tables=list(build_tables(results)),
        left=results["not_reached"],
        commands={name: " ".join(words) for name, words in results["commands"].items()},
    )


def _collect_curves(found: Mapping[str, Any]) -> Curves:
    """Collect the curves of one market."""
    curves: Curves = {}
    for row in found["rows"]:
        curves.setdefault(row["name"], {})[row["every"]] = row["rmae"]
    return curves


def _choose_best(markets: Sequence[Curves]) -> list[str]:
    """Choose the best over all markets among those that all have, so that all charts have the same lines."""
    names = [name for name in markets[0] if all(name in each for each in markets)]
    return sorted(names, key=lambda name: sum(min(each[name].values()) for each in markets))[:CURVES]


def _build_chart(name: str, curves: Curves, peer: float, kept: Sequence[str], days: int) -> Chart:
    """Chart the rMAE of one market by the days between two fits; `days` means a single fit."""
    found = {label: sorted(curves[label].items()) for label in kept}
    lines = [ChartLine(label, [float(x) for x, _ in points], [y for _, y in points]) for label, points in found.items()]
    lines.append(ChartLine(LEVEL, [1.0, float(days)], [peer, peer]))
    says = f"rMAE, lower is better; fitted once is {days} days, the whole test period"
    axis = Axis("days between two fits, logarithmic", log=True)
    return Chart(name, says, axis, Axis("rMAE", near=True), lines, list(range(len(lines))))


def build_tables(results: Mapping[str, Any]) -> Iterator[ReportTable]:
    """Make tables of scores by market: published ones, ours, and those of fev-bench."""
    found, days = results["markets"], results["test_days"]
    rows = [[model, *(f"{each['published'][model]['rmae']:.3f}" for each in found.values())]
            for model in next(iter(found.values()))["published"]]  # fmt: skip
    yield ReportTable("Published, fitted daily", ["rMAE", *found], rows, "Lago et al. 2021, scored in this run.")
    for measure, (title, digits) in MEASURES.items():
        cells = {name: {(row["name"], row["every"]): row[measure] for row in each["rows"] if measure in row}
                 for name, each in found.items()}  # fmt: skip
        keys = dict.fromkeys(key for each in cells.values() for key in each)
        rows = [[f"{key[0]}, {'once' if key[1] == days else f'every {key[1]} days'}",
                 *(format(each[key], digits) if key in each else NOTHING for each in cells.values())]
                for key in keys]  # fmt: skip
        if rows:  # older records have fewer measures
            yield ReportTable(title, ["", *found], rows)
    ours = dict.fromkeys(key for each in found.values() for key in each["wql"])
    rows = [[key, *(f"{each['wql'][key]:.4f}" if key in each["wql"] else NOTHING for each in found.values())]
            for key in ours]  # fmt: skip
    rows += [[f"{model}, published", *(f"{by_market[name]:.4f}" for name in found)]
             for model, by_market in results["published_wql"].items()]  # fmt: skip
    yield ReportTable("WQL of the last 20 days", ["", *found], rows, "fev-bench's windows and definition.")
