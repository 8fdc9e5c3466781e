"""Learns the weights of a mixture's parts anew from past windows of an archive that is not fitted again. Torch.

A part's own forecasts are those of the same archive with all weight on that part, so that they pass the same codec.
"""

from hashlib import sha256

import msgspec
import numpy as np
import torch

from handlers.base import Float32
from handlers.codecs.features import to_network
from handlers.evaluation.scores import Steps
from handlers.forecasters.mixture import MIXTURE, SHARES
from handlers.training.shares import learn_shares
from handlers.training.time_series import Series
from model_store.archives.archive import Archive, open_archive, read_tensors
from model_store.archives.manifest import FLEETCAST_JSON, MAR_MANIFEST, Spec
from model_store.archives.packing import pack_archive, save_tensors
from server.offline.rolling_windows import Answers, ArchiveVersion, forecast_windows


def learns_shares(archive: Archive) -> bool:
    """Return whether the archive is a mixture whose weights are learnt from past windows."""
    spec = archive.spec
    return spec is not None and spec.architecture == MIXTURE and spec.config.get("stack", True) is True


def learn_archive_shares(answers: Answers, model: ArchiveVersion, series: Series, origins: Steps) -> Float32:
    """Learn shares [parts, levels] from windows that the archive was not fitted to; its own are the prior.

    `model` has no calibration and no golden sample. Raises LoadError, Unfit.
    """
    before = read_tensors(model.archive)[SHARES]
    scaler, found = model.forecast.scaler, []
    for part in range(len(before)):
        alone = np.zeros_like(before)
        alone[part] = 1
        windows = forecast_windows(answers, use_shares(model, alone), series, origins)
        found.append(to_network(windows.quantiles, scaler))
    y = torch.from_numpy(to_network(series.values[windows.steps], scaler)).float()
    parts = torch.from_numpy(np.stack(found, 1)).float()
    levels = torch.tensor(model.forecast.quantile_levels)
    shares: Float32 = learn_shares(parts, y, levels, torch.from_numpy(before)).numpy()
    return shares


def use_shares(model: ArchiveVersion, shares: Float32) -> ArchiveVersion:
    """Make the archive with other shares, without a golden sample, whose answer would be another. Raises LoadError."""
    archive = model.archive
    assert archive.spec is not None, "it is a mixture"
    spec, weights = write_shares(archive, archive.spec, shares)
    own = {FLEETCAST_JSON, MAR_MANIFEST, archive.spec.golden, spec.weights.file}
    members = {name: archive.read(name) for name in archive.members if name not in own} | {spec.weights.file: weights}
    packed = pack_archive(msgspec.structs.replace(spec, golden=None), members, model_name="m")
    return ArchiveVersion(model.name, model.version, open_archive(packed, model.name))


def write_shares(archive: Archive, spec: Spec, shares: Float32) -> tuple[Spec, bytes]:
    """Write the numbers of the archive with other shares: a record with their hash, and the member's bytes."""
    weights = save_tensors(read_tensors(archive) | {SHARES: shares})
    digest = msgspec.structs.replace(spec.weights, sha256=sha256(weights).hexdigest())
    return msgspec.structs.replace(spec, weights=digest), weights
