"""Every reader of an archive's bytes takes what is at its bound of steps, and refuses one more."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
import safetensors.numpy

from model_store.archives.archive import Limits, open_archive, read_tensors
from model_store.archives.manifest import (
    FLEETCAST_JSON,
    MAX_FIELDS,
    MAX_GOLDEN_DEPTH,
    MAX_LEVELS,
    MAX_PRODUCTS,
    MAX_ROWS,
    MAX_VALUES,
    parse_golden,
    parse_spec,
)
from model_store.archives.safetensors_reader import MAX_TENSORS
from model_store.archives.step_budget import StepBudget
from model_store.archives.tar_reader import MAX_PADDING_BYTES, MAX_PAX_RECORDS, MAX_REMARK_BYTES, read_tar_gz
from model_store.archives.zip_reader import read_zip
from model_store.errors import ArchiveInvalid, ArchiveTooLarge
from tests.archives import make_forecaster, make_zip, repack

ENTRIES = 100
FEW = Limits(max_entries=ENTRIES, max_ratio=10_000)
WIDE = Limits(max_ratio=10_000)


def test_the_budget_ends_before_the_step_too_many() -> None:
    """At the limit nothing is raised; beyond it the message has the number and what is counted."""
    budget = StepBudget(3, "records")
    budget.spend(2)
    budget.spend()
    with pytest.raises(ArchiveTooLarge, match="more than the 3 records allowed"):
        budget.spend()


# --- containers -----------------------------------------------------------------------------------------------------


def tar_of(*entries: tuple[bytes, str, bytes], padding: int = 0) -> bytes:
    """A gzipped tar of (type, name, content), headers as given."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for kind, name, content in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            archive.addfile(info, io.BytesIO(content))
    end = out.getvalue().rstrip(b"\0")
    return gzip.compress(end + bytes(-len(end) % 512 + 1024 + padding), 1)


FILE = (tarfile.REGTYPE, "a", b"1")
RECORD = b"6 a=b\n"


def test_pax_records() -> None:
    """They are counted over all headers of a tar."""
    half = (tarfile.XHDTYPE, "x", RECORD * (MAX_PAX_RECORDS // 2))
    assert list(read_tar_gz(tar_of(half, half, FILE), WIDE).members) == ["a"]
    with pytest.raises(ArchiveTooLarge, match="pax records"):
        read_tar_gz(tar_of(half, half, (tarfile.XHDTYPE, "x", RECORD), FILE), WIDE)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_bytes_of_a_remark(kind: bytes) -> None:
    """A long name or pax header is bounded by itself, not only by the tar."""
    length = f"{MAX_REMARK_BYTES} a=".encode()
    content = length + b"b" * (MAX_REMARK_BYTES - len(length) - 1) + b"\n"
    if kind == tarfile.GNUTYPE_LONGNAME:
        content = b"name".ljust(MAX_REMARK_BYTES, b"\0")
    assert len(read_tar_gz(tar_of((kind, "x", content), FILE), WIDE).members) == 1
    with pytest.raises(ArchiveTooLarge, match="names or remarks"):
        read_tar_gz(tar_of((kind, "x", content + b"\0"), FILE), WIDE)


def test_padding_of_a_tar() -> None:
    """Zeros behind the end mark are looked through, so that they are bounded too."""
    assert len(read_tar_gz(tar_of(FILE, padding=MAX_PADDING_BYTES - 1024), WIDE).members) == 1
    with pytest.raises(ArchiveTooLarge, match="padding"):
        read_tar_gz(tar_of(FILE, padding=MAX_PADDING_BYTES - 1024 + 512), WIDE)


def test_entries_of_a_tar() -> None:
    """Headers of any type count, folders and long names too."""
    folders = [(tarfile.DIRTYPE, f"f{i}", b"") for i in range(ENTRIES - 1)]
    assert len(read_tar_gz(tar_of(FILE, *folders), FEW).members) == 1
    with pytest.raises(ArchiveTooLarge, match="entries"):
        read_tar_gz(tar_of(FILE, *folders, (tarfile.DIRTYPE, "g", b"")), FEW)


def test_entries_of_a_zip() -> None:
    """As its directory says, before one is read."""
    members = {f"m{i}": b"" for i in range(ENTRIES)}
    assert len(read_zip(make_zip(members), FEW).members) == ENTRIES
    with pytest.raises(ArchiveTooLarge, match="entries"):
        read_zip(make_zip({**members, "more": b""}), FEW)


# --- records --------------------------------------------------------------------------------------------------------


def forecast_with(**fields: object) -> bytes:
    """A `fleetcast.json` whose forecast has these fields."""
    forecast = {
        "frequency": "1h",
        "context_length": 2,
        "prediction_length": 1,
        "quantile_levels": [0.5],
        "inputs": [{"source": "target"}],
    }
    weights = {"file": "w"}
    spec = {"kind": "forecaster", "architecture": "a", "weights": weights, "forecast": {**forecast, **fields}}
    return json.dumps(spec).encode()


LISTS: dict[str, tuple[int, object]] = {
    "inputs": (MAX_ROWS, {"source": "target"}),
    "dynamic_feat": (MAX_ROWS, "a"),
    "cat": (MAX_ROWS, "a"),
}


@pytest.mark.parametrize("field", LISTS)
def test_lists_of_a_manifest(field: str) -> None:
    """Each list has a length of its own at most, whatever the record's bytes."""
    most, item = LISTS[field]
    parse_spec(forecast_with(**{field: [item] * most}))
    with pytest.raises(ArchiveInvalid, match=f"length <= {most}.*{field}"):
        parse_spec(forecast_with(**{field: [item] * (most + 1)}))


def test_levels_products_and_configuration_of_a_manifest() -> None:
    """Those whose items must differ."""
    levels = [(i + 1) / (MAX_LEVELS + 3) for i in range(MAX_LEVELS + 1)]
    names = [str(i) for i in range(MAX_PRODUCTS + 1)]
    parse_spec(forecast_with(quantile_levels=levels[:-1], products=names[:-1]))
    for field, values in {"quantile_levels": levels, "products": names}.items():
        with pytest.raises(ArchiveInvalid, match=f"length <= .*{field}"):
            parse_spec(forecast_with(**{field: values}))
    for count in (MAX_FIELDS, MAX_FIELDS + 1):
        config = {str(i): [1] * MAX_ROWS if i == 0 else i for i in range(count)}
        raw = json.dumps({"kind": "forecaster", "architecture": "a", "weights": {"file": "w"}, "config": config})
        if count == MAX_FIELDS:
            parse_spec(raw.encode())
        else:
            with pytest.raises(ArchiveInvalid, match=r"length <= 1000.*config"):
                parse_spec(raw.encode())


def make_golden(request: object) -> bytes:
    """A golden sample of this request."""
    return json.dumps({"request": {"x": request}, "response": {}}).encode()


def nest_list(depth: int) -> object:
    """A list in a list, so often."""
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def test_values_of_a_golden_sample() -> None:
    """Numbers and containers of both bodies count."""
    around = 4  # the record, the request, the list, and the comma before the response
    parse_golden(make_golden([0] * (MAX_VALUES - around)), "golden.json")
    with pytest.raises(ArchiveTooLarge, match=r"golden\.json: .* values allowed"):
        parse_golden(make_golden([0] * (MAX_VALUES - around + 1)), "golden.json")


def test_depth_of_a_golden_sample() -> None:
    """Deeper JSON than any reader of ours takes is the archive's fault."""
    outside = 2  # both bodies, and the request
    parse_golden(make_golden(nest_list(MAX_GOLDEN_DEPTH - outside)), "golden.json")
    for depth in (MAX_GOLDEN_DEPTH - outside + 1, 500, 100_000):
        text = b'{"request": {"x": %b1%b}, "response": {}}' % (b"[" * depth, b"]" * depth)
        with pytest.raises(ArchiveInvalid, match=r"golden\.json"):
            parse_golden(text, "golden.json")


@pytest.mark.parametrize("number", [2**64 - 1, -(2**63)])
def test_integers_of_a_golden_sample(number: int) -> None:
    """64 bits, as in every reader of requests."""
    assert parse_golden(make_golden([number]), "golden.json").request == {"x": [number]}
    beyond = number + (1 if number > 0 else -1)
    for value in (beyond, beyond * 10**30):
        with pytest.raises(ArchiveInvalid, match=r"golden\.json: an integer has \d+ bits"):
            parse_golden(make_golden({"deep": [value]}), "golden.json")


# --- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [MAX_TENSORS, MAX_TENSORS + 1])
def test_tensors_of_a_file(count: int) -> None:
    """They are counted before one is made."""
    spec = json.loads(make_spec())
    del spec["weights"]["sha256"]
    one = np.zeros(1, np.float32)
    weights = safetensors.numpy.save({f"t{i}": one for i in range(count)})
    archive = open_archive(
        repack(make_forecaster(), weights_safetensors=weights, fleetcast_json=json.dumps(spec).encode()), "m", WIDE
    )
    if count == MAX_TENSORS:
        assert len(read_tensors(archive)) == count
    else:
        with pytest.raises(ArchiveTooLarge, match="10000 tensors allowed"):
            read_tensors(archive)


def make_spec() -> bytes:
    """The `fleetcast.json` of the sound archive."""
    return open_archive(make_forecaster(), "m").read(FLEETCAST_JSON)
