"""The peers in their strongest shape: what is written for them, sent to them and read from them, and goals."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from loadtest.driver.dialects import DIALECTS, HEADER_JSON_BYTES
from loadtest.peers.answers import decode_answer
from loadtest.peers.comparison import CLOSE, Models, write_models
from loadtest.peers.comparison_table import (
    GOALS,
    MOSEC,
    OURS,
    OURS_BINARY,
    OURS_NPY,
    PLAIN,
    TRITON,
    TRITON_BINARY,
    Goal,
    judge_goals,
    list_goals,
    list_settings,
)
from loadtest.peers.encodings import encode_array, encode_binary, encode_json
from loadtest.peers.environments import find_requirements, is_installed, parse_pins
from loadtest.peers.lineup import CHOICES, Entry, list_our_entries, list_peer_entries, parse_choice
from loadtest.peers.mosec.start import write_variables
from loadtest.peers.peer_server import describe_settings
from loadtest.peers.servers import write_best_variables
from loadtest.peers.triton.start import Wheel, write_command, write_model_config

X = (np.arange(8 * 168).reshape(8, 168) / 7).astype(np.float32)


def test_every_choice_pins_its_package() -> None:
    """A peer's numbers can be had again: its package, and the engine that runs the network, have one version each."""
    for name, choice in CHOICES.items():
        if choice.environment:
            pins = parse_pins(find_requirements(choice.environment).read_text())
            assert pins[choice.package], name
            assert pins.keys() & {"torch", "onnxruntime", "openvino"}, name
    engines = {parse_pins(find_requirements(each).read_text())["onnxruntime"] for each in ("triton", "mosec", "ray")}
    assert len(engines) == 1


def test_peers_are_chosen_by_name() -> None:
    """The order is the caller's, and a name that there is not is told with those that there are."""
    assert parse_choice("plain, triton,mosec,") == ["plain", "triton", "mosec"]
    with pytest.raises(ValueError, match=r"there is no peer tritom: known are plain, plain-openvino, triton, mosec, "):
        parse_choice("plain,tritom")


def test_a_binary_request_holds_the_input() -> None:
    """The document says where the tensor lies; its bytes are the input's, little-endian, and the answer is one too."""
    request = encode_binary(X, DIALECTS["v2"])
    at = int(request.headers[HEADER_JSON_BYTES])
    document = json.loads(request.body[:at])
    assert document["parameters"] == {"binary_data_output": True}
    assert document["inputs"] == [
        {"name": "x", "shape": [1, 8, 168], "datatype": "FP32", "parameters": {"binary_data_size": 8 * 168 * 4}}
    ]
    np.testing.assert_array_equal(np.frombuffer(request.body[at:], "<f4").reshape(8, 168), X)


def test_every_form_of_answer_is_read() -> None:
    """Numbers of npy, of both kinds of JSON, and of a binary tensor, of which only its own bytes."""
    wanted = [1.5, -2.0]
    assert decode_answer(encode_array(np.array([wanted], np.float32), DIALECTS["v2"]).body).tolist() == wanted
    assert decode_answer(b'{"predictions": [[1.5, -2]]}').tolist() == wanted
    assert decode_answer(b'{"outputs": [{"data": [1.5, -2]}]}').tolist() == wanted
    head = json.dumps({"outputs": [{"name": "predictions", "parameters": {"binary_data_size": 8}}]}).encode()
    assert decode_answer(head + struct.pack("<3f", *wanted, 9.0), str(len(head))).tolist() == wanted
    with pytest.raises((ValueError, LookupError)):
        decode_answer(b'{"error": "no such model"}')


def test_tritons_configuration() -> None:
    """A model has the Python backend, the network's shapes, and a batcher; the server only HTTP on loopback."""
    config = write_model_config("m3")
    assert 'name: "m3"\nbackend: "python"\n' in config
    assert "dims: [ 8, 168 ]" in config
    assert "dims: [ 24, 5 ]" in config
    assert "dynamic_batching { max_queue_delay_microseconds: 0 }" in config
    line = write_command(Wheel(Path("/site"), Path("/lib"), "3.11"), Path("/run"), 8123)
    assert line[0] == "/site/pytriton/tritonserver/bin/tritonserver"
    assert {"--http-address=127.0.0.1", "--http-port=8123", "--model-control-mode=explicit"} <= set(line)
    assert {"--allow-grpc=false", "--allow-metrics=false"} <= set(line)


def test_settings_are_told_without_this_machines_paths(tmp_path: Path) -> None:
    """The command, its configuration and what was chosen in its environment; nothing of the machine's own."""
    environment = {"HOME": "/home/me", **write_variables(tmp_path / "model.onnx", 32), **write_best_variables(tmp_path)}
    line = ["/venv/bin/python", "handler.py", f"--path={tmp_path}/socket"]
    settings = describe_settings(tmp_path, line, environment, config=f"store={tmp_path}/x\n")
    assert settings["command"] == "python handler.py --path=FOLDER/socket"
    assert settings["config"] == "store=FOLDER/x"
    assert settings["environment"]["PEER_GRAPH"] == "FOLDER/model.onnx"
    assert settings["environment"]["PEER_BATCH"] == "32"
    assert settings["environment"]["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert "HOME" not in settings["environment"]
    assert str(tmp_path) not in json.dumps(settings)
    shown = list_settings({"servers": {"mosec": {"body": "application/json", "body_bytes": 9, "settings": settings}}})
    assert "  mosec: application/json bodies of 9 bytes" in shown
    assert any("PEER_BATCH=32" in each for each in shown)


def _is_at(value: float) -> dict[str, float]:
    return {"median": value, "min": value - 0.1, "max": value + 0.1, "runs": 7}


def test_goals_are_judged_by_the_median() -> None:
    """Each goal compares one way of ours with one server; a miss is told as one, a server that is absent is not."""
    ratios = {
        f"{OURS} / it": {"requests_per_s": _is_at(2.6), "p50": _is_at(1.05)},
        f"{OURS_NPY} / it": {"requests_per_s": _is_at(1.9), "p50": _is_at(0.5)},
    }
    row = {f"{connections} connections": ratios for connections in (1, 8, 32)}
    judged = list(judge_goals({TRITON: row, TRITON_BINARY: row, PLAIN: row}))
    assert [(each["goal"].partition(":")[0], each["holds"]) for each in judged] == [
        ("fleetcast npy / triton binary, requests/s at 8", False),
        ("fleetcast npy / triton binary, requests/s at 32", False),
        ("fleetcast / triton, requests/s at 8", True),
        ("fleetcast / triton, requests/s at 32", True),
        ("fleetcast / plain, p50 at 1", False),
    ]
    assert list_goals({"goals": judged})[0] == (
        "fleetcast npy / triton binary, requests/s at 8: >= 2: 1.90 (1.80-2.00), missed"
    )
    assert list_goals({"goals": judged})[2].endswith(">= 2.5: 2.60 (2.50-2.70)")
    assert {goal.its for goal in GOALS} == {TRITON, TRITON_BINARY, PLAIN, MOSEC}
    assert str(Goal(OURS, PLAIN, 1, "p50", most=1.0)) == "fleetcast / plain, p50 at 1: <= 1"


def _check_answers(entry: Entry, models: Models) -> None:
    """Start a server, ask it for two models as it is asked under load, and see that it ends."""
    with entry.start() as server:
        request = entry.encode(models.x, server.dialect)
        for name in list(models.answers)[:2]:
            server.load(name, request)
            wanted = models.answers["m0" if server.fixed else name]
            np.testing.assert_allclose(server.ask(name, request), wanted, rtol=CLOSE, atol=CLOSE)
        assert server.settings
        assert server.tree.pids()
    assert server.tree.pids() == []


@pytest.mark.slow
def test_our_binary_answers_are_the_weights_numbers(tmp_path: Path) -> None:
    """JSON, npy and binary tensors are all sent to us; the last by the protocol that Triton has."""
    models = write_models(tmp_path, 2)
    entries = {each.name: each for each in list_our_entries(models)}
    sent = {name: entries[name].encode for name in (OURS, OURS_NPY, OURS_BINARY)}
    assert sent == {OURS: encode_json, OURS_NPY: encode_array, OURS_BINARY: encode_binary}
    _check_answers(entries[OURS_BINARY], models)


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["plain", "plain-openvino", "triton", "mosec"])
def test_a_peer_gives_the_weights_numbers(peer: str, tmp_path: Path) -> None:
    """Whichever is installed answers as the weights do, in every form in which it is asked."""
    environment = CHOICES[peer].environment
    if environment and not is_installed(environment):
        pytest.skip(f"{environment} is not installed: `make bench-peers` installs it")
    models = write_models(tmp_path, 8)
    for entry in list_peer_entries(peer, models, tmp_path, lambda _: None):
        _check_answers(entry, models)
