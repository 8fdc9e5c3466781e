"""Compares servers: those with the right answers take turns under load; one that fails drops out, with its reason."""

import http.client
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from handlers.forecasters import build_family, random_tensors
from handlers.kinds import ArchiveParts, pack_model
from loadtest.driver import wrk
from loadtest.driver.request_bodies import RequestBody
from loadtest.fleets.network_shape import CONFIG as TCN
from loadtest.peers.comparison_table import CONNECTIONS, OURS, OURS_WAYS, order_turns, summarize_runs
from loadtest.peers.encodings import Encode, encode_json
from loadtest.peers.environments import PeerUnavailable
from loadtest.peers.peer_server import PeerServer
from loadtest.record import summarise_spread
from model_store.archives.manifest import Kind

SEED = 7
WARM_S, IDLE_S = 2, 3
BURNS = 0.01  #: cores; a server that uses more when idle is stopped between its turns
CLOSE = 1e-4
#: exceptions of a server that fails
LOST = (
    PeerUnavailable,
    RuntimeError,
    OSError,
    ValueError,
    LookupError,
    http.client.HTTPException,
    subprocess.SubprocessError,
)


@dataclass(frozen=True, slots=True)
class Models:
    """The weights that all servers get: archives in `store`, plain safetensors in folders under `weights`."""

    store: Path
    weights: Path
    x: npt.NDArray[np.float32]  #: [8, 168], the input of every request
    answers: dict[str, npt.NDArray[np.float64]]  #: model -> the plain network's answer, [24 * 5]

    @property
    def names(self) -> list[str]:
        """M0, m1, ..."""
        return list(self.answers)


def write_models(folder: Path, count: int) -> Models:
    """Make `count` models with seeded random weights, and their answers."""
    family = build_family("tcn", TCN)
    network = family.reference()
    x = np.random.default_rng(SEED).standard_normal((8, 168), np.float32).round(4)
    models = Models(folder / "store", folder / "weights", x, {})
    models.store.mkdir()
    for i in range(count):
        tensors = random_tensors(family, SEED * 1_000_000 + i)
        (models.weights / f"m{i}").mkdir(parents=True)
        save_file(tensors, models.weights / f"m{i}" / "weights.safetensors")
        archive = pack_model(
            Kind.FORECASTER, ArchiveParts(tensors=tensors, architecture="tcn", config=TCN), model_name=f"m{i}.mar"
        )
        (models.store / f"m{i}.mar").write_bytes(archive)
        network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
        with torch.inference_mode():
            models.answers[f"m{i}"] = network(torch.from_numpy(x)[None]).numpy().astype(np.float64).ravel()
    return models


@dataclass(slots=True)
class Contender:
    """A server in the comparison, its requests, and its results so far."""

    server: PeerServer
    names: Sequence[str]
    request: RequestBody
    target: wrk.WrkTarget
    found: dict[str, Any]
    stack: ExitStack
    runs: dict[int, list[wrk.WrkResult]] = field(default_factory=lambda: {each: [] for each in CONNECTIONS})
    burns: bool = False

    def __repr__(self) -> str:
        return f"<Contender {self.server!r}, {len(self.runs[CONNECTIONS[0]])} turns>"

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Wake the server for its turn if it is stopped between turns; its first answers show that it serves again."""
        if not self.burns:
            yield
            return
        self.server.tree.signal(signal.SIGCONT)
        try:
            for name in self.names:
                self.server.ask(name, self.request)
            yield
        finally:
            self.server.tree.signal(signal.SIGSTOP)


class PeerComparison:
    """The servers that take part, and the reasons why others do not. One thread."""

    def __init__(self, models: Models, folder: Path, stack: ExitStack) -> None:
        self.models = models
        self.contenders: dict[str, Contender] = {}
        self.lost: dict[str, str] = {}
        self._folder = folder
        self._stack = stack

    def __repr__(self) -> str:
        return f"<PeerComparison of {', '.join(self.contenders)}; lost: {', '.join(self.lost) or 'none'}>"

    @contextmanager
    def risking(self, name: str) -> Iterator[None]:
        """Drop a server that fails in this block from the comparison, with its reason. Fleetcast may not fail."""
        try:
            yield
        except LOST as error:
            if name.startswith(OURS):
                raise
            self.lost[name] = " ".join(str(error).split()) or type(error).__name__
            contender = self.contenders.pop(name, None)
            if contender is not None:
                contender.stack.close()

    def enter(
        self,
        name: str,
        version: str,
        start: Callable[[], AbstractContextManager[PeerServer]],
        count: int,
        encode: Encode = encode_json,
    ) -> None:
        """Start a server, load `count` models into it, compare its answers with the plain network's, and warm it.

        `encode` writes its request, which is the one that is checked and the one of its load.
        """
        stack = self._stack.enter_context(ExitStack())
        with self.risking(name), ExitStack() as unless_entered:
            unless_entered.push(stack)
            begin = time.monotonic()
            server = stack.enter_context(start())
            stack.callback(server.tree.signal, signal.SIGCONT)  # a stopped process would not handle SIGTERM
            found: dict[str, Any] = {"version": version, "start_s": time.monotonic() - begin}
            request, names = encode(self.models.x, server.dialect), self.models.names[:count]
            found |= {"settings": dict(server.settings), "body": request.content_type, "body_bytes": len(request.body)}
            if not server.fixed:
                found["load_ms"] = summarise_spread([server.load(each, request) * 1e3 for each in names])
            for each in names:
                self._check(server, each, request)
            file = self._folder / f"{name}.body"
            file.write_bytes(request.body)
            target = wrk.WrkTarget(
                name, server.url, count, server.suffix, file, request.content_type, server.dialect, request.headers
            )
            wrk.run_wrk(target, CONNECTIONS[-1], WARM_S)
            self.contenders[name] = Contender(server, names, request, target, found, stack)
            unless_entered.pop_all()

    def _check(self, server: PeerServer, model: str, request: RequestBody) -> None:
        """Check the answers. Raises RuntimeError if one differs from the plain network."""
        wanted = self.models.answers["m0" if server.fixed else model]
        got = server.ask(model, request)
        if got.shape != wanted.shape or not np.allclose(got, wanted, rtol=CLOSE, atol=CLOSE):
            raise RuntimeError(
                f"{server.name} answers {got[:3]} ... for {model}, where the weights give {wanted[:3]} ..."
            )

    def settle(self) -> None:
        """Measure the CPU time of each idle server, and stop the servers that use too much between their turns."""
        before = {name: each.server.tree.cpu_s() for name, each in self.contenders.items()}
        time.sleep(IDLE_S)
        for name, each in self.contenders.items():
            idle = (each.server.tree.cpu_s() - before[name]) / IDLE_S
            each.burns = idle > BURNS
            each.found |= {"idle_cores": idle, "stopped_between_turns": each.burns}
            if each.burns:
                each.server.tree.signal(signal.SIGSTOP)

    def play(self, rounds: int, seconds: int) -> Iterator[tuple[int, str, int]]:
        """Give each server a turn in every round, in rotating order; yields (round, server, connections)."""
        order = list(self.contenders)
        for number in range(rounds):
            for name in order_turns(order, number):
                if name not in self.contenders:
                    continue
                contender = self.contenders[name]
                with self.risking(name), contender.awake():
                    for connections in CONNECTIONS:
                        yield number, name, connections
                        contender.runs[connections].append(wrk.run_wrk(contender.target, connections, seconds))

    def results(self) -> dict[str, Any]:
        """Return the results of each server, with their ratios to those of Fleetcast."""
        ours = {name: self.contenders[name].runs for name in OURS_WAYS if name in self.contenders}
        return {
            name: {**each.found, **summarize_runs(each.runs, {} if name.startswith(OURS) else ours)}
            for name, each in self.contenders.items()
        }
