"""A Locust file: users who request forecasts of models, popular models more often.

pip install locust
locust -f loadtest/driver/locustfile.py --host http://127.0.0.1:8080 --fleet-store DIR --headless --users 8 -t 10s

The statistics have one row for each cache result (hit, miss, coalesced), not one for each model.

Locust is a closed loop: each user waits for a response before the next request. It shows how many users a server
carries, but it hides slow moments, because no requests are sent during them, and so its percentiles are too good. For
tail latency, hit ratios at a given rate and capacity use `fleetcast-load`, which sends on schedule.
"""

import ipaddress
import itertools
import logging
import random
import socket
from collections.abc import Sequence
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
import orjson
from locust import FastHttpUser, events, task

from loadtest.driver.dialects import DIALECTS, find_fault
from loadtest.driver.profiles import compute_popularity
from loadtest.fleets.fleet import list_fleet_names
from loadtest.fleets.network_shape import make_request
from model_store.errors import LoadError
from model_store.stores.object_store import open_source
from server.contract import HEADER_CACHE, JSON

FAILED, ANSWERED = "failed", "answered"  #: rows of failed requests, and of answers without X-Fleetcast-Cache

log = logging.getLogger(__name__)


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    """Add the options of this file to those of Locust."""
    group = parser.add_argument_group("Fleetcast")
    group.add_argument("--fleet-store", env_var="FLEETCAST_STORE", default="", help="the server's store, for the names")
    group.add_argument("--fleet-models", type=int, default=200, help="so many of its models; without it, demo names")
    group.add_argument("--fleet-zipf", type=float, default=1.0, help="popularity of rank r is 1 / r to this power")
    group.add_argument("--fleet-seed", type=int, default=0, help="who is popular, and what is asked")
    group.add_argument("--allow-remote", action="store_true", help="load an address beyond loopback")


@events.init.add_listener
def prepare_users(environment: Any, **_: Any) -> None:
    """Read names, popularity and body once for all users of a process; Locust ends if there are none."""
    options = environment.parsed_options
    try:
        names = _list_names(options.fleet_store, options.fleet_models)
    except (LoadError, ValueError, OSError) as error:
        raise SystemExit(f"no load: {error}") from error
    popularity = compute_popularity(len(names), options.fleet_zipf, np.random.default_rng(options.fleet_seed))
    ClientOfTheFleet.names, ClientOfTheFleet.up_to = names, np.cumsum(popularity).tolist()
    ClientOfTheFleet.body = orjson.dumps(make_request(options.fleet_seed))
    log.warning("Locust is a closed loop, whose percentiles are too good when a server stalls: see fleetcast-load")


@events.test_start.add_listener
def refuse_strangers(environment: Any, **_: Any) -> None:
    """Quit before the first request if --host, or the host typed into the page, is not this machine."""
    if not environment.parsed_options.allow_remote and (why := _explain_remote(environment.host or "")):
        log.error("no load: %s", why)
        environment.process_exit_code = 1  # Locust ignores the exit code of SystemExit
        raise SystemExit(1)


def _explain_remote(host: str) -> str | None:
    """Explain why an address is refused. (The driver cannot be imported, because gevent removes its selector.)"""
    try:
        found = socket.getaddrinfo(urlsplit(host).hostname or "", None, type=socket.SOCK_STREAM)
    except OSError as error:
        return f"--host {host!r}: {error}; give http://HOST:PORT"
    strangers = [at[0] for *_, at in found if not ipaddress.ip_address(at[0]).is_loopback]
    return f"{host} is {strangers[0]}, not this machine: loading it takes --allow-remote" if strangers else None


def _list_names(store: str, models: int) -> Sequence[str]:
    listed = (each.name for each in open_source(store).list()) if store else iter(list_fleet_names(models))
    names = list(itertools.islice(listed, max(0, models)))
    if not names:
        raise ValueError(f"no models: {store or 'no --fleet-store'} has none, or --fleet-models {models} is too few")
    return names


class ClientOfTheFleet(FastHttpUser):
    """A user that requests one model after another without pauses."""

    names: ClassVar[Sequence[str]] = []
    up_to: ClassVar[list[float]] = []  #: [models] cumulated popularity
    body: ClassVar[bytes] = b""

    @task
    def forecast(self) -> None:
        """Request one forecast and count the answer in the row of its cache result."""
        dialect = DIALECTS["sagemaker"]
        (model,) = random.choices(self.names, cum_weights=self.up_to)
        headers = {key: value.format(model=model) for key, value in dialect.headers.items()}
        headers["Content-Type"] = JSON
        with self.client.post(
            dialect.path, data=self.body, headers=headers, name=FAILED, catch_response=True
        ) as response:
            if response.status_code == 200:  # noqa: PLR2004 -- the others are failures to Locust already
                response.request_meta["name"] = response.headers.get(HEADER_CACHE, ANSWERED)
                if why := find_fault(response.content):
                    response.failure(f"{model}: {why}")
