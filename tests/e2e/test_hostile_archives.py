"""Broken, wrong and hostile archives: each fails with its own message and does not affect other models."""

import io
import json
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from botocore.exceptions import ClientError

from handlers.forecasters import build_family, random_tensors
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import GoldenSample, Kind
from tests.archives import make_raw_tar_gz, make_zip, repack
from tests.e2e.models import SMALL_TCN, Question, pack_fleet, pack_forecaster
from tests.e2e.server import Server, is_answered, run_server, upload
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

SOUND = pack_forecaster("sound", 1)
TENSORS = random_tensors(build_family("tcn", SMALL_TCN), 1)
BACK_OFF_S = 1.0


def corrupt() -> bytes:
    """One bit of the weights is turned."""
    at = SOUND.data.index(TENSORS["head.weight"].tobytes()) + 5
    return SOUND.data[:at] + bytes([SOUND.data[at] ^ 1]) + SOUND.data[at + 1 :]


def make_traversal() -> bytes:
    """A member that would be written outside."""
    return make_zip({"fleetcast.json": b"{}", "../../etc/cron.d/evil": b"* * * * * root true"})


def make_link() -> bytes:
    """A symbolic link to the host's secrets, in a zip."""
    info = zipfile.ZipInfo("weights.safetensors")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return make_zip([(info, b"/etc/shadow")])


def tar_link() -> bytes:
    """The same in a tar."""
    info = tarfile.TarInfo("weights.safetensors")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/shadow"
    return make_raw_tar_gz([(info, b"")])


def make_bomb() -> bytes:
    """20 MB of zeros in 20 KB."""
    return make_zip({"fleetcast.json": b"{}", "weights.safetensors": bytes(20 << 20)}, deflate=True)


def wrong_shapes() -> bytes:
    """Sound weights of another width than the config says."""
    return pack_model(
        Kind.FORECASTER,
        ArchiveParts(tensors=TENSORS, architecture="tcn", config={**SMALL_TCN, "channels": 8}),
        model_name="shapes",
    )


def with_nan() -> bytes:
    """A weight that is not a number, hash and all in order."""
    weights = TENSORS["head.weight"].copy()
    weights[0, 0] = np.nan
    numbers = safetensors.numpy.save({**TENSORS, "head.weight": weights})
    return repack(SOUND.data, weights_safetensors=numbers, fleetcast_json=change_spec(weights=without_hash()))


def wrong_hash() -> bytes:
    """Weights that are not those that were packed."""
    return repack(
        SOUND.data, weights_safetensors=safetensors.numpy.save(random_tensors(build_family("tcn", SMALL_TCN), 2))
    )


def unknown_kind() -> bytes:
    """A kind of the future."""
    return repack(SOUND.data, fleetcast_json=change_spec(kind="quantum"))


def unknown_architecture() -> bytes:
    """A network that this server does not have."""
    return repack(SOUND.data, fleetcast_json=change_spec(architecture="transformer"))


def make_code() -> bytes:
    """A TorchServe archive with a Python handler."""
    manifest = {"runtime": "python", "model": {"modelName": "old", "handler": "service.py", "serializedFile": "m.pt"}}
    return make_zip({"MAR-INF/MANIFEST.json": json.dumps(manifest).encode(), "service.py": b"import os", "m.pt": b""})


def bad_golden() -> bytes:
    """A golden sample that these weights do not reproduce."""
    x = np.zeros(SOUND.shape, np.float32)
    right = SOUND.run(x)
    golden = GoldenSample(request={"x": x.tolist()}, response={"predictions": (right + 0.5).tolist()})
    return pack_model(
        Kind.FORECASTER,
        ArchiveParts(tensors=TENSORS, architecture="tcn", config=SMALL_TCN),
        model_name="golden",
        golden=golden,
    )


def change_spec(**fields: object) -> bytes:
    """The sound archive's `fleetcast.json` with some fields changed."""
    with zipfile.ZipFile(io.BytesIO(SOUND.data)) as archive:
        return json.dumps({**json.loads(archive.read("fleetcast.json")), **fields}).encode()


def without_hash() -> dict[str, str]:
    """`weights` of a `fleetcast.json` that states no sha256."""
    return {"file": "weights.safetensors"}


#: What is broken -> words of the message that must say so.
HOSTILE: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "corrupt": (corrupt, ("weights.safetensors", "CRC-32")),
    "truncated": (lambda: SOUND.data[: len(SOUND.data) // 2], ("zip", "end")),
    "empty": (lambda: b"", ("empty",)),
    "rubbish": (lambda: b"<html>404</html>", ("neither a zip", "gzip")),
    "traversal": (make_traversal, ("../../etc/cron.d/evil",)),
    "link": (make_link, ("symbolic link",)),
    "tar-link": (tar_link, ("link",)),
    "bomb": (make_bomb, ("100 times", "bomb")),
    "wrong-shapes": (wrong_shapes, ("wrong shape", "blocks.0.conv.weight", "[16, 3, 3] instead of [8, 3, 3]")),
    "nan": (with_nan, ("head.weight", "NaN")),
    "wrong-hash": (wrong_hash, ("sha256", "pack it again")),
    "unknown-kind": (unknown_kind, ("quantum", "kind")),
    "unknown-architecture": (unknown_architecture, ("transformer", "known are")),
    "code": (make_code, ("service.py", "--allow-code")),
    "bad-golden": (bad_golden, ("golden sample",)),
}


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose cache is full of sound models, and a bucket that also has every hostile archive."""
    bucket = s3.bucket()
    sound = pack_fleet("sound", 11)
    upload(s3, bucket, sound)
    for kind, (make, _) in HOSTILE.items():
        s3.put(bucket, f"hostile/{kind}.mar", make())
    folder: Path = tmp_path_factory.mktemp("hostile")
    with run_server(s3, folder, f"s3://{bucket}", model_cache_bytes=65536, slab_bytes=65536) as server:
        for model in sound:
            server.ask(model.question(0))
        assert server.resident() == {model.name for model in sound}
        yield server


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_says_what_is_wrong_and_evicts_nobody(s3: S3Server, house: Server, kind: str) -> None:
    """424 ModelError whose message names the archive and the fault; the full cache stays as it was; asked again within
    the back-off, the same error comes without another GET.
    """
    name = f"hostile/{kind}.mar"
    before, evictions = house.resident(), house.total("fleetcast_model_evictions_total")
    started = time.monotonic()
    messages = {read_refusal(house, name) for _ in range(3)}
    fetched = len(s3.seen("GET", name))
    assert time.monotonic() - started > BACK_OFF_S or fetched == 1
    (message,) = messages
    for words in (name, *HOSTILE[kind][1]):
        assert words in message
    assert (house.resident(), house.total("fleetcast_model_evictions_total")) == (before, evictions)
    row = house.models()[name]["holders"][0]
    assert (row["state"], row["error"]) == ("failed", message)


def read_refusal(server: Server, name: str) -> str:
    """The message of the ModelError that this model is answered with."""
    question = Question(name, b'{"x": []}', np.zeros(0, np.float32))
    with pytest.raises(ClientError) as caught:
        server.ask(question)
    response = caught.value.response
    assert type(caught.value).__name__ == "ModelError"
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert response["OriginalStatusCode"] == 500
    message: str = response["OriginalMessage"]
    return message


def test_a_mended_archive_is_served_after_the_back_off_or_at_an_operators_word(
    s3: S3Server, tmp_path: Path, store: str
) -> None:
    """Broken first, then replaced by a sound one: /fleet/load does not wait for the back-off, and clients are answered
    once it is over.
    """
    by_client, by_operator = pack_fleet("mended", 2)
    for model in (by_client, by_operator):
        s3.put(store, model.name, model.data[:100])
    with run_server(s3, tmp_path, f"s3://{store}") as server:
        for model in (by_client, by_operator):
            read_refusal(server, model.name)
        upload(s3, store, [by_client, by_operator])
        assert server.fleet("load", by_operator.name).status_code == 200
        assert server.ask(by_operator.question(0)).cache == "hit"
        wait_until(lambda: is_answered(server, by_client), "the mended archive is served")
