"""Reports, page and metrics: they say what the book has, names are escaped, and series do not grow with the fleet."""

import struct
from collections.abc import Iterator
from xml.etree import ElementTree as ET

import pytest

from server.bands.adaptive_offsets import DAY, HOUR, BandShape
from server.bands.book import Book, Price
from server.bands.market import AnsweredForecast
from server.settings import Settings
from server.supervisor.actuals.market_metrics import OTHER, MarketFamilies
from server.supervisor.actuals.page import render_page
from server.supervisor.actuals.report import SHOWN_DAYS, list_reports

SHAPE = BandShape((0.1, 0.5, 0.9), HOUR, "UTC")
NASTY = '<script>alert("1")</script>&.mar'


def fill_book(names: list[str], days: int = 40) -> Book:
    """Each archive has forecast 0 to 10 for so many days, and every third price was above."""
    book = Book()
    for name in names:
        for day in range(days):
            levels = struct.pack("<3f", 0.0, 5.0, 10.0) * 24
            book.note_forecast(AnsweredForecast(name, "v7", "", day, SHAPE, day * DAY, levels), 1000)
            for hour in range(24):
                book.pair(name, Price(day * DAY + hour * HOUR, False, 20.0 if hour % 3 == 0 else 4.0))
    return book


def test_a_report_is_of_the_last_days() -> None:
    """Coverage, loss beside the naive forecast, which here knows all, and a row a day."""
    (report,), more = list_reports(fill_book(["a"]), "", "", 10, whole=True)
    assert not more
    assert (report.prices, report.version, report.waiting, len(report.days)) == (40 * 24, "v7", 0, SHOWN_DAYS)
    assert [band.promised for band in report.bands] == [0.8]
    assert report.bands[0].covered == pytest.approx(2 / 3)
    assert report.pinball_to_naive is None
    assert report.days[-1].day == "1970-02-09"
    assert report.pinball == pytest.approx(report.days[0].pinball)


def test_pages_of_reports_follow_each_other() -> None:
    """By name, after a name, with a prefix."""
    book = fill_book(["b/1", "a/1", "a/2"], days=1)
    first, more = list_reports(book, "a/", "", 1, whole=False)
    assert ([each.model for each in first], more) == (["a/1"], True)
    second, more = list_reports(book, "a/", "a/1", 1, whole=False)
    assert ([each.model for each in second], more) == (["a/2"], False)
    assert second[0].days == []


def test_the_page_is_whole_and_escapes_names() -> None:
    """It parses as XML, a name is text in it, and it fetches nothing but its style."""
    reports, _ = list_reports(fill_book([NASTY], days=3), "", "", 10, whole=True)
    page = render_page(reports, is_on=True, prefix="<x>&", following=NASTY)
    body = page[page.index("<body>") :].removesuffix("</html>\n")
    parsed = ET.fromstring(body)
    assert parsed.find(".//tr[2]/td").text == NASTY  # type: ignore[union-attr]
    assert not parsed.findall(".//script")
    assert "<script" not in page
    assert "http" not in page
    assert page.count("<svg") == 1


def test_an_empty_page_says_how_to_fill_it() -> None:
    """Without a folder and without forecasts."""
    assert "--actuals" in render_page([], is_on=False)
    assert "/v1/actuals" in render_page([], is_on=True)


class Watched:
    """A book, and how many series it may have."""

    def __init__(self, book: Book, most: int) -> None:
        self.settings = Settings.model_validate({"store": "models", "actuals_metrics": most})
        self.book, self.not_kept, self.unknown = book, 2, 5


def list_samples(watched: Watched) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """All samples."""
    for family in MarketFamilies(watched).collect():
        for sample in family.samples:
            yield sample.name.removeprefix("fleetcast_"), tuple(sample.labels.values()), sample.value


def test_series_are_as_many_as_the_setting_allows() -> None:
    """Two archives have their own, twenty are one; counters are sums, coverage is a mean."""
    names = [f"m{i:02}" for i in range(22)]
    samples = {(name, labels): value for name, labels, value in list_samples(Watched(fill_book(names, days=2), 2))}
    models = {labels[0] for name, labels in samples if name == "paired_prices_total"}
    assert models == {"m00", "m01", OTHER}
    assert samples["paired_prices_total", (OTHER,)] == 20 * 48
    assert samples["band_hits_total", (OTHER, "0.8")] == 20 * 32
    assert samples["band_coverage", (OTHER, "0.8")] == pytest.approx(2 / 3)
    assert samples["actuals_total", ("unmatched",)] == 5
    assert samples["forecasts_kept_total", ("dropped",)] == 2
    assert len(samples) < 40


def test_each_product_has_a_row_and_counts_as_one_of_the_series() -> None:
    """Under its archive's name and its own; beyond the setting products are added up as archives are."""
    book = fill_book(["a.mar"], days=1)
    levels = struct.pack("<3f", 0.0, 5.0, 10.0) * 48
    book.note_forecast(AnsweredForecast("lu.mar", "v7", "", 0, SHAPE, 0, levels, ("energy", "reserve")), 1000)
    book.pair("lu.mar#reserve", Price(0, False, 5.0))
    reports, more = list_reports(book, "lu.mar", "", 10, whole=False)
    assert [(each.model, each.prices, len(each.bands)) for each in reports] == [
        ("lu.mar#energy", 0, 0),
        ("lu.mar#reserve", 1, 1),
    ]
    assert not more
    page = render_page(reports, is_on=True)
    assert "<td>lu.mar#energy</td><td>0</td><td>-</td>" in page
    assert '<td>lu.mar#reserve</td><td>1</td><td class="off">100.0%</td>' in page
    prices = {labels: value for name, labels, value in list_samples(Watched(book, 2)) if "paired_prices" in name}
    assert prices == {("a.mar",): 24, ("lu.mar#energy",): 0, (OTHER,): 1}
