"""The commands below `fleetcast-load bench` and `fleetcast-load demo`: each lies in a module of its own.

A module is imported when its command runs, not before: many of them import torch, which takes seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import typer
from typer.main import get_command


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """Where a command lies (a module with a Typer called `app`), and the line that says what it does."""

    module: str
    about: str


BENCHMARKS = {
    "core": LazyCommand("benchmarks.core", "warm, cold and memory beside a plain peer; needs wrk"),
    "accuracy": LazyCommand("benchmarks.accuracy", "forecasts of five day-ahead markets beside published ones"),
    "cores": LazyCommand("benchmarks.cores", "what more workers and fronts bring, where a request's time goes"),
    "eviction-policies": LazyCommand("benchmarks.eviction_policies", "eviction policies at equal bytes"),
    "gpu": LazyCommand("benchmarks.gpu", "the accelerator's own steps, without HTTP"),
    "many-models": LazyCommand("benchmarks.many_models", "a whole tick in one call beside single calls"),
    "markets": LazyCommand("benchmarks.markets", "real prices through a running server, scored"),
    "peers": LazyCommand("benchmarks.peers", "the same weights on TorchServe, MMS, MLServer and Ray Serve"),
    "planner": LazyCommand("benchmarks.planner", "the planner's word against a real server"),
    "prefetch": LazyCommand("benchmarks.prefetch", "a market's ticks with prefetch and without"),
    "scale": LazyCommand("benchmarks.scale", "10,000 archives, thousands resident: does anything grow?"),
    "scenarios": LazyCommand("benchmarks.scenarios", "joint scenarios, from quantiles to bytes, on one core"),
    "scenarios-http": LazyCommand("benchmarks.scenarios_http", "joint scenarios as a client has them"),
    "step": LazyCommand("benchmarks.step", "a worker's step beside simpler ways to the same answers"),
}
DEMOS = {
    "first-run": LazyCommand("demos.first_run", "a fleet, a server, a forecast and a burst of requests"),
    "market-cycle": LazyCommand("demos.market_cycle", "a market's cycle: many products, joint scenarios, a page"),
}


def _add_commands(group: typer.Typer, commands: dict[str, LazyCommand]) -> None:
    """Add stand-ins that hand all their arguments, `--help` among them, to the module's own command."""
    passing = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    for name, lazy in commands.items():
        group.command(name, help=lazy.about, add_help_option=False, context_settings=passing)(_forward_to(lazy.module))


def _forward_to(module: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        command = get_command(import_module(f"loadtest.{module}").app)
        command.main(args=context.args, prog_name=context.command_path)

    return run


bench = typer.Typer(no_args_is_help=True, add_completion=False)
demo = typer.Typer(no_args_is_help=True, add_completion=False)


@bench.callback()
def _bench() -> None:
    """Measure what Fleetcast does, beside something to hold it against; most write a record."""


@demo.callback()
def _demo() -> None:
    """Show what Fleetcast does, on models that are made here and now."""


_add_commands(bench, BENCHMARKS)
_add_commands(demo, DEMOS)
