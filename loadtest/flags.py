"""The flags that several commands of the load tester have: their type, their limits and their help."""

import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

LOAD, SERVER, SLO, OUTPUT = "Load", "Server", "What must be reached", "Output"  #: panels of a command's help


def make_flag(panel: str, text: str, *names: str, **more: Any) -> Any:
    """An option with its help text in a panel of the command's help; the rest as `typer.Option` takes it."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=True, **more)


def with_flags(kind: type[Any]) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """A command whose flags are the fields of the dataclass `kind`, and which is called with one of these."""

    def decorate(command: Callable[[Any], None]) -> Callable[..., None]:
        def call(**given: Any) -> None:
            command(kind(**given))

        parameters = [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in fields(kind)
        ]
        call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {field.name: field.type for field in fields(kind)}
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        return call

    return decorate


# --- the profile of a load, as `run` and `plan` take it ---------------------------------------------------------------

Rate = Annotated[float | None, make_flag(LOAD, "requests per second; default 200")]
Zipf = Annotated[float | None, make_flag(LOAD, "exponent of the Zipf popularity of models; default 1")]
Drift = Annotated[float | None, make_flag(LOAD, "seconds after which some models exchange ranks; default never")]
TickInterval = Annotated[float | None, make_flag(LOAD, "tick: seconds between ticks; default 5")]
TickSpread = Annotated[float | None, make_flag(LOAD, "tick: seconds that its requests are spread over; default 1")]
Shuffled = Annotated[bool | None, make_flag(LOAD, "tick: another order in every tick", "--shuffled")]

# --- the server and its promises --------------------------------------------------------------------------------------

Ca = Annotated[
    Path | None,
    make_flag(
        SERVER,
        "PEM file of the authority of the server's certificate; default the system's",
        exists=True,
        dir_okay=False,
    ),
]
ClientCert = Annotated[
    Path | None,
    make_flag(SERVER, "PEM file of a client certificate, for a server with mutual TLS", exists=True, dir_okay=False),
]
ClientKey = Annotated[
    Path | None,
    make_flag(SERVER, "PEM file of its key; default in the same file", exists=True, dir_okay=False),
]
TokenFile = Annotated[
    Path | None,
    make_flag(SERVER, "file with a bearer token; default the variable FLEETCAST_TOKEN", exists=True, dir_okay=False),
]
AllowRemote = Annotated[bool, make_flag(SERVER, "allow an address other than loopback", "--allow-remote")]
MostP99 = Annotated[float | None, make_flag(SLO, "maximum 99th percentile of latency")]
LeastHitRatio = Annotated[float | None, make_flag(SLO, "minimum hit ratio")]

# --- benchmarks and demos ---------------------------------------------------------------------------------------------

Seed = Annotated[int, typer.Option(min=0, help="random seed")]
KeepRecord = Annotated[bool, typer.Option("--record/--no-record", help="save a record under loadtest/records")]
SaveRecord = Annotated[bool, typer.Option(help="write the record")]
CallRounds = Annotated[int, typer.Option(min=7, help="number of rounds of alternating calls")]
Once = Annotated[bool, typer.Option("--once", help="exit when the demo has finished")]


def end_on_sigterm() -> None:
    """Make SIGTERM end this process as Ctrl-C does, so that what it has started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
