"""DeepAR JSON cut and joined without decoding a number: requests to models and their answers. Pure.

An instance's bytes become the one instance of a request to its model, and the prediction in that model's answer is put
into the common answer as it is.
"""

from collections.abc import Iterable, Mapping

import msgspec

from server.errors import Refused, Situation


class _PredictionAnswer(msgspec.Struct):
    predictions: list[msgspec.Raw]


class _Samples(msgspec.Struct):
    samples: list[msgspec.Raw]


_ANSWER, _SAMPLES = msgspec.json.Decoder(_PredictionAnswer), msgspec.json.Decoder(_Samples)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def build_request(instance: msgspec.Raw, configuration: bytes) -> bytes:
    """The body of a request for one instance."""
    return b"".join((b'{"instances":[', instance, b'],"configuration":', configuration, b"}"))


def split_fields(record: bytes | msgspec.Raw) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, not decoded. Raises msgspec.MsgspecError."""
    return _FIELDS.decode(record)


def extract_prediction(answer: bytes, *, marginal: bool = False) -> bytes:
    """The one prediction in a model's answer, with a marginal where that is needed. Raises Refused without one."""
    try:
        (found,) = _ANSWER.decode(answer).predictions
        if marginal and "marginal" not in _FIELDS.decode(found):
            raise Refused(Situation.MODEL_FAILED, "the model answers no marginal, which joint scenarios are made of")
    except (msgspec.MsgspecError, ValueError):
        raise Refused(Situation.MODEL_FAILED, "the model answers tensors, not a forecast") from None
    return bytes(found)


def build_correlation_request(predictions: Iterable[tuple[str, bytes]], drawn: Mapping[str, msgspec.Raw]) -> bytes:
    """The request to a correlation archive: the predictions' marginals by model name, and how samples are drawn."""
    forecasts = [{"name": name, "marginal": _FIELDS.decode(prediction)["marginal"]} for name, prediction in predictions]
    return msgspec.json.encode({"forecasts": forecasts, **drawn})


def split_samples(answer: bytes) -> list[msgspec.Raw]:
    """The samples of each forecast in a correlation archive's answer."""
    return _SAMPLES.decode(answer).samples


def replace_marginal(prediction: bytes, samples: msgspec.Raw) -> bytes:
    """The prediction with its samples in the place of its marginal."""
    fields = _FIELDS.decode(prediction)
    del fields["marginal"]
    return msgspec.json.encode({**fields, "samples": samples})
