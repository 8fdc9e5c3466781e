"""The page of the comparison: its figures are those of the newest record, misses among them."""

from pathlib import Path

import pytest

from loadtest.peers.comparison_page import ABSENT, BEGIN, END, read_newest_record, write_page
from loadtest.peers.comparison_table import CONNECTIONS, OURS, OURS_NPY, TRITON_BINARY, judge_goals, summarize_runs
from tests.loadtest.peers.runs import make_runs

PAGE = Path(__file__).parents[3] / "docs" / "comparison.md"
MACHINE = {"cores": 2, "cpu": "AMD EPYC", "load_average_before": 0.071}


def test_the_committed_page_is_current() -> None:
    """`make docs` would change nothing: nobody writes a figure by hand, or forgets one."""
    text = PAGE.read_text()
    assert write_page(text, read_newest_record()) == text, "run `make docs`"


def test_the_page_says_what_the_record_says() -> None:
    """Servers with medians and spread, ratios to our ways, a goal that is missed, and who was not measured."""
    ours = {OURS: make_runs(100, 200, 300), OURS_NPY: make_runs(150, 300, 450)}
    servers = {name: {"version": "abc", **summarize_runs(runs, {})} for name, runs in ours.items()}
    servers[TRITON_BINARY] = {"version": "0.7.0", **summarize_runs(make_runs(100, 200, 300), ours)}
    results = {
        "rounds": 3,
        "seconds": 2,
        "connections": CONNECTIONS,
        "servers": servers,
        "goals": list(judge_goals(servers)),
        "unavailable": {"mosec": "cannot be installed"},
    }
    record = {"date": "2026-11-30T01:02:03Z", "commit": "0123456789", "machine": MACHINE, "results": results}
    page = write_page(f"before\n{BEGIN} old {END}\nafter\n", record)
    assert page.startswith(f"before\n{BEGIN}\n\nMeasured on 2026-11-30 at commit `0123456` on 2 cores (AMD EPYC, ")
    assert page.endswith(f"{END}\nafter\n")
    row = "| triton binary (0.7.0) | 200 (100-300) | 200 (100-300) | 200 (100-300) | 5.00 (3.33-10.0) "
    assert f"{row}| 1.00 | 1.00 | 1.50 | 1.50 |  |  |\n" in page
    assert "| fleetcast npy / triton binary, requests/s at 8: >= 2 | 1.50 (1.50-1.50) | missed |" in page
    assert "`mosec` was not measured: cannot be installed" in page
    assert write_page(page, record) == page


def test_a_page_without_its_comments_is_refused() -> None:
    """Else the figures would be lost without a word; and an older record has none of these peers."""
    with pytest.raises(ValueError, match="the page has not both comments"):
        write_page("nothing", {})
    assert ABSENT in write_page(BEGIN + END, {"results": {}, "machine": MACHINE})
