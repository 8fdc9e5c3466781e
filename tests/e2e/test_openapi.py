"""The document of all routes against a running server: every answer is declared, and none is a fault of the server."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.routes.example_requests import make_example
from server.routes.inference import choose_protocols
from server.routes.management import METRICS, choose_management
from tests.e2e.models import FORECAST_TCN, pack_forecaster
from tests.e2e.server import Server, run_server, upload
from tests.loadtest.browser import CHROMIUM, open_browser
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODEL = "au/nsw1.mar"
EXAMPLES, SEED = 6, 7  #: of each operation
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
#: Waits in the page for what an expression gives, and resolves to it: the page's own requests take their time.
WAIT = "new Promise((done) => (function look() { const found = %s; found ? done(found) : setTimeout(look, 20); })())"
#: The box of a route on the page, as a reader finds it: by the words of its line.
BOX = "[...document.querySelectorAll('details')].find((box) => box.querySelector('summary').textContent.startsWith(%s))"


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A worker and a model."""
    bucket = s3.bucket()
    upload(s3, bucket, [pack_forecaster(MODEL, 0, config=FORECAST_TCN, forecast=True)])
    with run_server(s3, tmp_path_factory.mktemp("house"), f"s3://{bucket}", workers=1) as server:
        yield server


def get(server: Server, path: str) -> httpx.Response:
    """An answer of the management listener."""
    return server.http.get(f"{server.addresses['management']}{path}")


def test_the_page_takes_nothing_from_elsewhere(house: Server) -> None:
    """It and its files are there, name no other site, and the policy forbids them to; other files are not served."""
    page = get(house, "/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    files = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    assert set(files) == {"/openapi.json", "/docs/docs.css", "/docs/docs.js"}
    for path in files:
        assert get(house, path).is_success
        assert "://" not in get(house, path).text or path == "/openapi.json"
    assert "://" not in page.text
    assert get(house, "/docs/..%2Fmanagement_api.py").status_code == 404


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH to open the page in")
def test_the_page_works_in_a_browser(house: Server, tmp_path: Path) -> None:
    """It lists every route, filters them, sends one of its listener, shows another's as a command; all from itself."""
    management = house.addresses["management"]
    paths = get(house, "/openapi.json").json()["paths"]
    assert house.fleet("load", MODEL).is_success
    operations = sum(len(item) - 1 for item in paths.values())  # beside its servers
    with open_browser(tmp_path) as page:
        page.open(f"{management}/docs")
        assert page.value(WAIT % "document.querySelectorAll('details').length") == operations
        described, asked = find_box("GET/fleet/models/{model}"), find_box("POST/invocations")
        page.value(f"{described}.open = true")
        page.value(f"""(() => {{
          const name = {described}.querySelector("input");
          name.value = {json.dumps(MODEL)};
          name.dispatchEvent(new Event("input", {{ bubbles: true }}));
          {described}.querySelector("button").click();
        }})()""")
        answer = page.value(WAIT % f"{described}.querySelectorAll('pre')[1].textContent")
        status, _, body = answer.partition("\n")
        assert status == "200", answer
        assert MODEL in json.dumps(json.loads(body))
        command = page.value(f"{described}.querySelector('pre').textContent")
        assert command == f"curl -i -X GET '{management}/fleet/models/{MODEL}'"
        page.value(f"{asked}.open = true")
        command = page.value(WAIT % f"{asked}.querySelector('pre').textContent")
        assert command.startswith(f"curl -i -X POST '{house.url}/invocations'")
        assert page.value(f"{asked}.querySelector('button')") is None
        page.value("""(() => {
          const filter = document.getElementById("filter");
          filter.value = "/fleet/models/{model}";
          filter.dispatchEvent(new Event("input", { bubbles: true }));
        })()""")
        assert page.value(f"[{described}.hidden, {asked}.hidden]") == [False, True]
        # A recommendation is Chromium's taste: that a password's field stands in a form.
        assert [each for each in page.said if each.get("entry", {}).get("source") != "recommendation"] == []
        requested = page.requested
    assert f"{management}/fleet/models/{MODEL}" in requested
    assert all(url.startswith(f"{management}/") for url in requested), requested


def find_box(words: str) -> str:
    """The expression of a route's box."""
    return BOX % json.dumps(words)


def test_the_document_names_each_listener(house: Server) -> None:
    """Every route of the table with the address that answers it; a page elsewhere cannot read it."""
    document = get(house, "/openapi.json").json()
    listed = {
        "inference": choose_protocols("torchserve", "off"),
        "management": choose_management("torchserve", "off"),
        "metrics": (METRICS,),
    }
    paths = {route.path: name for name in ("metrics", "management", "inference") for each in listed[name]
             for route in each.routes if "?" not in route.path}  # fmt: skip
    found = {path: item["servers"][0]["url"] for path, item in document["paths"].items()}
    assert found == {path: house.addresses[name] for path, name in paths.items()}
    elsewhere = {"origin": "http://elsewhere.example"}
    assert house.http.get(f"{house.addresses['management']}/openapi.json", headers=elsewhere).status_code == 403


@pytest.mark.parametrize("listener", ["inference", "management"])
def test_schemathesis_finds_nothing(house: Server, listener: str, tmp_path: Path) -> None:
    """Requests made of the document, right and wrong ones, each answered as it says; so many and by one seed."""
    document = get(house, "/openapi.json").json()
    address = house.addresses[listener]
    own = {path: item for path, item in document["paths"].items() if item["servers"][0]["url"] == address}
    if listener == "inference":  # any method asks as POST does, and a version as none
        for item in own.values():
            item.pop("put", None)
    own = {path: item for path, item in own.items() if "/versions/" not in path}
    report = run_schemathesis({**document, "paths": own}, address, tmp_path)
    assert report.returncode == 0, report.stdout[-6000:] + report.stderr[-2000:]
    assert house.http.get(f"{house.url}/ready").is_success


def run_schemathesis(document: dict[str, Any], address: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """What it says of a listener."""
    for item in document["paths"].values():
        item.pop("servers")
    (folder / "openapi.json").write_text(json.dumps(document))
    tool = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("schemathesis is not installed: `make venv` brings it")
    command = [tool, "run", "openapi.json", "--url", address, "--checks", CHECKS]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES), "--seed", str(SEED)]
    command += ["--generation-database", "none", "--no-color", "--request-timeout", "20"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_errors_say_place_and_near_names(house: Server) -> None:
    """In the message, which is all that boto3 shows; with its request id."""
    headers = {"x-amzn-sagemaker-target-model": MODEL, "x-request-id": "mine"}
    example = make_example(house.http.get(f"{house.url}/v2/models/{MODEL}").json())
    good = house.http.post(f"{house.url}/invocations", headers=headers, json=example)
    assert (good.status_code, good.headers["x-amzn-requestid"]) == (200, "mine")
    example["instances"][0]["target"][2] = "abc"
    bad = house.http.post(f"{house.url}/invocations", headers=headers, json=example)
    assert bad.json()["message"].startswith("instances[0].target[2]: expected a number, null or \"NaN\", not 'abc'")
    assert bad.headers["x-amzn-requestid"] == "mine"
    unknown = headers | {"x-amzn-sagemaker-target-model": "au/nsw2.mar"}
    said = house.http.post(f"{house.url}/invocations", headers=unknown, json=example).json()["message"]
    assert said.endswith(f"names that are like it: {MODEL}")
