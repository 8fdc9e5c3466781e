"""The environment of every test: its own home, no AWS settings of the machine, and the S3 server of the run."""

import gc
import os
import signal
from collections.abc import Generator, Iterator

import pytest
from hypothesis import HealthCheck, settings

from server.logs import configure_logs
from tests.s3 import S3Server, s3_server

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: spinning threads slow everyone on two cores


# How long an example takes, or takes to be drawn, depends on what else the machine does.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  #: that commands of ours handle
PROCESSES = frozenset({"s3", "reader"})  #: fixtures that start one

configure_logs("warning", "json")  # structlog's default draws tracebacks with every local variable, for seconds


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """No garbage is looked for while tests are collected, and none later among what stays until the end: every module.

    It was a quarter of a collection's processor time, in each process, and a twentieth of what the tests take.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What asks the S3 server or opens a page is slow: those are processes. Files that start servers come first.

    Several test processes take a file each from the front of this order. So the last files are short ones, and no
    process works alone on a long file after the others have ended. Among their like, files keep their random order.
    """
    for item in items:
        if isinstance(item, pytest.Function) and not PROCESSES.isdisjoint(item.fixturenames):
            item.add_marker("slow")
    ranks = {item.path: 0 for item in items}
    for item in items:
        rank = 2 if item.get_closest_marker("e2e") else 1 if item.get_closest_marker("slow") else 0
        ranks[item.path] = max(rank, ranks[item.path])
    items.sort(key=lambda item: -ranks[item.path])


@pytest.fixture(scope="session", autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """HOME is fresh, AWS_* and XDG_* are unset: neither credentials nor caches of the machine are used."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("AWS_", "XDG_")):
                patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture(scope="session")
def s3(_isolated: None) -> Iterator[S3Server]:
    """The run's S3 server; tests keep apart by buckets of their own."""
    with s3_server() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_fault_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test broke on purpose and did not use up breaks no other."""
    server = request.getfixturevalue("s3") if "s3" in request.fixturenames else None
    yield
    if server is not None:
        server.faults.clear()


@pytest.fixture(autouse=True)
def _signals_stay_as_they_were() -> Iterator[None]:
    """A command that a test runs in this process handles signals for the rest of its life: SIGTERM then failed one of
    the tests behind it, and ended none.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket, with the environment set so that `open_source("s3://{bucket}")` reaches it."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3.bucket()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: archives hold the time that they were made, and names must not differ."""
    return argname if isinstance(val, bytes) else None
