"""What becomes of the keys of TorchServe and Multi Model Server: each is said, and the settings are sound."""

import tomllib
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

from server.cli.setting_flags import settings_from
from server.offline.migration.configuration import Configuration, read_configuration
from server.offline.migration.model_servers import MMS, SERVERS, TORCHSERVE, ServerName, guess_server
from server.offline.migration.outcome import Fate
from server.offline.migration.rendering import render_command, render_report, render_toml
from server.offline.migration.rules import RULES
from server.offline.migration.translation import Translation, translate
from server.settings import Settings

SNAPSHOT = (
    'model_snapshot={"name": "x.cfg", "modelCount": 1, "models": {"noop": {"1.0": {"defaultVersion": true, '
    '"marName": "noop.mar", "minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "maxBatchDelay": 100, '
    '"responseTimeout": 200}}}}'
)


def read(text: str, variables: dict[str, str] | None = None, server: ServerName | None = None) -> Configuration:
    """The configuration of a file."""
    return read_configuration(text.encode("latin-1"), variables or {}, None if server is None else SERVERS[server])


def move(text: str, **more: Any) -> Translation:
    """What becomes of a file."""
    return translate(read(text, **more))


def settings_of(text: str, **more: Any) -> dict[str, Any]:
    """The settings, as a reader of fleetcast.toml gets them."""
    return tomllib.loads(render_toml(move(text, **more), "t"))


def reason(text: str, key: str, **more: Any) -> tuple[Fate, str]:
    """What becomes of one key, and why."""
    (found,) = [each for each in move(text, **more).findings if each.what.startswith(f"{key}=")]
    return found.outcome.fate, found.outcome.why


# --- which server ---------------------------------------------------------------------------------------------------


def test_a_file_shows_whose_it_is() -> None:
    """By the keys that only one of them reads; a key of the other is unknown to it."""
    assert guess_server(["inference_address"]) is TORCHSERVE
    assert guess_server(["inference_address", "preload_model"]) is MMS
    assert guess_server(["preload_model", "metrics_mode", "grpc_inference_port"]) is TORCHSERVE
    assert reason("metrics_mode=log", "metrics_mode", server=ServerName.MMS)[1] == (
        "Multi Model Server does not know this key either"
    )


def test_every_key_of_both_servers_has_a_rule() -> None:
    """And no rule is of a key that neither reads."""
    assert set(RULES) == TORCHSERVE.keys | MMS.keys


@pytest.mark.parametrize("server", [TORCHSERVE, MMS], ids=str)
@pytest.mark.parametrize("value", ["true", "false", "1", "", "x", "http://127.0.0.1:80", "none"])
def test_every_key_is_answered_whatever_its_value(server: Any, value: str) -> None:
    """No value is lost, none raises; what remains is a file that a reader of TOML and `fleetcast serve` take."""
    text = "\n".join(f"{key}={value}" for key in sorted(server.keys))
    translation = translate(read(text, server=server.name), store="models")
    assert len([found for found in translation.findings if "(line " in found.what]) == len(server.keys)
    assert all(found.outcome.settings or found.outcome.why for found in translation.findings if "(line" in found.what)
    toml = render_toml(translation, "t")
    assert Settings(**tomllib.loads(toml)).store == "models"
    assert all(key in toml for key in server.keys)


# --- values ---------------------------------------------------------------------------------------------------------


def test_addresses_become_hosts_and_ports() -> None:
    """Those of the old defaults too; https is for all listeners."""
    found = settings_of(
        "inference_address=https://0.0.0.0\nmanagement_address=http://127.0.0.1:9001\nmetrics_address=https://localhost\n"
        "private_key_file=k.pem\ncertificate_file=c.pem\nmodel_store=m"
    )
    assert (found["inference_host"], found["inference_port"]) == ("0.0.0.0", 443)
    assert (found["management_port"], found["metrics_port"]) == (9001, 8445)
    assert (found["tls_certificate"], found["tls_key"]) == ("c.pem", "k.pem")
    text = "inference_address=https://127.0.0.1:1\nmanagement_address=http://127.0.0.1:2\ncertificate_file=c"
    assert "TLS is of all listeners here" in reason(text, "management_address")[1]
    assert reason(text, "certificate_file")[0] is Fate.BY_HAND
    assert "keystore" not in settings_of(text)


def test_one_address_for_both_is_a_container_of_sagemakers() -> None:
    """As the configurations in both wheels have it; Multi Model Server's management is then on that port here too."""
    variables = {"SAGEMAKER_BIND_TO_PORT": "8081", "SAGEMAKER_RESPONSE_TIMEOUT": "60"}
    for package, server in (("mms", ServerName.MMS), ("ts", ServerName.TORCHSERVE)):
        spec = PathFinder.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        file = Path(spec.submodule_search_locations[0], "configs", "sagemaker_config.properties")
        found = settings_of(file.read_text(), variables=variables, server=server)
        assert (found["inference_host"], found["inference_port"], found["management_port"]) == ("0.0.0.0", 8081, 0)
        assert (found.get("container"), found["code_timeout_s"]) == (
            "multi-model" if server is ServerName.MMS else None,
            60,
        )


def test_grpc_is_where_it_was() -> None:
    """Its ports and its address; without keys it is off, and said to be."""
    found = settings_of("grpc_inference_port=7070\ngrpc_management_port=7071\ngrpc_inference_address=0.0.0.0")
    assert (found["grpc_port"], found["grpc_management_port"], found["grpc_host"]) == (7070, 7071, "0.0.0.0")
    assert "grpc_port = 7070" in render_toml(move(""), "t")
    assert "more than 65535" in reason("grpc_inference_port=70000", "grpc_inference_port")[1]


def test_multi_model_servers_settings() -> None:
    """Its protocol, and how many workers a model gets that is registered without a number."""
    assert settings_of("install_py_dep_per_model=true")["code_requirements"] == "install"
    found = settings_of("preload_model=true\ndefault_workers_per_model=2")
    assert (found["model_server_api"], found["default_workers_per_model"]) == ("mms", 2)
    assert "model_server_api" not in settings_of("metrics_mode=log\ndefault_workers_per_model=2")


def test_listeners_that_others_reach_stay_on_loopback_until_there_are_tokens() -> None:
    """The server would not start with them; the page says how it does."""
    text = "management_address=http://0.0.0.0:8086"
    assert settings_of(text)["management_port"] == 8086
    assert "management_host" not in settings_of(text)
    fate, why = reason(text, "management_address")
    assert (fate, "fleetcast token ops --scope manage" in why) == (Fate.BY_HAND, True)


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("inference_address=unix:/tmp/a.sock", "inference_address", "no Unix sockets"),
        ("inference_address=ftp://a", "inference_address", "it is no address such as"),
        ("inference_address=http://a:99999", "inference_address", "Port out of range"),
        ("job_queue_size=many", "job_queue_size", "no whole number"),
        ("max_request_size=0", "max_request_size", "less than 1"),
        ("number_of_gpu=2", "number_of_gpu", "CUDA_VISIBLE_DEVICES=0,1"),
        ("keystore=k.p12\ninference_address=https://127.0.0.1:1", "keystore", "openssl pkcs12 -in k.p12"),
        ("models={", "models", "is no JSON object"),
        ("models=" + '{"a":' * 100_000, "models", "is no JSON object"),
        (
            'models={"a": {"1": {"batchSize": 4, "maxBatchDelay": 9}}}',
            "models",
            "batchSize: 4, maxBatchDelay: 9 (for a",
        ),
        ("load_models=https://host/a.mar", "load_models", "download it into the store"),
        ("load_models=../a.mar", "load_models", "is no key of a store"),
        ("decode_input_request=false", "decode_input_request", "always decoded"),
        ("default_workers_per_model=x", "default_workers_per_model", "no whole number"),
        ("default_service_handler=a:b", "default_service_handler", "pack it with --handler"),
        ("disable_token_authorization=false", "disable_token_authorization", "key_file.json"),
        ("model_store=$$NOPE$$", "model_store", "the variable NOPE, which is not set"),
    ],
)
def test_what_is_left_to_do_is_said(text: str, key: str, expected: str) -> None:
    """A value that the old server refused, or that has no setting but needs something."""
    fate, why = reason(text, key)
    assert fate is Fate.BY_HAND
    assert expected in why


def test_envelopes_and_files_of_metrics_have_settings() -> None:
    """What handlers get and measure moves with them."""
    found = settings_of("service_envelope=kserve\nmetrics_config=/etc/metrics.yaml")
    assert (found["code_envelope"], found["code_metrics"]) == ("kserve", "/etc/metrics.yaml")


def test_models_at_the_start_are_registered_and_pinned() -> None:
    """As `models` says of them; so are all versions of a snapshot, which goes before, and none of `all`."""
    text = "load_models=a.mar, b=b.mar, c=other.mar\ndefault_workers_per_model=3"
    found = settings_of(text)
    assert found["pin"] == ["a.mar", "b.mar", "other.mar"]
    assert found["register_models"] == [
        "url=a.mar&initial_workers=3",
        "url=b.mar&initial_workers=3",
        "url=other.mar&model_name=c&initial_workers=3",
    ]
    assert reason(text, "default_workers_per_model")[1].endswith("in register_models")
    models = (
        '\nmodels={"c": {"1.0": {"marName": "other.mar", "batchSize": 4, "maxBatchDelay": 9, "minWorkers": 2}, '
        '"2.0": {"marName": "other.mar", "defaultVersion": true, "responseTimeout": 7}}}'
    )
    assert settings_of(text + models)["register_models"][2:] == [
        "url=other.mar&model_name=c&model_version=1.0&initial_workers=2&batch_size=4&max_batch_delay=9",
        "url=other.mar&model_name=c&model_version=2.0&initial_workers=3&response_timeout=7&default_version=true",
    ]
    assert reason(text + models, "models")[1].endswith("it is in register_models")
    assert reason("load_models=all", "load_models")[0] is Fate.HOLDS
    snapshot = settings_of(f"{SNAPSHOT}\nload_models=a.mar")
    assert snapshot["pin"] == ["noop.mar"]
    assert snapshot["register_models"] == [
        "url=noop.mar&model_version=1.0&initial_workers=1&response_timeout=200&default_version=true"
    ]


def test_the_longest_time_out_is_that_of_all() -> None:
    """The server's own, a model's, or the default of both old servers."""
    assert settings_of("default_response_timeout=30")["code_timeout_s"] == 30
    assert settings_of(f"default_response_timeout=30\n{SNAPSHOT}")["request_timeout_s"] == 200
    assert settings_of(SNAPSHOT)["code_timeout_s"] == 200
    assert settings_of("")["code_timeout_s"] == 120
    assert settings_of("default_response_timeout_seconds=9\npreload_model=true")["request_timeout_s"] == 9


def test_bodies_may_be_as_large_as_before() -> None:
    """Also without the key; where one body is larger than all that a front may hold, that grows with it."""
    assert settings_of("")["max_body_bytes"] == 6553500
    large = settings_of(f"max_request_size={2**30}")
    assert (large["max_body_bytes"], large["max_inflight_bytes"]) == (2**30, 2**31)


# --- variables ------------------------------------------------------------------------------------------------------


def test_variables_count_where_the_file_says_so() -> None:
    """As for the old server: one over a key, one in a value, one whose name does not follow from its key."""
    variables = {"TS_JOB_QUEUE_SIZE": "7", "TS_TOKEN_EXPIRATION_TIME_MIN": "5", "HERE": "models/$1"}
    text = "job_queue_size=5\nmodel_store=/srv/$$HERE$$\n"
    assert settings_of(text, variables=variables)["queue_per_model"] == 5
    found = settings_of(text + "enable_envvars_config=true", variables=variables)
    assert (found["queue_per_model"], found["store"]) == (7, "/srv/models/$1")
    toml = render_toml(move(text + "enable_envvars_config=true", variables=variables), "t")
    assert "token_expiration_min=5 (variable TS_TOKEN_EXPIRATION_TIME_MIN)" in toml
    mms = settings_of(
        "preload_model=true\nenable_envvars_config=true",
        variables={"MMS_JOB_QUEUE_SIZE": "9", "TS_JOB_QUEUE_SIZE": "1"},
    )
    assert mms["queue_per_model"] == 9


def test_allowed_urls_have_a_switch_of_their_own() -> None:
    """As in TorchServe."""
    text, variables = "enable_envvars_config=true\n", {"TS_ALLOWED_URLS": "u"}
    assert "allowed_urls" not in read(text, variables).entries
    assert read(f"{text}use_env_allowed_urls=true", variables).get("allowed_urls") == "u"


# --- output ---------------------------------------------------------------------------------------------------------


def test_no_value_breaks_out_of_its_comment_or_its_text() -> None:
    """Line ends, quotes, a terminal's commands, half of a surrogate pair; passwords are not shown."""
    text = 'model_store=a"\\\\\\n\\u001b]\\ud800\\u007f\nzzz=\\nhost = "0.0.0.0"\nkeystore_pass=hunter2\n'
    found = settings_of(text)
    assert found["store"] == 'a"\\\n\x1b]\ufffd\x7f'
    assert "host" not in found
    for shown in (render_toml(move(text), "t"), render_report(move(text))):
        assert "hunter2" not in shown
        assert "\x1b" not in shown


def test_the_command_line_says_the_same() -> None:
    """As `fleetcast serve` takes it, quoted for a shell."""
    command = render_command(move("model_store=/a b\nload_models=a.mar,b.mar\nnumber_of_gpu=0"))
    assert command.startswith("fleetcast serve --store '/a b' --register-models 'url=a.mar&initial_workers=1' ")
    assert " --pin a.mar --pin b.mar --device cpu --allow-code '*'" in command


def test_settings_are_the_servers_own() -> None:
    """Every setting that a rule can give exists."""
    full = settings_of(
        "inference_address=https://0.0.0.0:1\nmanagement_address=https://127.0.0.2:2\nmetrics_address=https://127.0.0.1:3\n"
        "certificate_file=c\nprivate_key_file=k\nmodel_store=m\nload_models=a.mar\njob_queue_size=5\nnumber_of_gpu=0\n"
        f"max_request_size={2**30}\ndefault_response_timeout=5"
    )
    assert set(full) <= set(Settings.model_fields)
    assert settings_from({"store": full["store"]}).store == "m"
    assert Settings(**full).management_host == "127.0.0.2"
