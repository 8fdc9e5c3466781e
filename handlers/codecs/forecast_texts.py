"""Reads the instances of a call for many models, and writes their predictions, without an object for each number.

Both have a careful way beside them, `handlers.codecs.deepar_schema` and `handlers.codecs.deepar`, with which they
agree: what looks unusual here is left to it. No torch.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import simdjson

from handlers.base import Float32
from handlers.codecs.deepar_schema import Configuration, Instance
from handlers.codecs.forecast_groups import ForecastGroup, GroupNumbers
from handlers.codecs.tensors import BLOCK, write_json

#: The keys of an instance that is read here; what has others is read carefully, and may be wrong.
_PLAIN = frozenset(("start", "target", "item_id", "target_model"))
_configuration = msgspec.json.Decoder(Configuration)


def read_instance(raw: bytes | memoryview) -> Instance[Any] | None:
    """Read an instance without covariates, its target as an array of float64; None where it is not as plain as that."""
    text = bytes(raw)
    try:
        document: Any = simdjson.Parser().parse(text)
        keys = list(document)
        if not _PLAIN.issuperset(keys) or len(keys) != len(set(keys)) or text.find(b"[") != text.rfind(b"["):
            return None
        item_id = document["item_id"] if "item_id" in keys else None  # `get` takes 2 us to say that it is not there
        start, target = document["start"], document["target"]
        if type(start) is not str or not (item_id is None or type(item_id) is str):
            return None
        numbers = np.frombuffer(target.as_buffer(of_type="d"), np.float64)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError):
        return None
    return Instance(start, numbers, item_id=item_id)


def read_configuration(text: bytes) -> Configuration | None:
    """Read what all items of a call share; None where it is wrong, which each item's own reader says."""
    try:
        return _configuration.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def write_predictions(group: ForecastGroup, places: Sequence[int], numbers: GroupNumbers) -> list[bytes]:
    """Write the predictions at these places of a group as JSON, an object each, to the bytes that `DeepAr` writes."""
    names = group.names
    means = quantiles = None
    if numbers.means is not None:
        means = _write_rows(numbers.means)
    if numbers.quantiles is not None:
        quantiles = _write_rows(np.ascontiguousarray(numbers.quantiles.transpose(0, 2, 1)))
        template = b',"quantiles":{' + b",".join(_write_key(name) + b"[%b]" for name in names) + b"}"
    found, start = list[bytes](), numbers.start
    for i, at in enumerate(places):
        item_id = group.get_item_id(at)
        item = b"" if item_id is None else b'"item_id":' + write_json(item_id) + b","
        body = b"{" + item + _write_label(start, group.get_zone(at))
        if means is not None:
            body += b',"mean":[' + means[i] + b"]"
        if quantiles is not None:
            body += template % tuple(quantiles[i * len(names) : (i + 1) * len(names)])
        found.append(body + b"}")
    return found


def _write_rows(array: Float32) -> list[bytes]:
    """Write an array [..., T] in blocks, and cut its text into those of its rows [T], without their brackets."""
    flat, texts = array.reshape(-1, array.shape[-1]), list[bytes]()
    rows = max(1, BLOCK // array.shape[-1])
    for at in range(0, len(flat), rows):
        text = write_json(flat[at : at + rows])[:-2]
        texts += [row[2:] for row in text.split(b"]")]  # behind `[[` or `,[`: to look for one byte takes half the time
    return texts


@lru_cache(maxsize=256)
def _write_label(start: str, zone: str) -> bytes:
    label: Mapping[str, str] = {"start": start, "time_zone": zone}
    return write_json(label)[1:-1]


def _write_key(name: str) -> bytes:
    return write_json(name).replace(b"%", b"%%") + b":"
