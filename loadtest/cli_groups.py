"""The command groups `fleetcast-load bench` and `fleetcast-load demo`. Each command is a module of its own.

A command's module is imported only when the command runs, because many of these modules import torch, which takes
seconds. A new command is a module with a Typer called `app`, and a row in BENCHMARKS or DEMOS.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import typer

from server.shell.commands import CommandSource, make_command_group


@dataclass(frozen=True, slots=True)
class CommandModule:
    """A command: its module below `loadtest`, whose docstring is the command's help, and its line in the list."""

    module: str
    about: str


BENCHMARKS: Mapping[str, CommandModule] = {
    "core": CommandModule("benchmarks.core", "throughput, cold start and memory beside a plain server; needs wrk"),
    "accuracy": CommandModule("benchmarks.accuracy", "accuracy in five day-ahead markets beside published results"),
    "code": CommandModule("benchmarks.code", "archives with code beside Multi Model Server; needs wrk and Java"),
    "console": CommandModule(
        "benchmarks.console", "what a viewer of the console costs with 5,000 models; needs Chromium"
    ),
    "cold-thousand": CommandModule("benchmarks.cold_thousand", "a thousand cold models at once from a slow store"),
    "cores": CommandModule("benchmarks.cores", "throughput by number of workers and fronts; CPU time per request"),
    "eviction-policies": CommandModule(
        "benchmarks.eviction_policies", "hit ratios of the eviction policies at equal size"
    ),
    "death": CommandModule("benchmarks.death", "a worker is killed with 2,500 residents under load"),
    "first-gpu": CommandModule("benchmarks.first_gpu", "the first ten minutes on a real GPU; `make gpu` runs it"),
    "gpu": CommandModule("benchmarks.gpu", "steps on a GPU, without HTTP"),
    "many-models": CommandModule("benchmarks.many_models", "one call for many models beside a call for each"),
    "goals": CommandModule(
        "benchmarks.goals", "what one archive reaches when it is refitted, beside the project's goals"
    ),
    "markets": CommandModule("benchmarks.markets", "accuracy of real prices through a running server"),
    "overload": CommandModule(
        "benchmarks.overload", "one to three times the peak: answers in time, late ones, refusals"
    ),
    "peers": CommandModule("benchmarks.peers", "the same weights on Triton, Mosec, Ray Serve, TorchServe and others"),
    "planner": CommandModule("benchmarks.planner", "the planner's prediction beside a real server"),
    "prefetch": CommandModule("benchmarks.prefetch", "latency of a market's ticks with and without prefetch"),
    "ray": CommandModule("benchmarks.ray_serve", "a cluster on Ray beside Ray's own multiplexing; needs wrk"),
    "scale": CommandModule("benchmarks.scale", "10,000 archives, thousands resident: no resource may grow"),
    "scenarios": CommandModule("benchmarks.scenarios", "joint scenarios on one core, without HTTP"),
    "scenarios-http": CommandModule("benchmarks.scenarios_http", "joint scenarios through a server"),
    "step": CommandModule("benchmarks.step", "a worker's step beside simpler implementations"),
    "tick": CommandModule("benchmarks.tick", "what a tick costs a GPU's host; needs no GPU"),
}
DEMOS: Mapping[str, CommandModule] = {
    "first-run": CommandModule("demos.first_run", "a fleet, a server, a forecast and a burst of requests"),
    "market-cycle": CommandModule("demos.market_cycle", "a market's cycle: many products, joint scenarios, a page"),
}


def make_group(about: str, commands: Mapping[str, CommandModule]) -> typer.Typer:
    """Make a group of commands, each the Typer of its module."""
    sources = {
        name: CommandSource(f"loadtest.{each.module}", "app", each.about, teaches_by_module=True)
        for name, each in commands.items()
    }
    return make_command_group(sources, about, is_program=False)


bench = make_group("Benchmark the server beside something to compare it with; most commands save a record.", BENCHMARKS)
demo = make_group("Show what the server does, with models that the demo makes.", DEMOS)
