"""`fleetcast tune`: halving keeps the better half, chooses by nothing of the test, and goes on after an end."""

import re
from math import inf
from pathlib import Path

import pytest

from handlers.training.time_series import read_csv
from server.offline.tuning import choose_units, list_units, rank_candidates
from server.offline.tuning_journal import Journal, OtherSearch, Trial
from server.shell import progress
from tests.server.markets import run, write_prices

pytestmark = pytest.mark.slow

CANDIDATES = ("--architecture lear", "--architecture lear:2", "--architecture lear --scaling linear")


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three markets of 60 days."""
    return write_prices(tmp_path_factory.mktemp("data") / "prices.csv", [f"M0{i}" for i in range(3)], days=60)


def tune(
    csv: Path, log: Path, *flags: str, target: str = "M00", candidates: tuple[str, ...] = CANDIDATES[::2]
) -> tuple[int, str]:
    """Exit code and output of a search of short blocks."""
    tried = [word for each in candidates for word in ("--candidate", each)]
    result = run(
        "tune", str(csv), "--time", "hour", "--target", target, "--known-future", "load_{target}", "--windows", "7",
        "--test", "7", "--log", str(log), *tried, *flags,
    )  # fmt: skip
    return result.exit_code, result.output


def read_trials(log: Path) -> int:
    """The number of trials in a log."""
    return len(log.read_text().splitlines()) - 1


def test_a_search_halves_and_prints_a_command_that_trains_the_winner(
    csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds have fewer candidates on more fits; the command is that of a candidate and works; the page is whole.

    Meanwhile lines say how much of the time is used up, and what is fitted.
    """
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    log, page = tmp_path / "tune.jsonl", tmp_path / "tune.html"
    code, said = tune(csv, log, "--html", str(page), target="M*", candidates=CANDIDATES)
    assert code == 0, said
    assert "round 1: 3 candidates on 3 of 9 fits" in said
    assert "round 2: 2 candidates on 9 of 9 fits" in said
    assert re.search(r"^tuning, seconds: \d+ of 1800\b.*, --architecture", said, re.MULTILINE), said
    assert read_trials(log) == 3 * 3 + 2 * 6
    (command,) = (line for line in said.splitlines() if line.startswith("fleetcast train "))
    assert any(each in command for each in CANDIDATES)
    html = page.read_text()
    assert "Content-Security-Policy" in html
    assert html.count("<tr>") == 1 + len(CANDIDATES)
    assert "<script" not in html
    words = command.replace("'", "").split()[1:]
    words[words.index("--out") + 1] = str(tmp_path / "models")
    words.append("--keep-worse")
    assert run(*words).exit_code == 0
    assert len(list((tmp_path / "models").glob("*.mar"))) == 3


def test_an_ended_search_goes_on_without_repeating_a_fit(csv: Path, tmp_path: Path) -> None:
    """From a log with a torn last line; the same winner, and only what was lost is fitted again."""
    log = tmp_path / "tune.jsonl"
    _, whole = tune(csv, log)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2]) + lines[2][:10])
    code, again = tune(csv, log)
    assert code == 0, again
    assert log.read_bytes().splitlines(keepends=True)[:2] == lines[:2]
    assert read_trials(log) == len(lines) - 1
    assert again.splitlines()[-1] == whole.splitlines()[-1]


def test_the_last_days_choose_nothing(csv: Path, tmp_path: Path) -> None:
    """Other prices in the test days leave every trial as it was."""
    rows = csv.read_text().splitlines()
    for at in range(len(rows) - 7 * 24, len(rows)):
        stamp, *cells = rows[at].split(",")
        rows[at] = ",".join([stamp, *("1" for _ in cells[:4]), *cells[4:]])
    other = tmp_path / "other.csv"
    other.write_text("\n".join(rows) + "\n")
    for each, log in ((csv, "one.jsonl"), (other, "two.jsonl")):
        assert tune(each, tmp_path / log)[0] == 0
    one, two = ((tmp_path / log).read_text().splitlines()[1:] for log in ("one.jsonl", "two.jsonl"))
    assert [line.rsplit(",", 1)[0] for line in one] == [line.rsplit(",", 1)[0] for line in two]


def test_no_time_is_said_and_the_search_still_answers(csv: Path, tmp_path: Path) -> None:
    """What a log says was spent counts: others than the first are named as not tried, and more minutes try them."""
    log = tmp_path / "tune.jsonl"
    assert tune(csv, log)[0] == 0
    head, *lines = log.read_text().splitlines()
    slow = [line.rsplit(",", 1)[0] + ",1000.0]" for line in lines if "linear" not in line]
    log.write_text("\n".join([head, *slow]) + "\n")
    code, said = tune(csv, log, "--minutes", "1")
    assert code == 0, said
    assert "no time for --architecture lear --scaling linear; give more --minutes" in said
    code, said = tune(csv, log, "--minutes", "1000")
    assert code == 0, said
    assert "no time" not in said


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        ("--architecture rnn", "unknown architecture 'rnn'"),
        ("--scaling linear", "it names no --architecture"),
        ("--architecture lear --epochs 3", "'--epochs' is none of"),
        ("--architecture lear --scaling log", "--scaling asinh or linear"),
    ],
)
def test_a_wrong_candidate_is_refused(csv: Path, tmp_path: Path, candidate: str, said: str) -> None:
    """In one line, before a fit."""
    code, output = tune(csv, tmp_path / "tune.jsonl", candidates=(candidate,))
    assert code == 2
    assert said in output


def test_a_log_of_another_search_is_refused(csv: Path, tmp_path: Path) -> None:
    """Scores of other windows are not compared with these."""
    log = tmp_path / "tune.jsonl"
    with Journal(log, "other"):
        pass
    code, said = tune(csv, log)
    assert code == 2
    assert "is the log of a search with other prices or flags" in said
    log.write_text("prices\n")
    with pytest.raises(OtherSearch, match="no log of a search"):
        Journal(log, "x")


def test_a_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    """With what to change."""
    short = write_prices(tmp_path / "short.csv", ["M00"], days=20)
    code, said = tune(short, tmp_path / "tune.jsonl", "--test", "15")
    assert code == 2
    assert "give smaller --test and --windows" in said
    assert read_csv(short, "hour", ["M00"])[0].frequency == "1h"


def test_units_are_of_many_markets_first() -> None:
    """Every market once before any market twice, in an order of the seed."""
    units = list_units(5, 3, 1)
    assert {market for market, _ in units[:5]} == set(range(5))
    assert [fold for _, fold in units] == [0] * 5 + [1] * 5 + [2] * 5
    assert units != list_units(5, 3, 2)


def test_a_round_takes_its_share_of_the_time() -> None:
    """As many units as the time of one of the rounds that are left allows, no more than there are, never fewer."""
    assert choose_units(4, 100, seconds=10.0, left_s=400.0, rounds_left=4) == 14
    assert choose_units(4, 8, seconds=10.0, left_s=400.0, rounds_left=4) == 8
    assert choose_units(4, 100, seconds=10.0, left_s=-5.0, rounds_left=4) == 4


def test_who_fails_is_last_and_what_fails_for_all_does_not_count() -> None:
    """The geometric mean of the units that somebody could forecast."""

    def make(*scores: float) -> dict[tuple[int, int], Trial]:
        return {(0, fold): Trial(score, score, 1.0) for fold, score in enumerate(scores)}

    trials = {"a": make(0.5, 2.0, inf), "b": make(0.9, 0.9, inf), "c": make(0.1, inf, inf)}
    ranked = rank_candidates(trials, ["a", "b", "c"], [(0, 0), (0, 1), (0, 2)])
    assert [name for name, _ in ranked] == ["b", "a", "c"]
    assert ranked[0][1] == pytest.approx(0.9)
    assert ranked[2][1] == inf
