"""What `bench ray` has found: summaries over the rounds, ratios and goals, and the table. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from loadtest.record import summarise_spread

CONNECTIONS = (1, 8, 32)
DIRECT, PROXY, RAY, RAY_BEST = "fleetcast direct", "fleetcast by Ray's proxy", "ray", "ray best"
BARE = "ray bare"

Found = dict[str, Any]


class Goal(NamedTuple):
    """A ratio ours / its that shall be `least` or more, or `most` or less, of a number that `path` leads to."""

    ours: str
    its: str
    path: tuple[str, ...]
    said: str
    least: float = 0.0
    most: float = float("inf")

    def __str__(self) -> str:
        return f"{self.ours} / {self.its}, {self.said}: {f'>= {self.least:g}' if self.least else f'<= {self.most:g}'}"


COLD = 0.1  #: most of Ray's cold p99
GOALS = (
    *(Goal(DIRECT, its, ("warm", "32", "rps"), "requests/s at 32", least=10.0) for its in (RAY, RAY_BEST)),
    *(Goal(DIRECT, its, ("cold", "p99_ms"), "p99 of 100 cold models at once", most=COLD) for its in (RAY, RAY_BEST)),
    *(Goal(PROXY, BARE, ("warm", at, "rps"), f"requests/s at {at}", least=1.0) for at in map(str, CONNECTIONS)),
)


def judge_goals(rounds: Sequence[Mapping[str, Found]], distant: Found) -> list[Found]:
    """Compare the ratios with the goals: the median over the rounds in which both were measured counts.

    `distant`: cold models from a store with a delay; its ratio is that of the medians.
    """
    judged = []
    if distant:
        ratio = distant[DIRECT]["p99_ms"]["median"] / distant[RAY]["p99_ms"]["median"]
        said = f"{DIRECT} / {RAY}, p99 of 100 cold models at once, store {distant['delay_ms']:g} ms away: <= {COLD:g}"
        judged.append({"goal": said, "ratio": summarise_spread([ratio]), "holds": ratio <= COLD})
    for goal in GOALS:
        both = [each for each in rounds if goal.ours in each and goal.its in each]
        if both:
            ratios = [_find(each[goal.ours], goal.path) / _find(each[goal.its], goal.path) for each in both]
            ratio = summarise_spread(ratios)
            judged.append({"goal": str(goal), "ratio": ratio, "holds": goal.least <= ratio["median"] <= goal.most})
    return judged


def _find(found: Any, path: Iterable[str]) -> float:
    for key in path:
        found = found[key]
    return float(found)


def list_goals(judged: Iterable[Mapping[str, Any]]) -> list[str]:
    """The lines of the goals: what each wants, what was reached, and whether that is missed."""
    return [
        "{goal}: {median:.2f} ({min:.2f} to {max:.2f}){missed}".format(
            goal=found["goal"], missed="" if found["holds"] else ", missed", **found["ratio"]
        )
        for found in judged
    ]


def summarise_contenders(rounds: Sequence[Mapping[str, Found]]) -> dict[str, Found]:
    """Each contender's numbers over the rounds in which it was measured."""
    names = dict.fromkeys(name for each in rounds for name in each)
    return {name: summarise_rounds([each[name] for each in rounds if name in each]) for name in names}


def summarise_rounds(rounds: Sequence[Found]) -> Found:
    """Summarise each number over the rounds, in the shape of one round."""
    first = rounds[0]
    return {
        key: summarise_rounds([each[key] for each in rounds])
        if isinstance(first[key], dict)
        else summarise_spread([float(each[key]) for each in rounds])
        for key in first
    }


def build_table(results: Mapping[str, Found]) -> Table:
    """Show the medians. The bare deployment has warm loads alone."""
    table = Table(
        "", "1 conn.", "8", "32 req/s", "p50, p99 ms at 8", "100 cold p50, p99", "tick of 500", "MB a model", box=None
    )
    for name, each in results.items():
        warm = each["warm"]
        row = [f"{warm[str(connections)]['rps']['median']:,.0f}" for connections in CONNECTIONS]
        row.append(", ".join(f"{warm['8'][key]['median']:.1f}" for key in ("p50_ms", "p99_ms")))
        if "cold" in each:
            row.append(", ".join(f"{each['cold'][key]['median']:,.0f}" for key in ("p50_ms", "p99_ms")) + " ms")
            row += [f"{each['tick']['all_ms']['median']:,.0f} ms", f"{each['mb_per_model']['median']:.2f}"]
        table.add_row(name, *row)
    return table
