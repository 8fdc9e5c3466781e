"""A server moved from TorchServe: started from what `fleetcast migrate` printed, with the archives as they were."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from tests.archives import make_mar_manifest, make_zip
from tests.e2e.server import Server, invoke, run_server
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

HANDLER = """
def handle(data, context):
    return None if data is None else [{"twice": 2 * row["body"]["x"]} for row in data]
"""
CONFIG = """\
# as TorchServe was started with it; port 0 is a free one
inference_address=http://127.0.0.1:0
management_address=http://0.0.0.0:0
metrics_address=http://127.0.0.1:0
model_store=model_store
load_models=twice.mar
default_response_timeout=$$RESPONSE_SECONDS$$
job_queue_size=50
max_request_size=2000
number_of_gpu=0
async_logging=true
enable_envvars_config=true
disable_token_authorization=true
cors_allowed_origin=*
"""


@pytest.fixture(scope="module")
def moved(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose only configuration is what was printed; flags say nothing but what keeps tests apart."""
    folder: Path = tmp_path_factory.mktemp("moved")
    (folder / "config.properties").write_text(CONFIG)
    (folder / "model_store").mkdir()
    archive = make_zip({**make_mar_manifest("handler.py"), "handler.py": HANDLER.encode()})
    (folder / "model_store" / "twice.mar").write_bytes(archive)
    printed = CliRunner().invoke(
        app,
        ["migrate", str(folder / "config.properties")],
        env={"TS_MAX_REQUEST_SIZE": "1000", "RESPONSE_SECONDS": "20"},
    )
    assert printed.exit_code == 0, printed.stderr
    assert printed.stderr == "TorchServe: 10 settings, 1 to do by hand, 2 so without a setting, 1 ignored\n"
    (folder / "fleetcast.toml").write_text(printed.stdout)
    ports = dict.fromkeys(("inference_port", "management_port", "metrics_port"))
    with run_server(s3, folder, None, device=None, **ports) as server:
        yield server


def test_a_server_starts_from_what_is_printed(moved: Server) -> None:
    """It loads what was loaded at the start, runs its code, and has the limits of the file and of its variable."""
    wait_until(lambda: "twice.mar" in moved.resident(), "the pinned model is loaded")
    assert json.loads(invoke(moved.client(), "twice.mar", b'{"x": 21}').body) == {"twice": 42}
    assert moved.post("twice.mar", b" " * 1001).status_code == 413
    assert moved.addresses["management"].startswith("http://127.0.0.1:")
