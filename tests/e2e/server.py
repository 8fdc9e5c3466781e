"""A real Fleetcast for end-to-end tests: `fleetcast serve` in its own processes, with helpers for tests.

However a test ends, the server ends: by SIGTERM, with exit code 0, and leaving no process behind.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import boto3
import httpx
from botocore.config import Config
from botocore.exceptions import ClientError
from prometheus_client.parser import text_string_to_metric_families

import server as package
from tests.e2e.models import Model, Question
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

ROOT = Path(package.__file__).parent.parent
SHOWN_LOG = 8000
OWN_VARIABLES = ("AWS_", "XDG_", "FLEETCAST_", "SAGEMAKER_")
PROMTOOL = shutil.which("promtool")
MAKING_CLIENTS = threading.Lock()  #: boto3 clients may be used by any thread, but not made by several
MARK = "E2E_SERVER"  #: variable that every process of one server inherits, whoever is its parent by now


class Answer(NamedTuple):
    """What boto3 gave: the body, and the headers by lower-case name."""

    body: bytes
    headers: Mapping[str, str]

    @property
    def cache(self) -> str:
        """hit, miss or coalesced."""
        return self.headers["x-fleetcast-cache"]

    @property
    def version(self) -> str:
        """Of the model that answered."""
        return self.headers["x-fleetcast-model-version"]


@dataclass
class Server:
    """A running server. `exit_code` is what its supervisor must end with: a test that kills it says so."""

    process: "subprocess.Popen[bytes]"
    mark: str
    log: Path
    addresses: Mapping[str, str]
    exit_code: int = 0
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=PATIENCE_S, trust_env=False))

    @property
    def url(self) -> str:
        """The inference listener's address."""
        return self.addresses["inference"]

    @property
    def address(self) -> tuple[str, int]:
        """The same as host and port."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    @property
    def grpc(self) -> str:
        """The gRPC listener, as its clients name it."""
        return self.addresses["grpc"].partition("://")[2]

    # --- clients ----------------------------------------------------------------------------------------------------

    def client(self, *, attempts: int | None = 1, key: str = "test", secret: str = "testing") -> Any:
        """An unmodified boto3 client. With one attempt every answer is seen as it is; None: as boto3 comes."""
        retries = {} if attempts is None else {"retries": {"total_max_attempts": attempts}}
        with MAKING_CLIENTS:
            return boto3.client(
                "sagemaker-runtime",
                endpoint_url=self.url,
                region_name="us-east-1",
                aws_access_key_id=key,
                aws_secret_access_key=secret,
                config=Config(connect_timeout=PATIENCE_S, read_timeout=PATIENCE_S, max_pool_connections=64, **retries),
            )

    def ask(self, question: Question, client: Any = None, **arguments: Any) -> Answer:
        """Ask through boto3 and check the numbers. Raises ClientError for a refusal."""
        answer = invoke(client or self._client, question.model, question.body, **arguments)
        question.check(answer.body)
        return answer

    @cached_property
    def _client(self) -> Any:
        return self.client()

    def post(self, model: str | None, body: bytes = b"{}", headers: Mapping[str, str] | None = None) -> httpx.Response:
        """One invocation without boto3, to see the answer as it is on the wire."""
        target = {} if model is None else {"X-Amzn-SageMaker-Target-Model": model}
        raw = {name.encode(): value.encode() for name, value in {**target, **(headers or {})}.items()}
        return self.http.post(f"{self.url}/endpoints/fleet/invocations", content=body, headers=raw)

    # --- management -------------------------------------------------------------------------------------------------

    def fleet(self, verb: str, model: str) -> httpx.Response:
        """`POST /fleet/{verb}/{model}`."""
        return self.http.post(f"{self.addresses['management']}/fleet/{verb}/{model}")

    def models(self, **query: str) -> dict[str, Any]:
        """`GET /fleet/models` by name."""
        page = self.http.get(f"{self.addresses['management']}/fleet/models", params={"limit": "1000", **query}).json()
        return {row["model"]: row for row in page["models"]}

    def resident(self) -> set[str]:
        """Names of the models that some worker holds."""
        return {
            name
            for name, row in self.models().items()
            if any(holder["state"] in ("ready", "retiring") for holder in row["holders"])
        }

    def processes(self, kind: str) -> list[dict[str, Any]]:
        """The fronts or the workers, as the supervisor sees them."""
        rows = self.http.get(f"{self.addresses['management']}/fleet/processes").json()["processes"]
        return [row for row in rows if row["kind"] == kind]

    def exposition(self) -> str:
        """`GET /metrics`."""
        return self.http.get(f"{self.addresses['metrics']}/metrics").text

    def series(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every counter's value (histograms' counts and buckets too), by name and labels."""
        families = text_string_to_metric_families(self.exposition())
        counting = (family for family in families if family.type != "gauge")
        return {(s.name, frozenset(s.labels.items())): s.value for family in counting for s in family.samples}

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        families = text_string_to_metric_families(self.exposition())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    # --- processes --------------------------------------------------------------------------------------------------

    def survivors(self) -> list[int]:
        """Processes of this server that still run, whoever is their parent."""
        needle = f"{MARK}={self.mark}".encode()
        pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
        return [pid for pid in pids if needle in _make_environment(pid)]

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def said(self) -> str:
        """The log so far. Each process writes its lines on a thread of its own: the last ones may be missing yet."""
        return self.log.read_text(errors="replace")

    def await_said(self, text: str, count: int = 1) -> None:
        """Wait until the log says this so many times, and fail if it says it more often."""
        wait_until(lambda: self.said().count(text) >= count, f"the log says {text!r}, {count} times")
        assert self.said().count(text) == count


def invoke(client: Any, model: str, body: bytes, **arguments: Any) -> Answer:
    """`invoke_endpoint` as a user calls it."""
    given = {"ContentType": "application/json", "EndpointName": "fleet", **arguments}
    reply = client.invoke_endpoint(TargetModel=model, Body=body, **given)
    with closing(reply["Body"]) as stream:
        return Answer(stream.read(), reply["ResponseMetadata"]["HTTPHeaders"])


def is_answered(server: Server, model: Model) -> bool:
    """Whether the model serves by now."""
    try:
        server.ask(model.question(0))
    except ClientError:
        return False
    return True


def request_bytes(question: Question) -> bytes:
    """The question as HTTP."""
    head = (
        "POST /invocations HTTP/1.1\r\nHost: fleet\r\nContent-Type: application/json\r\n"
        f"X-Amzn-SageMaker-Target-Model: {question.model}\r\nContent-Length: {len(question.body)}\r\n\r\n"
    )
    return head.encode() + question.body


def never_reading(server: Server, question: Question, times: int = 1) -> socket.socket:
    """A connection with the smallest receive buffer that has sent the question, and reads nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(server.address)
    sock.sendall(request_bytes(question) * times)
    return sock


def lint(exposition: str) -> str:
    """What `promtool check metrics` has to say against it; empty when all is well."""
    assert PROMTOOL is not None
    found = subprocess.run(
        [PROMTOOL, "check", "metrics"],
        input=exposition,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    return f"{found.stdout}{found.stderr}" or (f"exit code {found.returncode}" if found.returncode else "")


def upload(s3: S3Server, bucket: str, models: Sequence[Model], prefix: str = "") -> dict[str, str]:
    """Put the archives into the store, several at a time. Their ETags by name."""
    with closing(s3.client()) as client, ThreadPoolExecutor(8) as pool:
        replies = pool.map(
            lambda model: client.put_object(Bucket=bucket, Key=prefix + model.name, Body=model.data)["ETag"], models
        )
        return {model.name: etag.strip('"') for model, etag in zip(models, replies, strict=True)}


@contextmanager
def run_server(s3: S3Server, folder: Path, store: str | None, **settings: Any) -> Iterator[Server]:
    """`fleetcast serve` in processes of its own, ready; its caches and home are below `folder`.

    A setting of None is left to the server, or to the fleetcast.toml in `folder`, which is its working folder.
    Beside the settings, `http` is an httpx.Client that the test asks it by, where it has certificates of its own,
    `environment` has variables of the process (None removes one), and `output` is where the log goes instead of a file.

    On the way out it ends by SIGTERM; exit code, orphans and tracebacks in the log are checked. The log is printed, so
    that pytest shows it beside a failure.
    """
    http: httpx.Client | None = settings.pop("http", None)
    variables: dict[str, str | None] = settings.pop("environment", {})
    output: int | None = settings.pop("output", None)
    mark = uuid.uuid4().hex
    log, announce = folder / f"{mark}.log", folder / f"{mark}.json"
    ports = {"inference_port": 0, "management_port": 0, "metrics_port": 0}
    defaults = {
        "workers": 1,
        "device": "cpu",  # also on a host with GPUs, which many servers at a time would fill: tests/gpu has one there
        "disk_cache": folder / "cache",
        "store_retries": 1,
        "store_timeout_s": PATIENCE_S,
        "drain_s": 10,
        "log_format": "json",
        "spare_worker": "off",  # importing torch once more would slow down all other tests
    }
    given = {"store": store, "announce": announce, **ports, **defaults, **settings}
    flags = _make_flags({name: value for name, value in given.items() if value is not None})
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli.main", "serve", *flags],
            cwd=folder, env=_child_environment(s3, folder, mark, variables),
            stdin=subprocess.DEVNULL, stdout=output or out, stderr=output or out,
        )  # fmt: skip
    server = Server(process, mark, log, {})
    if http is not None:
        server.http = http
    try:
        server.addresses = _await_ready(server, announce)
        yield server
        if process.poll() is None:
            server.terminate()
        assert process.returncode == server.exit_code, f"the supervisor ended with {process.returncode}"
        wait_until(lambda: not server.survivors(), "no process is left behind")
        assert not [line for line in server.said().splitlines() if _is_own_traceback(line)], "a traceback in the log"
    finally:
        server.http.close()
        for pid in {process.pid, *server.survivors()} if process.poll() is None else server.survivors():
            _kill(pid)
        process.wait()
        sys.stdout.write(f"--- the server's log\n{server.said()[-SHOWN_LOG:]}\n")


def _is_own_traceback(line: str) -> bool:
    """Whether the line has a traceback that the code of an archive has not printed."""
    return "Traceback" in line and '"event": "code_said"' not in line


def _make_flags(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        many = [f"{key}={secret}" for key, secret in value.items()] if isinstance(value, dict) else value
        for each in many if isinstance(many, list) else [value]:
            yield from ("--" + name.replace("_", "-"), str(each))


def _child_environment(s3: S3Server, folder: Path, mark: str, variables: Mapping[str, str | None]) -> dict[str, str]:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}
    merged = {**plain, **s3.env, "HOME": str(home), "PYTHONPATH": str(ROOT), MARK: mark, **variables}
    return {name: value for name, value in merged.items() if value is not None}


def _await_ready(server: Server, announce: Path) -> Mapping[str, str]:
    def read_announcement() -> bool:
        assert server.process.poll() is None, f"the server ended with {server.process.returncode} before it was ready"
        return announce.exists()

    wait_until(read_announcement, "the server announces its addresses")
    found: dict[str, str] = json.loads(announce.read_text())
    wait_until(lambda: server.http.get(f"{found['inference']}/ready").is_success, "/ready says yes")
    return found


def _make_environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone meanwhile, or another user's; a zombie's is empty
        return b""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def open_files(pid: int) -> int:
    """How many descriptors the process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def peak_memory(pid: int) -> int:
    """The most resident bytes the process has had."""
    status = Path(f"/proc/{pid}/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


class Outcome(NamedTuple):
    """What became of one request of a `Load`: `problem` is empty for a right answer, else what it was refused with."""

    model: str
    seconds: float
    problem: str
    version: str


class Load:
    """Clients that keep asking until the block ends: `with Load(server, questions) as load`.

    `ask(question, client)` asks and checks; by default the server's own.
    """

    def __init__(
        self,
        server: Server,
        questions: Sequence[Question],
        *,
        ask: Callable[[Question, Any], Answer] | None = None,
        clients: int = 3,
        pause_s: float = 0.02,
    ) -> None:
        self._server, self._questions, self._pause_s = server, questions, pause_s
        self._check = ask or server.ask
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i, clients)) for i in range(clients)]
        self.outcomes: list[Outcome] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def more(self, count: int) -> None:
        """Wait for `count` further outcomes."""
        goal = len(self.outcomes) + count
        wait_until(lambda: len(self.outcomes) >= goal, f"{count} more answers under load")

    def _run(self, first: int, step: int) -> None:
        client = self._server.client()
        at = first
        while not self._stop.wait(self._pause_s):
            self.outcomes.append(self._ask(client, self._questions[at % len(self._questions)]))
            at += step

    def _ask(self, client: Any, question: Question) -> Outcome:
        started = time.perf_counter()
        problem = version = ""
        try:
            version = self._check(question, client).version
        except ClientError as error:
            problem = f"{error.response['ResponseMetadata']['HTTPStatusCode']} {error.response['Error']['Code']}"
        except Exception as error:  # the test judges it
            problem = repr(error)
        return Outcome(question.model, time.perf_counter() - started, problem, version)
