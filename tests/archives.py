"""Builders of archives for tests: valid ones like those of users, and hostile ones built byte by byte."""

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from handlers.forecasters import build_family, random_tensors
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import ForecastSpec, GoldenSample, InputChannel, Kind, Scaler, Setting

CONFIG: dict[str, Setting] = {"channels": 4, "dilations": [1, 2]}
FORECAST = ForecastSpec(
    frequency="1h",
    context_length=24,
    prediction_length=6,
    quantile_levels=(0.1, 0.5, 0.9),
    inputs=(InputChannel(source="target"), InputChannel(source="calendar", feature="hour_sin", shift=6)),
    unit="AUD/MWh",
    scaler=Scaler(kind="asinh", center=50.0, scale=20.0),
)
GOLDEN = GoldenSample(
    request={"instances": [{"start": "2024-01-01 00:00:00"}]}, response={"predictions": [{"mean": 1}]}
)

GRAPH = b'{"input": {"name": "x", "shape": [2]}, "parameters": {}, "nodes": [], "output": "x"}'


def make_tensors(seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """A small state dict of random numbers, the same for the same seed."""
    numbers = np.random.default_rng(seed)
    shapes = {"head.bias": (3,), "head.weight": (3, 4), "layers.0.weight": (4, 2, 3)}
    return {name: numbers.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_forecaster(seed: int = 0, *, name: str = "NSW1", golden: GoldenSample | None = GOLDEN) -> bytes:
    """A sound forecaster MAR of an architecture that no server has."""
    tensors = make_tensors(seed)
    return pack_model(
        Kind.FORECASTER,
        ArchiveParts(tensors=tensors, architecture="sketch", config=CONFIG, forecast=FORECAST),
        model_name=name,
        golden=golden,
    )


def pack_tcn(name: str, config: Mapping[str, Setting], seed: int, forecast: ForecastSpec | None = None) -> bytes:
    """A forecaster MAR of a `tcn` of seeded random weights."""
    parts = ArchiveParts(
        tensors=random_tensors(build_family("tcn", config), seed), architecture="tcn", config=config, forecast=forecast
    )
    return pack_model(Kind.FORECASTER, parts, model_name=name)


def make_graph(seed: int = 0) -> bytes:
    """A sound graph MAR, of operators that only a server would look into."""
    return pack_model(Kind.GRAPH, ArchiveParts(program=GRAPH, tensors=make_tensors(seed)), model_name="m")


def make_mar_manifest(handler: str = "", serialized: str = "") -> dict[str, bytes]:
    """A MAR manifest as a member."""
    model = {"modelName": "m", "modelVersion": "1.0", "handler": handler, "serializedFile": serialized}
    return {"MAR-INF/MANIFEST.json": json.dumps({"runtime": "python", "model": model}).encode()}


def make_zip(
    members: Mapping[str, bytes] | Iterable[tuple[str | zipfile.ZipInfo, bytes]], *, deflate: bool = False
) -> bytes:
    """A zip of the members in the given order; pairs may repeat a name or bring their own ZipInfo. Equal members give
    equal bytes at any time of day, since every entry made here bears the zip format's first date.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for entry, content in members.items() if isinstance(members, Mapping) else members:
            if isinstance(entry, zipfile.ZipInfo):
                archive.writestr(entry, content)
                continue
            info = zipfile.ZipInfo(entry)
            info.external_attr = (0o40775 << 16 | 0x10) if entry.endswith("/") else 0o600 << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED)
    return out.getvalue()


def make_tar_gz(members: Mapping[str, bytes], *, top: str = "", style: int = tarfile.PAX_FORMAT) -> bytes:
    """A gzipped tar of the members, below the folder `top` if given (`m/`, or `./` as `tar -C folder .` writes)."""
    infos = []
    for name, content in members.items():
        info = tarfile.TarInfo(top + name)
        info.size = len(content)
        infos.append((info, content))
    if top:
        folder = tarfile.TarInfo(top)
        folder.type = tarfile.DIRTYPE
        infos.insert(0, (folder, b""))
    return make_raw_tar_gz(infos, style=style)


def make_raw_tar_gz(entries: Iterable[tuple[tarfile.TarInfo, bytes]], *, style: int = tarfile.PAX_FORMAT) -> bytes:
    """A gzipped tar of headers exactly as given, for links, devices and worse."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=style) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return gzip.compress(out.getvalue(), mtime=0)


def read_members(archive: bytes) -> dict[str, bytes]:
    """The members of a MAR."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def repack(archive: bytes, **changes: bytes) -> bytes:
    """A MAR with some members replaced; keywords are member names with `_` for `.` and `/`."""
    members = read_members(archive)
    by_keyword = {name.replace(".", "_").replace("/", "_").replace("-", "_"): name for name in members}
    return make_zip({**members, **{by_keyword[keyword]: content for keyword, content in changes.items()}})
