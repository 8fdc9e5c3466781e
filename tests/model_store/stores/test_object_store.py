"""Object stores: the S3 half against a real server behind the counting proxy, the folder half on a real folder."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from model_store.errors import ArchiveInvalid, ArchiveTooLarge, LoadError, ModelNotFound, StoreDenied, StoreUnavailable
from model_store.names import InvalidModelName, ModelName, parse_model_name
from model_store.stores import cloud_store
from model_store.stores import object_store as sources
from model_store.stores.backend import Where
from model_store.stores.folder_store import HIDDEN
from model_store.stores.object_store import InvalidStoreUrl, open_source
from tests.patience import PATIENCE_S
from tests.s3 import Fault, S3Server

NSW1 = parse_model_name("au/NSW1.mar")
ODD = 'au/a b+c%20é#d?e*~|"{}[]^`&=;@!$,.mar'
only_moto = pytest.mark.skipif(
    os.environ.get("FLEETCAST_TEST_S3", "moto") != "moto", reason="a thousand keys take too long on Swift"
)


def test_a_small_archive_is_one_get(s3: S3Server, bucket: str) -> None:
    """The cold path costs one store request, and the version is the ETag without quotes."""
    version = s3.put(bucket, "fleet/v1/au/NSW1.mar", b"x" * 100_000)
    fetched = open_source(f"s3://{bucket}/fleet/v1/").get(NSW1)
    assert fetched == sources.Fetched(b"x" * 100_000, version)
    assert s3.seen("GET", bucket) == [206]
    assert s3.seen("HEAD", bucket) == []


def test_an_unchanged_archive_is_not_sent_again(s3: S3Server, bucket: str) -> None:
    """`unless` is a conditional GET: 304 and None while the version holds, the new bytes when it does not."""
    source = open_source(f"s3://{bucket}")
    version = source.put(NSW1, b"first")
    assert source.get(NSW1, unless=version) is None
    assert s3.seen("GET", bucket) == [304]
    newer = source.put(NSW1, b"second")
    assert source.get(NSW1, unless=version) == sources.Fetched(b"second", newer)


def test_a_name_is_the_key_whatever_its_characters(s3: S3Server, bucket: str) -> None:
    """Names with spaces, percent signs and query characters reach the store as the same key, both ways."""
    s3.put(bucket, f"p/{ODD}", b"odd")
    source = open_source(f"s3://{bucket}/p")
    fetched = source.get(parse_model_name(ODD))
    assert fetched is not None
    assert fetched.data == b"odd"
    assert [listed.name for listed in source.list()] == [ODD]


def test_a_missing_key_is_not_found_at_once(s3: S3Server, bucket: str) -> None:
    """404 is final: one request, no retry, and the message names the key and the store."""
    with pytest.raises(ModelNotFound, match=rf"au/NSW1\.mar is not in s3://{bucket} at http"):
        open_source(f"s3://{bucket}").get(NSW1)
    assert s3.seen("GET", bucket) == [404]


def test_a_missing_bucket_is_no_missing_model(bucket: str) -> None:
    """A wrong bucket is a fault of the store's set-up: reported as such, so that disk copies are not forgotten."""
    source = open_source(f"s3://{bucket}-gone")
    with pytest.raises(StoreUnavailable, match=r"does not exist.*NoSuchBucket"):
        source.get(NSW1)
    with pytest.raises(StoreUnavailable, match=r"does not exist.*NoSuchBucket"):
        list(source.list())


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_tells_both_reasons(s3: S3Server, bucket: str, status: int) -> None:
    """401 and 403 are final, and the message says that S3 hides missing keys behind 403."""
    s3.inject(Fault(match=bucket, status=status))
    with pytest.raises(StoreDenied, match=f"{status} .*credentials are wrong.* or the key does not exist"):
        open_source(f"s3://{bucket}").get(NSW1)
    assert s3.seen("GET", bucket) == [status]
    s3.inject(Fault(match=bucket, status=status))
    with pytest.raises(StoreDenied):
        list(open_source(f"s3://{bucket}").list())


@pytest.mark.skipif(os.environ.get("FLEETCAST_TEST_S3") != "swift", reason="moto accepts any key")
def test_a_bad_key_is_denied(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that checks signatures refuses a wrong secret, and the secret is not in the message."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "no-such-secret")
    with pytest.raises(StoreDenied, match="SignatureDoesNotMatch") as caught:
        open_source(f"s3://{bucket}").get(NSW1)
    assert "no-such-secret" not in str(caught.value)


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(status=429), Fault(cut_after=-1), Fault(cut_after=5_000)])
def test_a_passing_failure_is_retried(s3: S3Server, bucket: str, fault: Fault) -> None:
    """503, 429, a connection cut before the answer and one cut in the body: a second request, and whole bytes."""
    data = os.urandom(50_000)
    s3.put(bucket, NSW1, data)
    s3.inject(Fault(match=bucket, status=fault.status, cut_after=fault.cut_after))
    fetched = open_source(f"s3://{bucket}").get(NSW1)
    assert fetched is not None
    assert fetched.data == data
    assert len(s3.seen("GET", bucket)) == 2


@pytest.mark.parametrize(
    ("fault", "cause"),
    [(Fault(status=503), "503 Service Unavailable after 2 retries"), (Fault(cut_after=5_000), "connection was cut")],
)
def test_a_lasting_failure_is_unavailable(s3: S3Server, bucket: str, fault: Fault, cause: str) -> None:
    """When the retries are used up the message names the endpoint and the cause."""
    s3.put(bucket, NSW1, bytes(50_000))
    s3.inject(Fault(match=bucket, times=9, status=fault.status, cut_after=fault.cut_after))
    with pytest.raises(StoreUnavailable, match=f"at {s3.endpoint_url} failed for 'au/NSW1.mar': .*{cause}"):
        open_source(f"s3://{bucket}", retries=2).get(NSW1)
    assert len(s3.seen("GET", bucket)) == 3


def test_a_dead_endpoint_is_unavailable(bucket: str) -> None:
    """A refused connection fails when its retries are used up, as itself: not when the time-out is over."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        source = open_source(f"s3://{bucket}", endpoint_url=url, timeout_s=10 * PATIENCE_S)
        with pytest.raises(StoreUnavailable, match="Connection refused after 3 retries"):
            source.get(NSW1)


def test_a_silent_endpoint_is_unavailable(bucket: str) -> None:
    """A host that accepts and never answers is given up after one time-out: it is not asked again."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = open_source(
            f"s3://{bucket}", endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.4
        )
        with pytest.raises(StoreUnavailable, match="timed out"):
            source.get(NSW1)
        assert len(_list_connections(silent)) == 1


def _list_connections(server: socket.socket) -> list[tuple[str, int]]:
    """The addresses of those who have connected and were not accepted yet."""
    server.setblocking(False)
    found = []
    with suppress(BlockingIOError):
        while True:
            connection, address = server.accept()
            connection.close()
            found.append(address)
    return found


def test_a_large_archive_comes_in_ranges(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the one-request size the rest comes in further ranges, whole and in order."""
    monkeypatch.setattr(cloud_store, "ONE_REQUEST_BYTES", 1 << 16)
    data = os.urandom((1 << 18) + 17)
    version = s3.put(bucket, NSW1, data)
    assert open_source(f"s3://{bucket}").get(NSW1) == sources.Fetched(data, version)
    assert s3.seen("GET", bucket) == [206] * 5


def test_a_large_archive_is_never_mixed(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive replaced between two ranges is read again from its beginning: If-Match ties the ranges."""
    monkeypatch.setattr(cloud_store, "ONE_REQUEST_BYTES", 1 << 16)
    source = open_source(f"s3://{bucket}")
    source.put(NSW1, b"a" * 100_000)
    ranges = cloud_store.CloudStore._read_ranges

    def replace_between(self: cloud_store.CloudStore, name: ModelName, *rest: object) -> object:
        monkeypatch.setattr(cloud_store.CloudStore, "_read_ranges", ranges)
        source.put(name, b"b" * 100_000)
        return ranges(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cloud_store.CloudStore, "_read_ranges", replace_between)
    fetched = source.get(NSW1)
    assert fetched is not None
    assert fetched.data == b"b" * 100_000
    assert 412 in s3.seen("GET", bucket)


def test_too_large_is_refused_by_the_first_reply(s3: S3Server, bucket: str) -> None:
    """The limit is checked against the size in the first reply, and an empty object is refused too."""
    s3.put(bucket, NSW1, bytes(2_000))
    s3.put(bucket, "empty.mar", b"")
    source = open_source(f"s3://{bucket}", max_archive_bytes=1_999)
    with pytest.raises(ArchiveTooLarge, match="2000 bytes, more than the limit of 1999"):
        source.get(NSW1)
    with pytest.raises(ArchiveInvalid, match=r"empty\.mar .* is empty"):
        source.get(parse_model_name("empty.mar"))
    assert s3.seen("GET", bucket) == [206, 416]


def test_listing_is_relative_filtered_and_by_text_prefix(s3: S3Server, bucket: str) -> None:
    """Names are relative to the store's prefix; keys that are no model names and other prefixes are left out."""
    for key in ("p/au/NSW1.mar", "p/au/NSW10.mar", "p/au/QLD1.mar", "p/austria.mar", "pp/x.mar", "x.mar"):
        s3.put(bucket, key, b"12345")
    s3.put(bucket, "p/au/back\\slash.mar", b"")
    source = open_source(f"s3://{bucket}/p")
    names = ["au/NSW1.mar", "au/NSW10.mar", "au/QLD1.mar", "austria.mar"]
    assert sorted(listed.name for listed in source.list()) == names
    assert sorted(listed.name for listed in source.list("au")) == names
    assert sorted(listed.name for listed in source.list("au/NSW1")) == names[:2]
    assert {listed.bytes for listed in source.list("au/")} == {5}
    assert all(len(listed.version) == 32 for listed in source.list())
    with pytest.raises(InvalidModelName):
        list(source.list("../p/"))


@only_moto
def test_listing_pages_lazily(s3: S3Server, bucket: str) -> None:
    """More than a page of keys comes whole, and the second page is asked for only when it is reached."""
    source = open_source(f"s3://{bucket}")
    for i in range(1_003):
        source.put(parse_model_name(f"m/{i:04}.mar"), b"x")
    stream = source.list()
    assert next(stream).name == "m/0000.mar"
    assert len(s3.seen("GET", f"/{bucket}?")) == 1
    assert sum(1 for _ in stream) == 1_002
    assert len(s3.seen("GET", f"/{bucket}?")) == 2


def test_profile_region_and_endpoint_come_from_boto3s_chain(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A named profile's credentials, region and endpoint are enough, without any variable."""
    s3.put(bucket, NSW1, b"x")
    config = tmp_path / "config"
    access, secret = s3.env["AWS_ACCESS_KEY_ID"], s3.env["AWS_SECRET_ACCESS_KEY"]
    config.write_text(
        f"[profile fleet]\nregion = us-east-1\nendpoint_url = {s3.endpoint_url}\n"
        f"aws_access_key_id = {access}\naws_secret_access_key = {secret}\n"
    )
    for name in s3.env:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    source = open_source(f"s3://{bucket}", profile="fleet")
    assert source.get(NSW1) is not None
    assert repr(source) == f"Source(s3://{bucket} at {s3.endpoint_url})"
    with pytest.raises(StoreDenied, match="boto3's chain found none"):
        open_source(f"s3://{bucket}")
    with pytest.raises(InvalidStoreUrl, match="credentials in its URL"):
        open_source(f"s3://{bucket}", profile="fleet", endpoint_url="http://user:word@127.0.0.1:9000")
    with pytest.raises(InvalidStoreUrl, match="nobody"):
        open_source(f"s3://{bucket}", profile="nobody")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x", "accepted are s3://"),
        ("s3://", "accepted are s3://"),
        ("s3://key:secret@bucket/x", "no credentials"),
        ("s3://bucket/x?versionId=3", "no credentials, query"),
        ("az://container/x", "Account must be specified"),
        ("file://elsewhere/x", "accepted are s3://"),
        ("", "does not exist"),
        ("/no/such/folder", "'/no/such/folder' does not exist"),
    ],
)
def test_a_bad_url_says_what_is_accepted(url: str, words: str) -> None:
    """A URL that names no store is refused when it is opened, and a secret in it is not repeated."""
    with pytest.raises(InvalidStoreUrl, match=words) as caught:
        open_source(url)
    assert "secret" not in str(caught.value)


def test_other_clouds_open() -> None:
    """gs:// and az:// come with obstore; nothing is asked before the first call."""
    assert "gs://bucket/p" in repr(open_source("gs://bucket/p"))
    assert "core.windows.net" in repr(open_source("abfss://fleet@account.dfs.core.windows.net/p"))
    with pytest.raises(InvalidStoreUrl, match="belong to s3"):
        open_source("gs://bucket/p", profile="x")


def test_what_a_dead_writer_left_is_not_listed(tmp_path: Path) -> None:
    """A file that a killed `put` has staged is no archive, and hides none."""
    source = open_source(str(tmp_path))
    source.put(ModelName("a.mar"), b"whole")
    (tmp_path / f"{HIDDEN}0123456789abcdef").write_bytes(b"ha")
    assert [listed.name for listed in source.list()] == ["a.mar"]


def test_a_folder_is_a_store_too(tmp_path: Path) -> None:
    """Put, get, conditional get, list and the size limit work on a local folder, by path and by file:// URL."""
    source = open_source(str(tmp_path))
    version = source.put(parse_model_name(ODD), b"odd")
    assert (tmp_path / ODD).read_bytes() == b"odd"
    assert open_source(tmp_path.as_uri()).get(parse_model_name(ODD)) == sources.Fetched(b"odd", version)
    assert source.get(parse_model_name(ODD), unless=version) is None
    assert list(source.list("au/a")) == [sources.Listed(parse_model_name(ODD), 3, version)]
    with pytest.raises(ArchiveTooLarge):
        open_source(str(tmp_path), max_archive_bytes=2).get(parse_model_name(ODD))


def test_a_large_file_comes_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges and If-Match hold for a folder as for a bucket."""
    monkeypatch.setattr(cloud_store, "ONE_REQUEST_BYTES", 1 << 16)
    (tmp_path / "big.mar").write_bytes(data := os.urandom(300_000))
    fetched = open_source(str(tmp_path)).get(parse_model_name("big.mar"))
    assert fetched is not None
    assert fetched.data == data


@pytest.mark.parametrize(
    ("name", "situation"),
    [
        ("evil.mar", StoreDenied),
        ("out/secret.mar", StoreDenied),
        ("loop.mar", ModelNotFound),
        ("dangling.mar", ModelNotFound),
        ("folder", ModelNotFound),
        ("pipe.mar", ModelNotFound),
        ("in.mar/below", ModelNotFound),
        ("x" * 300, ModelNotFound),
        ("empty.mar", ArchiveInvalid),
    ],
)
def test_a_folder_is_not_left_by_links(tmp_path: Path, name: str, situation: type[LoadError]) -> None:
    """Links out of the folder are refused; loops, pipes, folders and names too long are missing models."""
    (tmp_path / "secret.mar").write_bytes(b"secret")
    root = tmp_path / "models"
    (root / "folder").mkdir(parents=True)
    (root / "in.mar").write_bytes(b"in")
    (root / "empty.mar").touch()
    (root / "linked.mar").symlink_to("in.mar")
    (root / "evil.mar").symlink_to("../secret.mar")
    (root / "out").symlink_to("..")
    (root / "loop.mar").symlink_to("loop.mar")
    (root / "dangling.mar").symlink_to("nowhere")
    os.mkfifo(root / "pipe.mar")
    Path(os.fsdecode(bytes(root) + b"/no-utf8-\xff.mar")).touch()
    source = open_source(str(root))
    with pytest.raises(situation):
        source.get(parse_model_name(name))
    linked = source.get(parse_model_name("linked.mar"))
    assert linked is not None
    assert linked.data == b"in"
    assert [listed.name for listed in source.list()] == ["empty.mar", "in.mar", "linked.mar"]
    with pytest.raises(StoreDenied):
        source.put(parse_model_name("out/new.mar"), b"x")
    assert not (tmp_path / "new.mar").exists()


@pytest.mark.parametrize("cause", ["timed out after 3 retries", "No such file or directory"])
def test_clients_are_told_the_cause_and_not_the_place(cause: str) -> None:
    """The public message has the kind of store; a cause with a slash may be a path and is not in it."""
    where = Where("/very/private", "the store's folder")
    error = where.explain(StoreUnavailable, "{where} failed for {name!r}: {cause}", "au/{x}.mar", cause)
    assert str(error) == f"/very/private failed for 'au/{{x}}.mar': {cause}"
    assert error.public == f"the store's folder failed for 'au/{{x}}.mar': {cause}"
    hidden = where.explain(StoreUnavailable, "{where}: {cause}", "m.mar", "cannot open /very/private/m.mar")
    assert hidden.public == "the store's folder: the server's log says why"


def test_versions_are_the_same_however_they_are_asked_for(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    """A GET, a listing and a request for the version alone agree, before and after a change; what is absent says so."""
    for source in (open_source(f"s3://{bucket}/p"), open_source(str(tmp_path))):
        seen = set()
        for data in (b"first", b"second, which is longer"):
            source.put(NSW1, data)
            fetched = source.get(NSW1)
            assert fetched is not None
            versions = {fetched.version, source.read_version(NSW1), *(each.version for each in source.list())}
            assert versions == {fetched.version}
            seen |= versions
        assert len(seen) == 2
        with pytest.raises(ModelNotFound):
            source.read_version(parse_model_name("au/absent.mar"))
    assert s3.seen("HEAD", bucket) == [200, 200, 404]
