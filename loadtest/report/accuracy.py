"""The record of `loadtest.accuracy` as one HTML file: accuracy against how often was fitted, and its tables. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from loadtest.report import document
from loadtest.report.charts import NOTHING, Axis, Chart, Line
from loadtest.report.tables import Table

CURVES = 5  #: recipes and mixtures of a chart; the published ensemble is the last line
PEER = "dnn_ensemble"
LEVEL = "DNN ensemble, published, fitted daily"


def page(record: Mapping[str, Any]) -> str:
    """The HTML. Raises KeyError for a record of something else."""
    results = record["results"]
    found = results["markets"]
    return document(
        "page.accuracy.html",
        [_chart(name, each, results["test_days"]) for name, each in found.items()],
        record=record,
        tables=list(_tables(results)),
        left=results["not_reached"],
        commands={name: " ".join(words) for name, words in results["commands"].items()},
    )


def _chart(name: str, found: Mapping[str, Any], days: int) -> Chart:
    """Of one market rMAE by the days between two fits, those of the most fits first; `days` apart is once."""
    curves: dict[str, dict[int, float]] = {}
    for row in found["rows"]:
        curves.setdefault(row["name"], {})[row["every"]] = row["rmae"]
    kept = sorted(curves.items(), key=lambda each: min(each[1].values()))[:CURVES]
    lines = [Line(label, [float(x) for x in sorted(of)], [of[x] for x in sorted(of)]) for label, of in kept]
    peer = found["published"][PEER]["rmae"]
    lines.append(Line(LEVEL, [1.0, float(days)], [peer, peer]))
    says = f"rMAE, lower is better; fitted once is {days} days, the whole test period"
    axis = Axis("days between two fits, logarithmic", log=True)
    return Chart(name, says, axis, Axis("rMAE"), lines, list(range(len(lines))))


def _tables(results: Mapping[str, Any]) -> Iterator[Table]:
    found, days = results["markets"], results["test_days"]
    rows = [[model, *(f"{each['published'][model]['rmae']:.3f}" for each in found.values())]
            for model in next(iter(found.values()))["published"]]  # fmt: skip
    yield Table("Published, fitted daily", ["rMAE", *found], rows, "Lago et al. 2021, scored in this run.")
    for measure, digits in (("rmae", ".3f"), ("pinball", ".3f"), ("coverage", ".1%")):
        cells = {name: {(row["name"], row["every"]): row[measure] for row in each["rows"]}
                 for name, each in found.items()}  # fmt: skip
        keys = dict.fromkeys(key for each in cells.values() for key in each)
        rows = [[f"{key[0]}, {'once' if key[1] == days else f'every {key[1]} days'}",
                 *(format(each[key], digits) if key in each else NOTHING for each in cells.values())]
                for key in keys]  # fmt: skip
        yield Table({"rmae": "rMAE", "pinball": "Pinball loss", "coverage": "In the 80 % interval"}[measure],
                    ["", *found], rows)  # fmt: skip
    ours = dict.fromkeys(key for each in found.values() for key in each["wql"])
    rows = [[key, *(f"{each['wql'][key]:.4f}" if key in each["wql"] else NOTHING for each in found.values())]
            for key in ours]  # fmt: skip
    rows += [[f"{model}, published", *(f"{by_market[name]:.4f}" for name in found)]
             for model, by_market in results["published_wql"].items()]  # fmt: skip
    yield Table("WQL of the last 20 days", ["", *found], rows, "fev-bench's windows and definition.")
