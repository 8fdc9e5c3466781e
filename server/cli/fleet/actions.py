"""`fleetcast load`, `unload`, `pin` and the other commands that change what a running server holds."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from server.cli.fleet.management import (
    DEFAULT_URL,
    AsJson,
    Models,
    Outcome,
    Url,
    ask_for_each,
    open_management,
    shorten_version,
)
from server.cli.terminal import BAD
from server.shell.escaping import escape_text

Tell = Callable[[Mapping[str, Any]], str]  #: an answer -> what was done, in words


def load(models: Models, *, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Load models now, so that no client waits for their first load.

    \b
    fleetcast load au/nsw1.mar au/vic1.mar
    fleetcast load au/nsw1.mar --url https://fleet.example:8081 --json
    """  # noqa: D301
    _change_each(
        models, "load", lambda answer: f"is loaded, version {shorten_version(answer['version'])}", url, as_json
    )


def unload(models: Models, *, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Remove models from the memory of all workers; each is told of when its memory is free.

    The archive stays in the store: the next request loads it again.

    \b
    fleetcast unload au/nsw1.mar
    fleetcast ls --prefix test/ --names | xargs fleetcast unload
    """  # noqa: D301
    _change_each(models, "unload", _tell_unloaded, url, as_json)


def pin(models: Models, *, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Load models and never evict them, also after the death of a worker, until the server ends or they are unpinned.

    The setting `pin` (`fleetcast serve --pin MODEL`) does the same at each start.

    \b
    fleetcast pin au/nsw1.mar
    """  # noqa: D301
    _change_each(models, "pin", lambda answer: f"is pinned, version {shorten_version(answer['version'])}", url, as_json)


def unpin(models: Models, *, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Let workers evict models again when others need their room.

    \b
    fleetcast unpin au/nsw1.mar
    """  # noqa: D301
    _change_each(models, "unpin", lambda _: "may be evicted again", url, as_json)


def reload(models: Models, *, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Ask the store for new versions of models; a new one is loaded beside the old one, proved and swapped in.

    \b
    fleetcast reload au/nsw1.mar
    fleetcast ls --names | xargs fleetcast reload      after many archives were uploaded
    """  # noqa: D301
    _change_each(models, "reload", lambda answer: f"serves version {shorten_version(answer['version'])}", url, as_json)


def release(models: Models, *, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Let models that are in quarantine run again. `fleetcast ls --failed` says why they are.

    \b
    fleetcast release au/nsw1.mar
    """  # noqa: D301
    told = {True: "may run again", False: "was not in quarantine"}
    _change_each(models, "release", lambda answer: told[bool(answer["released"])], url, as_json)


def rollback(
    models: Models,
    *,
    version: Annotated[
        str, typer.Option(metavar="VERSION", help="version to serve; default: the one that served before this one")
    ] = "",
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Serve an earlier version of models, and hold it whatever the store has, until `fleetcast follow`.

    Versions that served are kept on the disk tier; `fleetcast ls MODEL --versions` lists them.

    \b
    fleetcast rollback au/nsw1.mar
    """  # noqa: D301
    query = {"version": version} if version else {}
    _change_each(
        models,
        "rollback",
        lambda answer: f"is held at version {shorten_version(answer['version'])}",
        url,
        as_json,
        query,
    )


def follow(models: Models, *, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Let models that were rolled back follow the store again.

    \b
    fleetcast follow au/nsw1.mar
    """  # noqa: D301
    _change_each(models, "follow", lambda _: "follows the store again", url, as_json)


def _change_each(
    models: Sequence[str], verb: str, tell: Tell, url: str, as_json: bool, query: Mapping[str, str] | None = None
) -> None:
    """Ask for the change of each model and print what came of it. The exit code is 1 if the server refused one."""
    refused = 0
    with open_management(url) as management:
        for outcome in ask_for_each(models, lambda model: management.post(verb, model, **(query or {}))):
            refused += bool(outcome.error)
            _print_outcome(outcome, tell, as_json)
    if refused:
        raise typer.Exit(BAD)


def _print_outcome(outcome: Outcome, tell: Tell, as_json: bool) -> None:
    if as_json:
        print(json.dumps(outcome.to_json()), flush=True)  # noqa: T201 -- the answer
    elif outcome.error:
        print(escape_text(f"{outcome.model}: {outcome.error}"), file=sys.stderr, flush=True)  # noqa: T201
    else:
        unheard = outcome.answer.get("unheard_workers")
        silent = f"; workers {unheard} did not answer" if unheard else ""
        done = f"{outcome.model} {tell(outcome.answer)} ({outcome.took_s * 1e3:.0f} ms){silent}"
        print(escape_text(done), flush=True)  # noqa: T201


def _tell_unloaded(answer: Mapping[str, Any]) -> str:
    workers = answer["unloaded_from"]
    return f"is unloaded from worker {', '.join(map(str, workers))}" if workers else "was not loaded"
