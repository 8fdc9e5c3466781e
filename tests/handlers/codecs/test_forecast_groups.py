"""Forecasts computed together have the bytes that each would have alone, over everything an archive may say."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from handlers.base import Float32
from handlers.codecs.calibration import make_calibration
from handlers.codecs.deepar import DeepAr
from handlers.codecs.deepar_schema import Configuration
from handlers.codecs.features import KEPT_STEPS, compute_calendar_feature, find_calendar_feature
from handlers.codecs.forecast_blocks import (
    AskedForecast,
    DecodedForecast,
    ForecastBlock,
    decode_columns,
    decode_together,
)
from handlers.codecs.forecast_groups import ForecastColumns, GroupEncode, encode_group
from handlers.codecs.forecast_texts import read_configuration, read_instance, write_predictions
from handlers.codecs.tensors import check_finite
from handlers.errors import RequestError, RunFailed
from model_store.archives.manifest import Feature, ForecastSpec, HistoryRules, InputChannel, Scaler, Tails

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
CONTEXT, AHEAD, LAG = 48, 24, 24
READ = 10  #: last steps of a context, of networks that read no more
NEEDED = CONTEXT + LAG
CALENDAR: tuple[Feature, ...] = ("hour_sin", "weekday_cos", "year_sin", "weekend", "monday")
CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"output_types": ["mean"]},
    {"output_types": ["quantiles"], "quantiles": ["0.5", "0.1", "0.33"]},
    {"quantiles": ["0.9"], "seed": 3},
    {"quantiles": ["0.5", "0.5"]},
    {"quantiles": ["0.99"]},
    {"output_types": ["mean", "samples"], "num_samples": 2, "seed": 1},
    {"output_types": ["marginal"]},
)


def make_codec(rng: random.Random) -> DeepAr:
    """The contract of one archive of a market with a few kinds of them, each with numbers of its own."""
    linear = Scaler(kind="linear", center=rng.uniform(40, 90), scale=rng.uniform(10, 40))
    scaler = rng.choice((Scaler(), linear, Scaler(kind="asinh", center=linear.center, scale=linear.scale)))
    channels = [InputChannel(source="target"), InputChannel(source="target", lag=LAG)]
    channels += [InputChannel(source="calendar", feature=each, shift=AHEAD) for each in CALENDAR]
    covariates, categories = rng.choice((((), ()), (("load", "wind"), ("region",))))
    channels += [
        InputChannel(source="dynamic_feat", index=i, shift=AHEAD, scaler=linear) for i in range(len(covariates))
    ]
    channels += [InputChannel(source="static", index=i, scaler=linear) for i in range(len(categories))]
    tails: dict[str, Any] = rng.choice(
        ({"tail": "clamp"}, {"tail": "exponential", "tails": Tails(low=0.2, high=0.4, band=(0.1, 0.9))})
    )
    profile = np.sin(np.arange(24) * np.pi / 12)
    rules = HistoryRules(
        flat_steps=6, stale_steps=6, low=-50, high=rng.choice((120.0, 400.0)), shift_gain=0.2,
        profile=tuple(profile / np.linalg.norm(profile)),
    )  # fmt: skip
    history: dict[str, Any] = {"history": rules} if rng.random() < 0.5 else {}
    forecast = ForecastSpec(
        frequency="1h", context_length=CONTEXT, prediction_length=AHEAD, quantile_levels=LEVELS,
        inputs=tuple(channels), dynamic_feat=covariates, cat=categories, scaler=scaler,
        time_zone=rng.choice(("UTC", "Europe/Berlin")), floor=rng.choice((None, 0.0)), cap=rng.choice((None, 95.0)),
        pad_context=rng.random() < 0.2, **tails, **history,
    )  # fmt: skip
    codec = DeepAr(forecast)
    codec.keeps_levels = rng.random() < 0.5
    calibration = make_calibration(forecast)
    assert calibration is not None
    if rng.random() < 0.4:
        codec.adapt(np.array([[rng.uniform(-0.2, 0.2) for _ in LEVELS] for _ in range(24)], np.float32))
    return codec


def make_instance(codec: DeepAr, rng: random.Random) -> dict[str, Any]:
    """A request that is mostly right: some have gaps, are doubtful, begin at an instant, or are wrong."""
    steps = rng.choice((NEEDED, NEEDED, NEEDED, NEEDED + 24))
    target: list[Any] = [round(60 + 20 * np.sin(i * np.pi / 12) + rng.gauss(0, 5), 2) for i in range(steps)]
    forecast = codec.forecast
    instance: dict[str, Any] = {"start": "2026-01-01 00:00:00", "target": target, "target_model": "m.mar"}
    if forecast.dynamic_feat:
        instance["dynamic_feat"] = [[rng.gauss(50, 9) for _ in range(steps + AHEAD)] for _ in forecast.dynamic_feat]
    if forecast.cat:
        instance["cat"] = [rng.randrange(9) for _ in forecast.cat]
    if rng.random() < 0.3:
        instance["item_id"] = rng.choice(("a", 'ü"%b', 7))
    odd = rng.randrange(24)
    changes: dict[int, dict[str, Any]] = {
        0: {"start": "2026-01-01 00:30:00"}, 1: {"start": "2026-03-28 00:00:00+01:00"}, 2: {"start": "no"},
        3: {"target": [*target[:-3], None, "NaN", None]}, 4: {"target": target[5:]}, 5: {"target": []},
        6: {"target": [*target[:-8], *[target[0]] * 8]}, 7: {"target": target[:-24] + target[-48:-24]},
        8: {"target": [1e300, *target[1:]]}, 9: {"cat": [1, 2, 3]}, 10: {"dynamic_feat": [[1.0]]},
        11: {"target": [*target[:-1], 300.0]}, 12: {"misspelt": 1}, 13: {"target": [*target[:-1], True]},
        14: {"target": [*target[:-1], [1.0]]}, 15: {"target": target[::-1]}, 16: {"target": [3 for _ in target]},
    }  # fmt: skip
    return {**instance, **changes.get(odd, {})}


def answer_alone(codec: DeepAr, body: bytes, output: Float32) -> Any:
    """The prediction's bytes, its rows and the levels that are kept, or the error."""
    try:
        rows, encode = codec.decode(body)
        return encode(check_finite("predictions", output)), rows.tobytes(), list(encode.answered), encode.marks
    except (RequestError, RunFailed) as error:
        return str(error)


def answer_together(
    codecs: Sequence[DeepAr], bodies: Sequence[bytes], texts: Sequence[bytes], shared: Configuration, outputs: Float32
) -> list[Any]:
    """The same, of all at once."""
    found: list[Any] = [None] * len(codecs)
    asked, places = list[AskedForecast](), list[int]()
    for i, (codec, body, text) in enumerate(zip(codecs, bodies, texts, strict=True)):
        try:
            instance = read_instance(text)
            asked.append(AskedForecast(codec, instance or codec.read_body(body).instances[0]))
            places.append(i)
        except RequestError as error:
            found[i] = str(error)
    decoded = decode_together(asked, shared)
    assert check_short_rows(asked, shared) == sum(len(block.rows) for block in decoded.blocks)
    told = {at: find_answer_alone(each, outputs[places[at]][None]) for at, each in decoded.alone.items()}
    told |= {
        at: each
        for block in decoded.blocks
        for at, each in zip(block.places, answer_block(block, outputs[[places[i] for i in block.places]]), strict=True)
    }
    assert sorted(told) == list(range(len(asked))), "each is in one block or alone"
    for at, each in told.items():
        found[places[at]] = each
    return found


def check_short_rows(asked: Sequence[AskedForecast], shared: Configuration) -> int:
    """The same forecasts are decoded as arrays, to the same numbers, where only the last steps have a place."""
    count = 0
    for channels in {len(each.codec.forecast.inputs) for each in asked}:
        some = [each for each in asked if len(each.codec.forecast.inputs) == channels]
        place = lambda n, channels=channels: np.empty((n, channels, READ), np.float32)  # noqa: E731
        short = decode_together(some, shared, place).blocks
        for one, other in zip(decode_together(some, shared).blocks, short, strict=True):
            assert (list(one.places), one.at.tolist()) == (list(other.places), other.at.tolist())
            assert np.array_equal(one.rows[..., -READ:], other.rows)
            count += len(other.rows)
    return count


def find_answer_alone(each: DecodedForecast | RequestError, output: Float32) -> Any:
    """What came of a forecast that was left to its own codec."""
    if isinstance(each, RequestError):
        return str(each)
    try:
        text = each.encode(check_finite("predictions", output))
    except RunFailed as error:
        return str(error)
    return text, each.rows.tobytes(), list(each.encode.answered), each.encode.marks


def answer_block(block: ForecastBlock, outputs: Float32) -> list[Any]:
    """Encode those that are computed as arrays: all as one, and again in two parts as if these had been two batches."""
    group, at = block.group, block.at
    numbers = group.compute_answers(at, outputs)
    levels = [list(group.take_levels(each)) for each in at.tolist()]
    whole = list_answers(
        block, range(len(at)), write_predictions(group, at.tolist(), numbers), levels, numbers.failures
    )
    encoders = [GroupEncode(group, each, [] if group.keeps_levels else ()) for each in at.tolist()]
    half, parts = len(encoders) // 2, dict[int, Any]()
    for places in (range(half, len(encoders)), range(half)):
        if places:
            some = [encoders[i] for i in places]
            numbers = encode_group(some, outputs[places.start : places.stop])
            texts, levels = (
                write_predictions(group, [each.at for each in some], numbers),
                [list(each.answered) for each in some],
            )
            answers = list_answers(block, places, texts, levels, numbers.failures)
            parts |= dict(zip(places, answers, strict=True))
    assert [parts[i] for i in range(len(encoders))] == whole
    return whole


def list_answers(
    block: ForecastBlock,
    places: Sequence[int],
    texts: Sequence[bytes],
    levels: Sequence[Any],
    failures: Mapping[int, RunFailed],
) -> list[Any]:
    """The answers as `answer_alone` gives them. `places`: in the block."""
    rows = [block.rows[i].tobytes() for i in range(len(block.rows))]
    return [
        str(failures[i]) if i in failures else (b'{"predictions":[' + text + b"]}", rows[place], kept, ("", ""))
        for i, (place, text, kept) in enumerate(zip(places, texts, levels, strict=True))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_together_and_alone_are_equal(seed: int) -> None:
    """Mixed archives and requests: bytes, rows, kept levels and every error, for every kind of configuration."""
    rng = random.Random(seed)
    kinds = [make_codec(rng) for _ in range(8)]
    codecs = [rng.choice(kinds) for _ in range(120)]
    instances = [make_instance(codec, rng) for codec in codecs]
    outputs = np.random.default_rng(seed).normal(size=(len(codecs), AHEAD, len(LEVELS))).astype(np.float32)
    outputs[5, 3, 2], outputs[11] = np.nan, 3e38
    for configuration in CONFIGURATIONS:
        text = json.dumps(configuration).encode()
        shared = read_configuration(text)
        assert shared is not None
        texts = [json.dumps(each).encode() for each in instances]
        bodies = [b'{"instances":[' + each + b'],"configuration":' + text + b"}" for each in texts]
        found = answer_together(codecs, bodies, texts, shared, outputs)
        for i, (codec, body) in enumerate(zip(codecs, bodies, strict=True)):
            expected = answer_alone(codec, body, outputs[i : i + 1])
            assert found[i] == expected, (i, configuration)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_columns_and_alone_are_equal(seed: int) -> None:
    """Forecasts of one length that come as columns: mixed archives, covariates in any order, some columns wrong."""
    rng = random.Random(100 + seed)
    kinds = [make_codec(rng) for _ in range(12)]
    covariates = bool(seed % 2)
    kinds = [each for each in kinds if bool(each.forecast.dynamic_feat) is covariates or rng.random() < 0.2]
    codecs = [rng.choice(kinds) for _ in range(60)]
    count, steps = len(codecs), NEEDED + 24 * (seed // 2)
    target = np.array([[60 + 20 * np.sin(i * np.pi / 12) + rng.gauss(0, 5) for i in range(steps)] for _ in codecs])
    target[3, 5], target[4], target[7] = np.nan, 7.0, target[7, ::-1]
    names = ["wind", "load", "region"] if covariates else []
    series = [np.random.default_rng(seed).normal(50, 9, (count, steps + AHEAD)) for _ in names[:2]]
    cats = np.array([[rng.randrange(9)] * covariates for _ in codecs], np.int64).reshape(count, -1)
    starts = [rng.choice(("2026-01-01 00:00:00", "2026-01-02 00:00:00", "no")) for _ in codecs]
    columns = ForecastColumns(starts, [rng.choice((None, "a")) for _ in codecs], target, series, cats, names)
    outputs = np.random.default_rng(seed).normal(size=(count, AHEAD, len(LEVELS))).astype(np.float32)
    for configuration in (Configuration(), Configuration(quantiles=["0.5", "0.1"])):
        found: list[Any] = [None] * count
        decoded = decode_columns(codecs, columns, configuration)
        for i, each in decoded.alone.items():
            found[i] = find_answer_alone(each, outputs[i : i + 1])
        assert sum(len(block.places) for block in decoded.blocks) > count // 4
        for block in decoded.blocks:
            for i, told in zip(block.places, answer_block(block, outputs[list(block.places)]), strict=True):
                found[i] = told
        for i, codec in enumerate(codecs):
            instance = msgspec.to_builtins(columns.read_instance(i), enc_hook=lambda array: array.tolist())
            told = {key: value for key, value in instance.items() if value is not None}
            body = msgspec.json.encode({"instances": [told], "configuration": configuration})
            assert found[i] == answer_alone(codec, body, outputs[i : i + 1]), i


def test_most_are_computed_as_arrays() -> None:
    """What is regular is one group for each recipe: the comparison above would pass if nothing were."""
    rng = random.Random(1)
    codecs = [make_codec(rng) for _ in range(60)]
    plain = [codec for codec in codecs if not codec.forecast.dynamic_feat and not codec.forecast.history]
    target = np.array([60 + rng.gauss(0, 5) for _ in range(NEEDED)])
    text = json.dumps({"start": "2026-01-01 00:00:00", "target": target.tolist()}).encode()
    asked = []
    for codec in plain:
        instance = read_instance(text)
        assert instance is not None
        asked.append(AskedForecast(codec, instance))
    found = decode_together(asked, Configuration())
    recipes = {codec.recipe for codec in plain}
    assert 2 <= len(found.blocks) <= len(recipes) < len(plain)
    assert sum(len(block.places) for block in found.blocks) > len(plain) - len(recipes)


def test_many_predictions_are_written_in_one_pass() -> None:
    """The text of all is cut at the right borders, also where it is written in several blocks."""
    rng = random.Random(3)
    codecs = [make_codec(rng) for _ in range(4)]
    codec = next(each for each in codecs if not each.forecast.dynamic_feat)
    target = [60 + rng.gauss(0, 5) for _ in range(NEEDED)]
    texts = [json.dumps({"start": "2026-01-01 00:00:00", "target": target, "item_id": f"{i}"}) for i in range(700)]
    instances = [read_instance(text.encode()) for text in texts]
    found = decode_together([AskedForecast(codec, each) for each in instances if each is not None], Configuration())
    (block,) = found.blocks
    outputs = np.random.default_rng(3).normal(size=(700, AHEAD, len(LEVELS))).astype(np.float32)
    written = write_predictions(block.group, range(700), block.group.compute_answers(block.at, outputs))
    assert len(written) == 700
    for i in (0, 1, 272, 273, 699):
        _, encode = codec.decode(b'{"instances":[' + texts[i].encode() + b"]}")
        assert encode(outputs[i : i + 1]) == b'{"predictions":[' + written[i] + b"]}"


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{", b'{"start":1,"target":[1]}', b'{"start":"x","target":[1],"start":"y"}', b'{"start":"x"}',
     b'{"start":"x","target":[1,null]}', b'{"start":"x","target":[[1]]}', b'{"start":"x","target":{"a":1}}',
     b'{"start":"x","target":"1"}', b'{"start":"x","target":[true]}',
     b'{"start":"x","target":[1e999]}', b'{"start":"x","target":[1],"item_id":{}}', b'{"start":"\xff","target":[1]}'],
)  # fmt: skip
def test_odd_instances_are_read_carefully(text: bytes) -> None:
    """The fast reader takes nothing that the careful one would refuse or read otherwise."""
    assert read_instance(text) is None


def test_calendar_features_are_kept_for_the_next_request() -> None:
    """A kept feature is the computed one, cannot be changed, and a long one is not kept."""
    for length in (48, KEPT_STEPS + 1):
        found = find_calendar_feature(1_767_225_600, 3600, length, "hour_sin")
        again = find_calendar_feature(1_767_225_600, 3600, length, "hour_sin")
        assert np.array_equal(found, compute_calendar_feature(1_767_225_600 + 3600 * np.arange(length), "hour_sin"))
        assert (found is again) == (length == 48)
        assert found.flags.writeable == (length != 48)


def test_levels_of_a_start_with_an_offset_are_kept() -> None:
    """An archive whose bands adapt answers a request that begins at an instant, and keeps it by its wall clock."""
    codec = next(each for each in map(make_codec, map(random.Random, range(50))) if _takes_instants(each))
    codec.keeps_levels = True
    body = {"instances": [{"start": "2026-02-01 00:00:00Z", "target": [60.0 + i for i in range(NEEDED)]}]}
    rows, encode = codec.decode(json.dumps(body).encode())
    encode(np.zeros((len(rows), AHEAD, len(LEVELS)), np.float32))
    assert [each.start for each in encode.answered] == [(31 + 3) * 86_400 + 1_767_225_600 + 3600]


@pytest.mark.parametrize("number", [1e300, -1e300, 3.5e38, 7e39, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", ["identity", "linear", "asinh"])
def test_numbers_that_are_none_once_scaled_are_decoded_alone(kind: Any, number: float) -> None:
    """Wherever in the history: also in steps that the network does not read, which have no place in its rows."""
    forecast = ForecastSpec(
        frequency="1h", context_length=CONTEXT, prediction_length=AHEAD, quantile_levels=LEVELS,
        inputs=(InputChannel(source="target"),), scaler=Scaler(kind=kind, center=5.0, scale=30.0), tail="clamp",
    )  # fmt: skip
    target = np.full((3, CONTEXT), 60.0) + np.arange(float(CONTEXT))
    target[1, 2] = number
    columns = ForecastColumns(["2026-01-01 00:00:00"] * 3, [None] * 3, target, [], np.zeros((3, 0), np.int64), [])
    codecs = [DeepAr(forecast) for _ in target]
    blocks, alone = decode_columns(codecs, columns, Configuration(), lambda n: np.empty((n, 1, READ), np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = {"identity": number, "linear": (number - 5) / 30, "asinh": np.arcsinh((number - 5) / 30)}[kind]
        is_one = bool(np.isfinite(np.float32(scaled)))
    assert [list(block.places) for block in blocks] == [[0, 1, 2] if is_one else [0, 2]]
    assert list(alone) == ([] if is_one else [1])


def _takes_instants(codec: DeepAr) -> bool:
    forecast = codec.forecast
    return forecast.time_zone == "Europe/Berlin" and not forecast.dynamic_feat and not forecast.pad_context
