"""The costs of a plan: the price table, the machines that reach the targets, and the command and page of the plan."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from loadtest.cli import app
from loadtest.driver.profiles import Profile
from loadtest.plan.costs import DEFAULT, read_costs
from loadtest.plan.demand import Demand, make_profile_demand
from loadtest.plan.machine_choice import Promise, find_cheapest_alone, find_offers
from loadtest.plan.placement import Placement
from loadtest.plan.plan_report import count_models_that_fit
from loadtest.plan.prices import Machine, PriceTable, compare_published, count_nodes, read_prices
from loadtest.plan.simulate import Machines, SimulationResult
from model_store.cache.eviction import POLICIES
from tests.loadtest import runs

SMALL = Machine("small", vcpu=2, memory_gib=0.1, price_per_hour=1.0)
LARGE = Machine("large", vcpu=2, memory_gib=1.0, price_per_hour=2.5)
CLUSTER = Machine("gpu", vcpu=4, memory_gib=16, price_per_hour=0.1, accelerator="L4", device_memory_gib=24)


def make_table(*machines: Machine, availability: float = 1.0) -> PriceTable:
    """Prices by hand."""
    return PriceTable(dated="today", said="by hand", machine=machines, availability=availability)


@pytest.fixture(scope="module")
def fleet() -> Demand:
    """2,000 models of 70 KB: 140 MB, of which a small machine's cache holds a third."""
    return make_profile_demand(Profile(2_000, 100.0), 60, 60, "70KB")


def make_finding(*, hit_ratio: float = 0.95, refused: float = 0.0) -> SimulationResult:
    """A finding by hand."""
    ms = {"p50": 1.0, "p90": 2.0, "p99": 9.0, "p99.9": 30.0}
    there = Machines(2**30)
    return SimulationResult(
        there, 100, hit_ratio, 1 - hit_ratio - refused, refused, ms, 1.0, 0.1, 0.0, simulated=1, error=0.0
    )


def test_the_published_example() -> None:
    """1,000 models, two instances of an endpoint each or two of one for all: Amazon's own totals, from their inputs."""
    there = compare_published(read_prices())
    assert there is not None
    assert (round(there.each), round(there.fleet)) == (171_360, 1_017)


def test_the_example_table_says_that_it_is_one() -> None:
    """It loads, is dated, and whoever opens it reads that it is to be edited."""
    prices = read_prices()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", prices.dated)
    assert "EDIT ME" in Path(read_prices.__globals__["EXAMPLE"]).read_text()
    assert len({machine.name for machine in prices.machine}) == len(prices.machine) > 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dated = ", "Invalid value"),
        ('dated = "x"\nsaid = "y"\nmachine = []', "a price table has machines"),
        ('dated = "x"\nsaid = "y"\n[[machine]]\nname = "a"\nvcpu = 1\nmemory_gib = 1\nprice = 2', "price"),
        (
            'dated = "x"\nsaid = "y"\n[[machine]]\nname = "a"\nvcpu = 0\nmemory_gib = 1\nprice_per_hour = 2',
            "the machine a",
        ),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    """The error names the file and what is wrong in it."""
    (tmp_path / "prices.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"prices\.toml is not a price table: .*{said}"):
        read_prices(tmp_path / "prices.toml")


@given(needed=st.integers(1, 8), each=st.floats(0.9, 0.9999), wanted=st.floats(0.5, 0.9999))
def test_spares_make_up_for_machines_that_fail(needed: int, each: float, wanted: float) -> None:
    """Never fewer than needed; one more is never less available; none to spare where machines never fail."""
    nodes = count_nodes(needed, each, wanted)
    assert nodes >= needed
    assert count_nodes(needed, 1.0, wanted) == needed
    assert count_nodes(needed + 1, each, wanted) > count_nodes(needed, each, wanted) - 1
    assert count_nodes(1, 0.995, 0.999) == 2


def test_no_number_of_machines_is_enough() -> None:
    """A machine that is hardly ever up."""
    with pytest.raises(ValueError, match=r"no 200 machines of availability 0\.001 make 1"):
        count_nodes(10, 0.001, 1.0)


def test_what_a_promise_misses() -> None:
    """In a word or two; refusals first, since a refused request is fast."""
    assert Promise().missed(make_finding()) == ""
    assert Promise(p99_ms=9.0, hit_ratio=0.95).missed(make_finding()) == ""
    assert Promise(p99_ms=8.0).missed(make_finding()) == "p99 9 ms"
    assert Promise(hit_ratio=0.96).missed(make_finding()) == "hits 0.950"
    assert Promise(p99_ms=8.0).missed(make_finding(refused=0.1)) == "refuses 10.00%"


@pytest.mark.slow
def test_the_cheapest_machines_that_keep_a_promise(fleet: Demand) -> None:
    """Several small ones where they are cheaper than one large; fewer where less is promised."""
    prices = make_table(SMALL, LARGE, CLUSTER)
    strict = find_offers(Placement(fleet), DEFAULT, prices, Promise(hit_ratio=0.92), Machines(0))
    assert [(offer.machine.name, offer.needed) for offer in strict] == [("large", 1), ("small", 3), ("gpu", 0)]
    assert strict[0].monthly == 2.5 * 720
    loose = find_offers(Placement(fleet), DEFAULT, prices, Promise(hit_ratio=0.7), Machines(0))
    assert [(offer.machine.name, offer.needed) for offer in loose] == [("small", 1), ("large", 1), ("gpu", 0)]
    assert loose[2].why == "the costs were measured on cpu, this one has cuda"
    for offer in (*strict[:2], *loose[:2]):
        assert offer.found is not None
        assert offer.found.hit_ratio >= (0.92 if offer in strict else 0.7)


@pytest.mark.slow
def test_a_promise_that_nobody_keeps(fleet: Demand) -> None:
    """Each machine says how many were tried and what they missed."""
    (offer,) = find_offers(Placement(fleet), DEFAULT, make_table(LARGE), Promise(p99_ms=0.01), Machines(0))
    assert re.fullmatch(r"64 of them: p99 [\d.]+ ms", offer.why)
    tiny = Machine("tiny", vcpu=8, memory_gib=0.01, price_per_hour=1.0)
    (offer,) = find_offers(Placement(fleet), DEFAULT, make_table(tiny), Promise(), Machines(0))
    assert offer.why == "its memory has no room for a model in each worker"


def test_spares_cost_as_much(fleet: Demand) -> None:
    """Machines that are up 99.5 % of the time: one more than needed for 99.9 %, and as many for each endpoint alone."""
    prices = make_table(LARGE, availability=0.995)
    (offer,) = find_offers(Placement(fleet), DEFAULT, prices, Promise(hit_ratio=0.9), Machines(0))
    assert (offer.needed, offer.nodes, offer.monthly) == (1, 2, 2 * 2.5 * 720)
    assert find_cheapest_alone(prices, 2_000, Promise()) == (LARGE, 2, 2_000 * 2 * 2.5 * 720)


def test_models_that_fit(fleet: Demand) -> None:
    """Whole slabs of whole rows: 59 rows of 70 KB in 4 MiB; every worker its own; a replica takes room again."""
    assert count_models_that_fit(fleet, Machines(10 * 2**22)) == 590
    assert count_models_that_fit(fleet, Machines(10 * 2**22 + 2**21)) == 590
    assert count_models_that_fit(fleet, Machines(10 * 2**22, workers=4)) == 8 * 59
    assert count_models_that_fit(fleet, Machines(10 * 2**22, nodes=4, replicas=2)) == 1180
    assert count_models_that_fit(fleet, Machines(2**30)) == 2_000


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_from_its_command(tmp_path: Path) -> None:
    """Sentences and tables for the terminal, a page without anything to fetch, and every number as JSON."""
    flags = ["--models", "300", "--rate", "50", "--seconds", "20", "--warmup", "20", "--p99-ms", "250", "--nodes", "2"]
    files = ["--lose-at", "10", "--html", str(tmp_path / "plan.html"), "--json", str(tmp_path / "plan.json")]
    ran = CliRunner().invoke(app, ["plan", *flags, *files])
    assert ran.exit_code == 0, ran.output
    for said in ("By cache size", "When a node is lost", "By machine", "$171,360", "One endpoint per model"):
        assert said in ran.output
    html, numbers = (tmp_path / "plan.html").read_text(), json.loads((tmp_path / "plan.json").read_text())
    assert html.count('role="img"') == 2
    assert not re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=", html)
    assert {each["policy"] for each in numbers["miss_ratio_curves"]} == {*POLICIES}
    hits = [each["hit_ratio"] for each in numbers["cache_sizes"]]
    assert hits == sorted(hits)
    assert all(each["after"] for each in numbers["cache_sizes"])
    best = next(each for each in numbers["machines"] if "found" in each)
    assert f"${best['monthly']:,.0f} a month" in ran.output


@pytest.mark.slow
def test_the_same_seed_is_the_same_plan(tmp_path: Path) -> None:
    """To the last byte of its numbers; another seed asks for other models."""
    flags = ["plan", "--models", "50", "--rate", "20", "--seconds", "10", "--warmup", "5"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        ran = CliRunner().invoke(app, [*flags, "--seed", seed, "--json", str(tmp_path / name)])
        assert ran.exit_code == 0, ran.output
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cache", "1KB"], "no plan: a cache of 1000 bytes is less than a slab of 4194304 for each worker"),
        (["--cache", "much"], "no plan: 'much' is not a size"),
        (["--policy", "fifo"], "no plan: there is no eviction policy 'fifo'"),
        (["--replicas", "2"], "no plan: 2 replicas of each model need as many nodes, not 1"),
        (["--lose-at", "3"], "no plan: a node or a region can be lost only where others stay"),
        (["--model-size", "0"], "no plan: the model size '0'"),
        (["--profile", "replay"], "no plan: a replay needs a recording: give its file with --trace"),
    ],
)
def test_what_cannot_be_planned(flags: list[str], said: str) -> None:
    """The command ends with what is wrong and what to give instead."""
    ran = CliRunner().invoke(app, ["plan", "--models", "20", "--rate", "20", "--seconds", "5", *flags])
    assert ran.exit_code == 1
    assert said in str(ran.exception)


# --- costs of a load run --------------------------------------------------------------------------------------------


def test_a_load_run_is_costs(tmp_path: Path) -> None:
    """Its hits give what a hit takes beside its step, its loads by tier the GET and the rest."""
    record = runs.record(seconds=5)
    record["results"]["latency"]["hit"] = runs.make_row(np.full(100, 5.0))
    record["results"]["load_time"] = {
        "host": {"le_s": [0.001, None], "count": [0, 0]},
        "disk": {"le_s": [0.001, 0.01, 60.0, None], "count": [0, 10, 0, 0]},
        "store": {"le_s": [0.1, 0.2, 60.0, None], "count": [0, 10, 0, 0]},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    costs = read_costs(tmp_path / "run.json")
    assert costs.overhead[100] == pytest.approx(0.005 - DEFAULT.step_s - DEFAULT.row_s, rel=0.01)
    assert [costs.build[0], costs.build[-1]] == pytest.approx([0.001, 0.01])
    assert [costs.get[0], costs.get[-1]] == pytest.approx([0.099, 0.19])
    (tmp_path / "run.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"run\.json holds neither the costs"):
        read_costs(tmp_path / "run.json")
