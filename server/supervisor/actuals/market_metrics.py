"""Coverage, loss and drift of markets in Prometheus, with as many series as the setting allows. In the supervisor.

The markets that come first by name have series of their own; all others are added up as `other`, so that the number of
series does not grow with the fleet. Counters begin anew where a record was reset or its shape changed.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server import contract
from server.bands.book import Book
from server.bands.market import MarketRecord, find_bands
from server.contract import METRIC_PREFIX, MetricSpec
from server.settings import Settings
from server.supervisor.actuals.report import MarketReport, choose_record, report_market

OTHER = "other"


class Watched(Protocol):
    """What is shown: `server.supervisor.actuals.service`."""

    settings: Settings
    book: Book
    not_kept: int
    unknown: int


class MarketFamilies(Collector):
    """See the module."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        """All families, now."""
        book = self._watched.book
        results = dict(zip(("paired", "repeated", "unmatched"), book.observed, strict=True))
        results["unmatched"] += self._watched.unknown
        yield _count(contract.ACTUALS, results)
        kept = dict(zip(("kept", "overlapping", "dropped"), book.forecasts, strict=True))
        kept["dropped"] += self._watched.not_kept
        yield _count(contract.FORECASTS_KEPT, kept)
        names = sorted(book.records)
        shown = names[: self._watched.settings.actuals_metrics]
        groups = {name: [choose_record(book.records[name])] for name in shown}
        rest = [choose_record(book.records[name]) for name in names[len(shown) :]]
        if rest:
            groups[OTHER] = rest
        yield from _list_series(groups)


def _count(spec: MetricSpec, values: dict[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(METRIC_PREFIX + spec.name, spec.help, labels=spec.labels)
    for label, value in values.items():
        family.add_metric([label], value)
    return family


def _list_series(groups: dict[str, list[MarketRecord]]) -> Iterator[Metric]:
    """The families with a series for each group of markets."""
    specs = (contract.PAIRED_PRICES, contract.BAND_HITS, contract.DRIFT_ALARMS)
    prices, hits, alarms = (CounterMetricFamily(METRIC_PREFIX + s.name, s.help, labels=s.labels) for s in specs)
    gauges = (contract.BAND_COVERAGE, contract.PINBALL_TO_NAIVE, contract.DRIFT)
    coverage, pinball, drift = (GaugeMetricFamily(METRIC_PREFIX + s.name, s.help, labels=s.labels) for s in gauges)
    for name, records in groups.items():
        reports = [report_market(name, record, whole=False) for record in records]
        prices.add_metric([name], sum(record.total for record in records))
        alarms.add_metric([name], sum(record.drift.alarms for record in records))
        drift.add_metric([name], sum(report.drifts for report in reports))
        for band, value in _sum_hits(records).items():
            hits.add_metric([name, band], value)
        for band, share in _average_coverage(reports).items():
            coverage.add_metric([name, band], share)
        ratios = [report.pinball_to_naive for report in reports if report.pinball_to_naive is not None]
        if ratios:
            pinball.add_metric([name], sum(ratios) / len(ratios))
    yield from (prices, hits, coverage, pinball, drift, alarms)


def _sum_hits(records: Sequence[MarketRecord]) -> dict[str, int]:
    found: dict[str, int] = {}
    for record in records:
        for band, inside in zip(find_bands(record.shape), record.inside, strict=False):  # empty before the first price
            label = f"{band.nominal:g}"
            found[label] = found.get(label, 0) + inside
    return found


def _average_coverage(reports: Sequence[MarketReport]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for report in reports:
        for band in report.bands:
            found.setdefault(f"{band.promised:g}", []).append(band.covered)
    return {label: sum(each) / len(each) for label, each in found.items()}
