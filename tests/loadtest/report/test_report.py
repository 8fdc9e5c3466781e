"""The numbers, words and errors of the report; its rendering is tested in test_browser.py."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.report import NotAResult, load_record, render_page, write_report
from loadtest.report.charts import NOTHING, build_charts, format_number
from loadtest.report.results_schema import Record, check_record
from loadtest.report.tables import RunFact, build_tables, judge_run, list_headlines, list_remarks
from tests.loadtest import runs

EVIL = """<img src=x onerror=alert(1)></script><script>alert(2)</script>"'&{{ 7 * 7 }}"""


class Elements(HTMLParser):
    """The names of a page's elements, its text, and every attribute that could fetch or run something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.fetched: list[str] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called with every element."""
        self.names.append(tag)
        self.fetched += [name for name, _ in attrs if name in {"src", "href", "style"} or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        """Called with every text."""
        self.words += data


def make_run(**changes: Any) -> Record:
    """A checked record with its results changed."""
    record = runs.record(seconds=5)
    record["results"] |= changes
    return check_record(record)


def test_one_file_that_needs_no_other(tmp_path: Path) -> None:
    """A run becomes a page without anything to fetch; twice the same run, to the last byte the same page."""
    (tmp_path / "a.json").write_text(json.dumps(runs.record()))
    for name in ("1.html", "2.html"):
        write_report([tmp_path / "a.json"], tmp_path / name)
    html = (tmp_path / "1.html").read_text(encoding="utf-8")
    assert html == (tmp_path / "2.html").read_text(encoding="utf-8")
    found = Elements(html)
    assert not found.fetched
    assert not {"link", "img", "iframe"} & {*found.names}
    assert len(html) < 400_000


def test_the_policy_knows_the_style_and_the_script() -> None:
    """What is inline has the hash that the Content-Security-Policy allows, and nothing else is allowed."""
    html = render_page([runs.make_bare()], ["a"])
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for name in ("style", "script"):
        (text,) = re.findall(f"<{name}>(.*?)</{name}>", html, re.DOTALL)
        assert f"{name}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy


def test_hostile_text_stays_text() -> None:
    """Whatever a run's file or its name says is shown as it is, and makes no element."""
    harmless, evil = (
        render_page([runs.make_hostile("name")] * 2, ["a", "b"]),
        render_page([runs.make_hostile(EVIL)] * 2, [EVIL, EVIL]),
    )
    assert Elements(evil).names == Elements(harmless).names
    assert Elements(evil).words.count(EVIL) > 20


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (runs.record(seconds=5), 13),
        (runs.make_ramp(), 15),
        (runs.make_bare(), 2),
    ],
    ids=["whole", "ramp", "bare"],
)
def test_a_chart_for_everything_that_was_recorded(record: dict[str, Any], wanted: int) -> None:
    """And none for what was not: no empty axes. Each has a table with a row for each x."""
    drawn = build_charts([check_record(record)["results"]])
    assert len(drawn) == wanted
    for chart in drawn:
        assert {x for line in chart.lines for x in line.x} == {row[0] for row in chart.rows}
        assert all(any(y is not None for y in line.y) for line in chart.lines)
    assert render_page([record], ["a"]).count('role="img"') == wanted


def test_the_distribution_is_the_histogram() -> None:
    """One request in ten took p90 or longer, one in a hundred p99; the fastest stands first, the slowest last."""
    ms = np.random.default_rng(1).lognormal(1, 1, 5000)
    drawn = build_charts([make_run(latency={"all": runs.make_row(ms)})["results"]])
    (line,) = next(chart for chart in drawn if chart.title == "Latency distribution").lines
    at = dict(zip(line.x, line.y, strict=True))
    for rarity, expected in (
        (1, ms.min()),
        (10, np.percentile(ms, 90)),
        (100, np.percentile(ms, 99)),
        (5000, ms.max()),
    ):
        assert at[rarity] == pytest.approx(expected, rel=0.01)
    assert line.x == sorted(line.x)


def test_one_answer_has_a_distribution() -> None:
    """The smallest there is: one point."""
    drawn = build_charts([make_run(latency={"all": runs.make_row([3.0])})["results"]])
    (line,) = next(chart for chart in drawn if chart.title == "Latency distribution").lines
    assert line.x == [1.0]
    assert line.y == pytest.approx([3.0], rel=0.01)


def test_load_times_add_up_to_all_loads() -> None:
    """Shares by bucket limit in ms, from none to all, without empty buckets around; loads beyond the last stay out."""
    buckets = {"le_s": [0.001, 0.002, 0.005, 0.01, 0.02, None], "count": [0, 0, 5, 4, 0, 1]}
    drawn = build_charts([make_run(load_time={"disk": buckets})["results"]])
    (line,) = next(chart for chart in drawn if chart.title == "Load time").lines
    assert dict(zip(line.x, line.y, strict=True)) == {2: 0, 5: 50, 10: 90, 20: 90}
    rows = {row[0]: row[1] for row in table_named("Loads and evictions", make_run(load_time={"disk": buckets}))}
    assert rows["50% of loads from disk within"] == "5 ms"
    assert rows["99% of loads from disk within"] == "—"


def table_named(title: str, *records: Record) -> list[list[str]]:
    """The rows of a table of the report."""
    return [list(row) for table in build_tables(records) if table.title == title for row in table.rows]


def test_two_runs_share_axes_and_rows() -> None:
    """Lines of both runs, each with its length, in the charts; both runs' values in a row of the tables."""
    pair = [check_record(runs.record(seconds=5)), check_record(runs.record(1, seconds=50, slow=2.0))]
    latency = build_charts([record["results"] for record in pair])[0]
    assert [(line.name, len(line.x)) for line in latency.lines] == [
        ("A p50", 5),
        ("A p99", 5),
        ("B p50", 50),
        ("B p99", 50),
    ]
    assert latency.hues == [0, 0, 1, 1]
    assert [row[1] is None for row in latency.rows] == [False] * 5 + [True] * 45
    p50 = next(row for row in table_named("Latency", *pair) if row[0] == "hits: p50")
    assert float(p50[3]) == pytest.approx(2.0, rel=0.1)
    assert p50[4] == "B worse"
    differing = {row[0] for row in table_named("What ran", *pair) if row[3] == "differs"}
    assert {"profile", "profile seed", "seed", "asked"} == differing


def test_a_run_that_is_not_valid_is_not_compared() -> None:
    """Its numbers are shown beside the other's, but no ratio and no verdict, at the top or in a table."""
    pair = [check_record(runs.record(seconds=5)), make_run(invalid=["the driver was too busy"])]
    found = [record["results"] for record in pair]
    assert {fact.cells()[2:] == [NOTHING, NOTHING] for fact in list_headlines(found)} == {True}
    assert {tuple(row[3:]) for row in table_named("Latency", *pair)} == {(NOTHING, NOTHING)}
    page = render_page(pair, ["a.json", "b.json"])
    assert "Not compared: a run that is not valid says nothing about its server." in page
    assert not re.search(r"B (better|worse)", page)
    assert "Not compared" not in render_page([pair[0], pair[0]], ["a.json", "b.json"])


@pytest.mark.parametrize(
    ("fact", "ratio", "word"),
    [
        (RunFact("p99", [10, 20], "", "less"), "2.00", "B worse"),
        (RunFact("p99", [20, 10], "", "less"), "0.50", "B better"),
        (RunFact("rate", [10, 20], "", "more"), "2.00", "B better"),
        (RunFact("rate", [100, 99], "", "more"), "0.99", "same"),
        (RunFact("failed", [0, 3], "", "less"), "—", "B worse"),
        (RunFact("failed", [0, 0], "", "less"), "—", "same"),
        (RunFact("p99", [None, 3], "", "less"), "—", "—"),
        (RunFact("count", [1, 500]), "500", "more"),
    ],
)
def test_which_is_better(fact: RunFact, ratio: str, word: str) -> None:
    """The ratio B/A and a word, also where a value is missing or nothing can be divided by."""
    assert fact.compared() == (ratio, word)


@pytest.mark.parametrize(
    ("changes", "mood", "sentence"),
    [
        ({"invalid": ["the driver was too busy"]}, "bad", "Not valid: this run says nothing about the server."),
        ({"slo": None}, "plain", "Valid run. No service level was set."),
        ({}, "bad", "Valid run, but the service level was missed (1 of 2 checks failed)."),
        ({"slo": {"met": True, "checks": []}}, "good", "Valid run, and the service level was met (0 of 0 checks)."),
        ({"answered_per_s": 0.0}, "bad", "Valid run, but nothing was answered."),
    ],
)
def test_the_verdict_in_words(changes: dict[str, Any], mood: str, sentence: str) -> None:
    """Validity goes before everything: a service level that an invalid run met is not met."""
    results = make_run(**changes)["results"]
    assert judge_run(results) == (mood, sentence)
    assert set(results["invalid"]) <= set(list_remarks(results))


def test_a_run_of_which_nothing_is_known_says_so() -> None:
    """No metrics, no memory, no answers: dashes and a remark, never a zero that was not measured."""
    results = check_record(runs.make_bare())["results"]
    assert "Not recorded: the server's metrics and the server's memory." in list_remarks(results)
    assert {fact.what: fact.cells() for fact in list_headlines([results])}["hit ratio"] == ["—"]
    results["latency"] = {}
    assert [fact.cells() for fact in list_headlines([results])][1:3] == [["—"], ["—"]]


def test_a_ramp_shows_its_highest_rate() -> None:
    """The highest rate that was sustained is a headline, and the step that was not says why."""
    record = check_record(runs.make_ramp())
    assert list_headlines([record["results"]])[-1].cells() == ["600/s"]
    assert table_named("Ramp", record)[-1][-2:] == ["no", "answered 620 of 800 requests/s"]


def test_many_processes_are_drawn_as_one() -> None:
    """More lines than the page has dashes would be told by nothing."""
    memory = {"t_s": [0.0, 1.0], **{f"worker {i}": [1e6, 2e6] for i in range(9)}}
    (chart,) = [c for c in build_charts([make_run(memory_over_time=memory)["results"]]) if c.title == "Memory"]
    assert [(line.name, line.y) for line in chart.lines] == [("all processes", [9.0, 18.0])]


@pytest.mark.slow
def test_long_runs_have_short_tables() -> None:
    """A chart keeps every second of an hour; the table behind it says that it does not."""
    html = render_page([runs.record(seconds=3600, rate=2.0)], ["a"])
    assert "Every 18th of 3,600 rows." in html
    assert html.count("<tr>") < 4000


def spoil_run(spoil: Callable[[dict[str, Any]], Any]) -> str:
    """A run's JSON after a change of its results."""
    record = runs.record(seconds=3)
    spoil(record["results"])
    return json.dumps(record)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "truncated"),
        ("<html>", "malformed"),
        ("[1]", "Expected `object`, got `array`"),
        ('{"name": "warm", "results": {}}', r"missing required field `title` - at `\$.results`"),
        (spoil_run(lambda r: r.pop("lag")), r"missing required field `lag` - at `\$.results`"),
        (
            spoil_run(lambda r: r["over_time"].update(p50_ms=["1"] * 3)),
            r"got `str` - at `\$.results.over_time.p50_ms\[0\]`",
        ),
        (spoil_run(lambda r: r["over_time"]["p99_ms"].pop()), "columns of `over_time` differ in length.*'p99_ms': 2"),
        (spoil_run(lambda r: r["latency"]["hit"].update(hdr="AAAA")), "HDR histogram of `hit` cannot be decoded"),
        (spoil_run(lambda r: r["memory_over_time"].pop("t_s")), "`memory_over_time` has no times"),
    ],
)
def test_another_file_is_told_what_it_is_not(tmp_path: Path, text: str, what: str) -> None:
    """The error names the file, the place and what writes such files."""
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(NotAResult, match=f"x.json is not what `fleetcast-load run` writes: .*{what}"):
        load_record(path)


def test_one_run_or_two() -> None:
    """Not none, not three, and each with a label."""
    record = runs.make_bare()
    for records, labels in (([], []), ([record] * 3, ["a", "b", "c"]), ([record], [])):
        with pytest.raises(ValueError, match="one run or two"):
            render_page(records, labels)


def test_numbers_are_short() -> None:
    """About three digits, whole numbers whole."""
    shown = [format_number(value) for value in (None, 0.0, 0.01234, 1.234, 56.78, 1234.5, 12.0, -3.456)]
    assert shown == ["—", "0", "0.0123", "1.23", "56.8", "1,234", "12", "-3.46"]
