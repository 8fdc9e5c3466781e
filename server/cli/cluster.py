"""`fleetcast cluster`: the settings of a server, its replicas placed by Ray on a local or an existing cluster."""

import inspect
import os
import secrets
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.setting_flags import settings_from, with_setting_flags
from server.cli.terminal import one_line_errors
from server.contract import HEADER_TARGET_MODEL
from server.settings import Settings

if TYPE_CHECKING:
    from server.cluster.autoscaling import Scaling
    from server.cluster.options import ReplicaOptions

INSTALL = "fleetcast cluster needs Ray Serve, which is not installed: pip install 'fleetcast[ray]'"
#: Ray's own: the header by which its proxies choose a replica, and the priority of its workers, whose default of 15
#: lets any other program of the host come first; servers inherit it.
RAY_VARIABLES = {"RAY_SERVE_SESSION_ID_HEADER_KEY": HEADER_TARGET_MODEL, "RAY_worker_niceness": "0"}

_FLAGS: dict[str, tuple[Any, Any, str]] = {
    "address": (str, "", "existing Ray cluster (auto, or HOST:PORT of its head); empty: a new one on this host"),
    "name": (str, "fleetcast", "name of the Serve application"),
    "replicas": (int, 1, "number of replicas, each a whole server"),
    "most_replicas": (int, 0, "Ray scales up to so many by the requests that are under way; 0: it does not"),
    "requests_per_replica": (float, 64.0, "requests under way for each replica, by which Ray chooses their number"),
    "up_after_s": (float, 30.0, "seconds for which more replicas are wanted before there are more"),
    "down_after_s": (float, 600.0, "seconds for which fewer replicas are wanted before there are fewer"),
    "replicas_per_host": (int, 1, "most replicas on one host; the second has free ports in the place of those set"),
    "cpus": (float, 1.0, "CPUs of one replica as Ray counts them; also its workers where `workers` is 0"),
    "gpus": (float, 0.0, "GPUs of one replica: whole ones"),
    "ray_port": (int, 8000, "port of Ray's own HTTP proxies, beside the fronts' inference_port; 0: a free port"),
    "detach": (bool, False, "return once the cluster runs, which then goes on; for an existing one"),
}
_SCALING = ("replicas", "most_replicas", "requests_per_replica", "up_after_s", "down_after_s")  #: of `Scaling`


def _with_cluster_flags(command: Any) -> Any:
    """The settings' flags, and those of the cluster before them."""
    own = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, typer.Option("--" + name.replace("_", "-"), help=text)],
        )
        for name, (kind, default, text) in _FLAGS.items()
    ]
    settings = with_setting_flags(command).__signature__.parameters.values()  # type: ignore[attr-defined]
    command.__signature__ = inspect.Signature([*own, *settings])
    return command


@_with_cluster_flags
def cluster(**flags: Any) -> None:
    """Run servers on Ray: each model lives on one of them, and any of them answers for all, in every protocol.

    \b
    fleetcast cluster --store s3://models/prices --replicas 4 --address auto
    fleetcast cluster --store ./models --replicas 2 --replicas-per-host 2     try it on this host

    Settings are those of `fleetcast serve`, by flag, variable or fleetcast.toml; files that they name must be on every
    host. Run it again with other settings, and the replicas take them one after another. Ctrl-C ends what it started.
    """  # noqa: D301
    with one_line_errors():
        own = {name: flags.pop(name) for name in _FLAGS}
        settings = settings_from(flags)
        _run(_make_options(settings, own), _make_scaling(own), own)


def _make_options(settings: Settings, own: dict[str, Any]) -> "ReplicaOptions":
    """What the replicas are told. Raises ValueError."""
    from server.cluster.options import ReplicaOptions, parse_options  # noqa: PLC0415

    wire = settings.to_wire()
    if "://" not in settings.store:
        wire["store"] = str(Path(settings.store).expanduser().absolute())
    for name, field in Settings.model_fields.items():
        if Path in (field.annotation, *getattr(field.annotation, "__args__", ())) and wire.get(name):
            wire[name] = str(Path(wire[name]).absolute())
    secret = settings.node_key_file.read_text().strip() if settings.node_key_file else secrets.token_hex(32)
    given = (float(own["cpus"]), float(own["gpus"]), int(own["replicas_per_host"]))
    options = ReplicaOptions(wire, secret, *given, host="" if own["address"] else settings.node_host)
    return parse_options(options.to_config())


def _make_scaling(own: dict[str, Any]) -> "Scaling":
    """How many replicas. Raises ValueError."""
    from server.cluster.options import parse_scaling  # noqa: PLC0415

    return parse_scaling({name: own[name] for name in _SCALING})


def _run(options: "ReplicaOptions", scaling: "Scaling", own: dict[str, Any]) -> None:
    for name, value in RAY_VARIABLES.items():  # before Ray is imported, which reads them then
        os.environ.setdefault(name, value)
    try:
        from server.cluster.running import run_cluster  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ValueError(INSTALL) from None
    told = threading.Event()
    with run_cluster(options, scaling, own) as lines:
        for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set handlers of its own
            signal.signal(number, lambda *_: told.set())
        for line in lines:
            print(line, flush=True)  # noqa: T201 -- the answer
        if not own["detach"]:
            told.wait()
