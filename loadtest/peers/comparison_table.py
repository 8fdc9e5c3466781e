"""The results of a comparison of servers: the order of turns, medians and ratios by round, one table. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from loadtest.driver.wrk import WrkResult
from loadtest.record import summarise_spread

OURS = "fleetcast"
OURS_NPY = "fleetcast npy"
OURS_BINARY = "fleetcast binary"
OURS_WAYS = (OURS, OURS_NPY, OURS_BINARY)
PLAIN = "plain"
TRITON, TRITON_BINARY = "triton", "triton binary"
MOSEC, MOSEC_BATCH = "mosec", "mosec batch 32"
RAY_BEST = "ray best"
CONNECTIONS = (1, 8, 32)


class Goal(NamedTuple):
    """A ratio ours / its of so many connections, which shall be `least` or more, or `most` or less."""

    ours: str
    its: str
    connections: int
    figure: str  #: `requests_per_s` or `p50`
    least: float = 0.0
    most: float = float("inf")

    def __str__(self) -> str:
        bound = f">= {self.least:g}" if self.least else f"<= {self.most:g}"
        figure = "p50" if self.figure == "p50" else "requests/s"
        return f"{self.ours} / {self.its}, {figure} at {self.connections}: {bound}"


GOALS = (
    *(Goal(OURS_NPY, TRITON_BINARY, connections, "requests_per_s", least=2.0) for connections in (8, 32)),
    *(Goal(OURS, TRITON, connections, "requests_per_s", least=2.5) for connections in (8, 32)),
    *(Goal(OURS, its, 1, "p50", most=1.0) for its in (PLAIN, MOSEC)),
)


def order_turns(servers: Sequence[str], turn: int) -> list[str]:
    """The order of a round: each round begins one server later, so that no server always follows the same one."""
    at = turn % len(servers)
    return [*servers[at:], *servers[:at]]


def summarize_runs(
    runs: Mapping[int, Sequence[WrkResult]], ours: Mapping[str, Mapping[int, Sequence[WrkResult]]]
) -> dict[str, Any]:
    """One server's results by connections; with ratios ours / its, of each round, to those of `ours` by name."""
    found = {}
    for connections, results in runs.items():
        row: dict[str, Any] = {
            "requests_per_s": summarise_spread([run.requests_per_s for run in results]),
            "p50_ms": summarise_spread([run.p50_ms for run in results]),
            "p99_ms": summarise_spread([run.p99_ms for run in results]),
        }
        for name, theirs in ours.items():
            pairs = list(zip(theirs[connections], results, strict=True))
            row[f"{name} / it"] = {
                "requests_per_s": summarise_spread([mine.requests_per_s / its.requests_per_s for mine, its in pairs]),
                "p50": summarise_spread([mine.p50_ms / its.p50_ms for mine, its in pairs]),
            }
        found[f"{connections} connections"] = row
    return found


def build_table(results: Mapping[str, Any]) -> Table:
    """Three lines per server, one for each number of connections; below them the missing servers, with reasons."""
    title = f"{results['models']} models, {results['rounds']} rounds of {results['seconds']:g} s: median (min-max)"
    missing = [f"{name} was not measured: {reason}" for name, reason in results["unavailable"].items()]
    shown = Table(title=title, box=box.SIMPLE_HEAD, caption="\n".join(missing), caption_justify="left")
    ratios = ("ours / it", "p50 ours / it", "npy / it")
    for head in ("", "conns", "requests/s", "p50 ms", "p99 ms", *ratios, "load ms", "MB a model"):
        shown.add_column(head, justify="right" if head else "left", overflow="fold")
    for name, found in results["servers"].items():
        load, memory = format_spread(found.get("load_ms")), found.get("mb_per_model")
        aside = [
            (name, load, "" if memory is None else _format_number(memory)),
            (found["version"], "", ""),
            ("", "", ""),
        ]
        for connections, (first, *last) in zip(CONNECTIONS, aside, strict=True):
            row = found[f"{connections} connections"]
            ratio, npy = row.get(f"{OURS} / it", {}), row.get(f"{OURS_NPY} / it", {})
            shown.add_row(
                first,
                str(connections),
                format_spread(row["requests_per_s"]),
                format_spread(row["p50_ms"]),
                _format_number(row["p99_ms"]["median"]),
                format_spread(ratio.get("requests_per_s")),
                format_spread(ratio.get("p50")),
                format_spread(npy.get("requests_per_s")),
                *last,
                end_section=connections == CONNECTIONS[-1],
            )
    return shown


def judge_goals(servers: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Compare the ratios with the goals: the median of the rounds counts. Servers that were not measured have none."""
    for goal in GOALS:
        ratio = servers.get(goal.its, {}).get(f"{goal.connections} connections", {}).get(f"{goal.ours} / it")
        if ratio is not None:
            spread = ratio[goal.figure]
            yield {"goal": str(goal), "ratio": spread, "holds": goal.least <= spread["median"] <= goal.most}


def list_goals(results: Mapping[str, Any]) -> list[str]:
    """The lines of the goals: what each wants, what was reached, and whether that is missed."""
    return [
        f"{found['goal']}: {format_spread(found['ratio'])}{'' if found['holds'] else ', missed'}"
        for found in results["goals"]
    ]


def list_settings(results: Mapping[str, Any]) -> list[str]:
    """The lines of the settings: what was chosen for each server, whole."""
    lines = ["Settings:"]
    for name, found in results["servers"].items():
        lines.append(f"  {name}: {found['body']} bodies of {found['body_bytes']} bytes")
        for key, value in found["settings"].items():
            shown = " ".join(f"{each}={value[each]}" for each in value) if isinstance(value, dict) else str(value)
            lines.append(f"    {key}: {' '.join(shown.split())}")
    return lines


def describe_servers(results: Mapping[str, Any]) -> list[str]:
    """The lines below the table: servers stopped between turns, and what each did when models exceeded memory."""
    lines = []
    stopped = [name for name, found in results["servers"].items() if found["stopped_between_turns"]]
    if stopped:
        lines.append(
            f"Stopped (SIGSTOP) between their turns, because they burn processor time idle: {', '.join(stopped)}."
        )
    lines.append("When models exceed memory:")
    lines += [f"  {name}: {found['beyond']}" for name, found in results["servers"].items() if "beyond" in found]
    return lines


def format_spread(found: Mapping[str, float] | None) -> str:
    """`12.3 (12.1-12.9)`."""
    return (
        ""
        if found is None
        else f"{_format_number(found['median'])} ({_format_number(found['min'])}-{_format_number(found['max'])})"
    )


def _format_number(value: float) -> str:
    """Three digits or a little more."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"  # noqa: PLR2004
