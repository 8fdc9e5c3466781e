"""The command `fleetcast`: its commands by name, each in a file that is imported when the command is run.

So `fleetcast --help` and `fleetcast --version` import none of what the commands need, and `fleetcast serve`, the
supervisor's process, has no torch.
"""

from typing import Annotated

import typer

from server.sdk import __version__
from server.shell.commands import CommandSource, make_command_group

#: Command -> its line in `fleetcast --help`. The function NAME of `server.cli.NAME` is the command, but for FLEET.
COMMANDS = {
    "serve": "Run the server.",
    "cluster": "Run servers on several hosts, by Ray.",
    "train": "Fit forecasters to your prices.",
    "tune": "Find which recipe forecasts your prices best.",
    "batch": "Answer a file of requests.",
    "backtest": "Score archives on past prices.",
    "calibrate": "Make the bands of archives hold what they promise.",
    "retrain": "Refit a fleet, publish archives that are no worse.",
    "correlate": "Estimate how forecasts of markets move together.",
    "doctor": "Check this machine and measure its speed.",
    "pack": "Make an archive.",
    "inspect": "Show the contents of an archive.",
    "verify": "Check that archives load.",
    "migrate": "Turn a config.properties of TorchServe or Multi Model Server into settings.",
    "invoke": "Send a request to a running server.",
    "top": "Watch what a running server is doing.",
    "ls": "List the models that a running server holds, and those that failed.",
    "load": "Load models now.",
    "unload": "Remove models from memory.",
    "pin": "Load models and never evict them.",
    "unpin": "Let models be evicted again.",
    "reload": "Swap in new versions from the store.",
    "rollback": "Serve an earlier version of models.",
    "follow": "Let models follow the store again.",
    "release": "Let models in quarantine run again.",
    "token": "Make a token for a client or an operator.",
}
#: Commands that speak to a running server's management listener -> their file in `server.cli.fleet`.
FLEET = {
    "top": "top",
    "ls": "ls",
    **dict.fromkeys(("load", "unload", "pin", "unpin", "reload", "rollback", "follow", "release"), "actions"),
}

app = make_command_group(
    {
        name: CommandSource(
            f"server.cli.{f'fleet.{FLEET[name]}' if name in FLEET else name.replace('-', '_')}",
            name.replace("-", "_"),
            about,
        )
        for name, about in COMMANDS.items()
    },
    is_program=True,
)


def main() -> None:
    """The command `fleetcast`."""
    app(prog_name="fleetcast")


@app.callback(invoke_without_command=True)
def fleetcast(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    """Serve a fleet of small forecast models: archives in an object store, one header, a cache of models.

    \b
    fleetcast serve --store s3://models/prices        run the server
    fleetcast cluster --store s3://models/prices --replicas 4    run servers on Ray
    fleetcast invoke au/nsw1.mar --body r.json        send it a request
    fleetcast train p.csv --time hour --target NSW1 --out models
    fleetcast pack au/nsw1.mar --onnx model.onnx      make an archive
    fleetcast inspect au/nsw1.mar                     show the contents of one
    fleetcast verify au/*.mar                         check that they load
    fleetcast migrate config.properties               settings equal to those of TorchServe or Multi Model Server
    fleetcast batch in.jsonl out.jsonl                answer a file of requests, without a server
    fleetcast backtest p.csv --time hour --models models    score archives on past prices
    fleetcast calibrate p.csv --time hour --models models   make bands hold what they promise
    fleetcast correlate p.csv --time hour --target NSW1 --target VIC1 --out joint.mar    prepare joint scenarios
    fleetcast retrain p.csv --time hour --store models      refit a fleet, publish archives that are no worse
    fleetcast top                                     watch what a running server is doing
    fleetcast ls --failed                             list its models; load, unload, pin, reload, rollback change them
    fleetcast token desk-au --scope invoke --model au/      make a token for a client
    fleetcast doctor --store s3://models/prices       check this machine and measure its speed
    """  # noqa: D301 -- click's mark for "do not wrap"
    if version:
        print(f"fleetcast {__version__}")  # noqa: T201 -- the answer
        raise typer.Exit


if __name__ == "__main__":
    main()
