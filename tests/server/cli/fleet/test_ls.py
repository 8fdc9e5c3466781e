"""`fleetcast ls --names`: what other commands take."""

from collections.abc import Mapping
from typing import Any

import pytest

from model_store.names import ModelName, at_version
from server.cli.fleet.ls import _print_models


def test_names_leave_out_versions(capsys: pytest.CaptureFixture[str]) -> None:
    """A version that an alias holds is a row of its own, whose name neither `reload` nor `xargs` would understand."""
    name = ModelName("au/nsw1.mar")
    rows: list[Mapping[str, Any]] = [{"model": name}, {"model": at_version(name, "3b6411")}, {"model": "au/vic1.mar"}]
    _print_models(iter(rows), names=True, as_json=False)
    assert capsys.readouterr().out == "au/nsw1.mar\nau/vic1.mar\n"
    _print_models(iter(rows), names=False, as_json=True)
    assert len(capsys.readouterr().out.splitlines()) == 3
