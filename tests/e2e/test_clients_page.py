"""docs/clients.md: every block runs as it stands, with the packages of its section, against real servers."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.clients import INSTALL_S, keep_variables, make_environment
from tests.e2e.forecasters import pack_hourly, pack_paths
from tests.e2e.server import ROOT, Server, run_server
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(INSTALL_S + PATIENCE_S)]

PAGE = ROOT / "docs" / "clients.md"
SECTION = re.compile(r"^## (.*?)$(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: By section, the packages that are not in the tests' own environment, as other tests have them.
MLFLOW = ("mlflow-skinny==3.17.2", "pandas", "scipy", "boto3", "databricks-sdk")
PACKAGES: Mapping[str, Sequence[str]] = {
    "KServe's Python client": ("kserve==0.16.0",),
    "MLServer": ("mlserver==1.7.1", "pandas<3", "requests"),
    "MLflow": MLFLOW,
    "Databricks' SDK": MLFLOW,
    "Nixtla": ("nixtla==0.9.0",),
}
BLOCKS = [
    pytest.param(title, language, text, id=title)
    for title, section in SECTION.findall(PAGE.read_text())
    for language, text in BLOCK.findall(section)
]


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    """The archives of the page."""
    made = s3.bucket()
    with closing(s3.client()) as client:
        client.put_object(Bucket=made, Key="au/nsw1.mar", Body=pack_hourly(1))
        client.put_object(Bucket=made, Key="au/paths.mar", Body=pack_paths(2))
    return made


@pytest.fixture(scope="module")
def house(s3: S3Server, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page's server."""
    settings = {"model_cache_bytes": "64MiB", "grpc_port": 0, "workers": 1}
    with run_server(s3, tmp_path_factory.mktemp("page"), f"s3://{bucket}", **settings) as server:
        yield server


@pytest.fixture(scope="module")
def mms_house(s3: S3Server, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same in Multi Model Server's place."""
    settings = {"model_cache_bytes": "64MiB", "model_server_api": "mms", "workers": 1}
    with run_server(s3, tmp_path_factory.mktemp("mms"), f"s3://{bucket}", **settings) as server:
        yield server


@pytest.mark.parametrize(("title", "language", "text"), BLOCKS)
def test_a_block_does_what_it_says(
    request: pytest.FixtureRequest, tmp_path: Path, title: str, language: str, text: str
) -> None:
    """It ends well and prints what it promises."""
    server: Server = request.getfixturevalue("mms_house" if title == "Multi Model Server" else "house")
    text = text.replace("http://127.0.0.1:8081", server.addresses["management"])
    text = text.replace("127.0.0.1:8080", "{}:{}".format(*server.address))
    text = text.replace("fleetcast invoke au/nsw1.mar", f"fleetcast invoke au/nsw1.mar --url {server.url}")
    if "127.0.0.1:8001" in text:
        text = text.replace("127.0.0.1:8001", server.grpc)
    python = make_environment(*PACKAGES[title]) if title in PACKAGES else Path(sys.executable)
    command = [str(python), "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    own = {} if title in PACKAGES else {"PYTHONPATH": f"{ROOT}:{ROOT / 'server' / 'sdk'}"}
    path = f"{Path(sys.executable).parent}:{keep_variables()['PATH']}"
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        cwd=tmp_path,
        env={**keep_variables(), **own, "PATH": path, "NO_PROXY": "*"},
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    assert re.search(r"\d", done.stdout), "nothing of a forecast is printed"
    assert '"error": {' not in done.stdout, done.stdout[-1000:]


def test_every_client_has_its_section() -> None:
    """Each section but the introduction has one block, so that none can be run by nobody."""
    found = SECTION.findall(PAGE.read_text())
    assert [title for title, _ in found] == [each.id for each in BLOCKS]
    assert set(PACKAGES) <= {title for title, _ in found}
