"""Who takes part in the comparison: what each peer that can be chosen enters, in the order of the table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from loadtest import record
from loadtest.driver.dialects import DIALECTS
from loadtest.observe.local_server import run_local_server
from loadtest.peers.comparison import Models
from loadtest.peers.comparison_table import (
    MOSEC,
    MOSEC_BATCH,
    OURS,
    OURS_BINARY,
    OURS_NPY,
    PLAIN,
    RAY_BEST,
    TRITON,
    TRITON_BINARY,
)
from loadtest.peers.encodings import Encode, encode_array, encode_binary, encode_json
from loadtest.peers.environments import find_requirements, is_installed, parse_pins
from loadtest.peers.mosec.start import start_mosec
from loadtest.peers.network import load_network
from loadtest.peers.peer_server import PeerServer
from loadtest.peers.servers import (
    PACKAGE,
    PEERS,
    start_best_ray,
    start_fleetcast,
    start_plain,
    start_plain_openvino,
    wrap_server,
)
from loadtest.peers.triton.start import start_triton

MODELS, FLEET = 8, 200
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """A server that takes part: how it is started, how many models it loads, and the form of its requests."""

    name: str
    version: str
    start: Callable[[], AbstractContextManager[PeerServer]]
    count: int = MODELS
    encode: Encode = encode_json


@dataclass(frozen=True, slots=True)
class PeerChoice:
    """A peer that can be chosen: the folder of its environment (empty: ours), and its package there."""

    environment: str
    package: str
    list_entries: Callable[[str, Models, Path, Say], Iterator[Entry]]


def list_our_entries(models: Models) -> Iterator[Entry]:
    """Fleetcast: with few models and with many, and with each kind of binary request."""
    commit = record.find_commit()[:7]
    yield Entry(OURS, commit, partial(start_fleetcast, OURS, models.store))
    yield Entry(f"{OURS} x{FLEET}", commit, partial(start_fleetcast, f"{OURS} x{FLEET}", models.store), FLEET)
    yield Entry(OURS_NPY, commit, partial(start_fleetcast, OURS_NPY, models.store), encode=encode_array)
    yield Entry(OURS_BINARY, commit, partial(start_open_inference, models.store), encode=encode_binary)


@contextmanager
def start_open_inference(store: Path) -> Iterator[PeerServer]:
    """Start Fleetcast with its defaults, asked by the Open Inference Protocol as Triton is."""
    with run_local_server(str(store)) as local:
        yield replace(wrap_server(OURS_BINARY, local), dialect=DIALECTS["v2"])


def list_peer_entries(peer: str, models: Models, folder: Path, say: Say) -> Iterator[Entry]:
    """What a chosen peer enters."""
    choice = CHOICES[peer]
    yield from choice.list_entries(find_peer_version(peer), models, folder, say)


def find_peer_version(peer: str) -> str:
    """The version of a peer's package: the pinned one, or of ours where it has no environment of its own."""
    choice = CHOICES[peer]
    if not choice.environment:
        return f"{choice.package} {version(choice.package)}"
    return parse_pins(find_requirements(choice.environment).read_text())[choice.package]


def describe_choice(peer: str) -> str:
    """One line: a peer, its version, and whether its environment is installed."""
    choice = CHOICES[peer]
    if not choice.environment:
        return f"{peer:14} {find_peer_version(peer)}: in this environment"
    state = "installed" if is_installed(choice.environment) else "installed at its first run"
    return f"{peer:14} {choice.package} {find_peer_version(peer)}: {state}"


def _list_plain(told: str, models: Models, folder: Path, _: Say) -> Iterator[Entry]:
    network = load_network(str(models.weights / "m0"))
    yield Entry(PLAIN, told, partial(start_plain, folder, network, MODELS))


def _list_plain_openvino(told: str, models: Models, folder: Path, say: Say) -> Iterator[Entry]:
    network = load_network(str(models.weights / "m0"))
    yield Entry("plain openvino", told, partial(start_plain_openvino, folder, network, MODELS, say))


def _list_triton(told: str, models: Models, _: Path, say: Say) -> Iterator[Entry]:
    yield Entry(TRITON, told, partial(start_triton, models.weights, say))
    yield Entry(TRITON_BINARY, told, partial(start_triton, models.weights, say), encode=encode_binary)


def _list_mosec(told: str, models: Models, _: Path, say: Say) -> Iterator[Entry]:
    yield Entry(MOSEC, told, partial(start_mosec, models.weights, say, 1))
    yield Entry(MOSEC_BATCH, told, partial(start_mosec, models.weights, say, 32))


def _list_best_ray(told: str, models: Models, _: Path, say: Say) -> Iterator[Entry]:
    yield Entry(RAY_BEST, told, partial(start_best_ray, models.weights, say, "ingress"))
    yield Entry(f"{RAY_BEST} behind", told, partial(start_best_ray, models.weights, say, "behind"))


def _list_one(peer: str, told: str, models: Models, _: Path, say: Say) -> Iterator[Entry]:
    yield Entry(peer, told, partial(PEERS[peer], models.weights, say))


CHOICES: Mapping[str, PeerChoice] = {
    "plain": PeerChoice("", "onnxruntime", _list_plain),
    "plain-openvino": PeerChoice("openvino", "openvino", _list_plain_openvino),
    "triton": PeerChoice("triton", "nvidia-pytriton", _list_triton),
    "mosec": PeerChoice("mosec", "mosec", _list_mosec),
    "ray-best": PeerChoice("ray", "ray", _list_best_ray),
    **{peer: PeerChoice(peer, PACKAGE[peer], partial(_list_one, peer)) for peer in PEERS},
}


def parse_choice(text: str) -> Sequence[str]:
    """Parse peers separated by commas. Raises ValueError for one that there is not."""
    chosen = [peer.strip() for peer in text.split(",") if peer.strip()]
    if unknown := [peer for peer in chosen if peer not in CHOICES]:
        raise ValueError(f"there is no peer {', '.join(unknown)}: known are {', '.join(CHOICES)}")
    return chosen
