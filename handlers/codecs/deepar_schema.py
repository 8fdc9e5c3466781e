"""The records of a DeepAR request, read strictly, and the place of each fault. No torch.

Contract: CONTRACTS 5. Unknown keys are refused: a covariate whose name is misspelt must not be left out in silence.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from difflib import get_close_matches
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from handlers.errors import RequestError
from model_store.archives.json_faults import FAULTS, NO_CHOICE, NO_KEY, JsonFault, explain_fault

MAX_ROWS = 1024  #: most instances in one request
SHOWN_NAMES = 10  #: most names in a message
SHOWN = 100  #: most characters of a key that is compared with others
OUTPUT_TYPES = ("mean", "quantiles", "samples", "marginal")
START = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d)?(Z|[+-]\d\d:\d\d)?)?")
PLACE = re.compile(r"(?:instances\[(\d+)\]\.?)?(.*)", re.DOTALL)
ROW, VALUE = re.compile(r"target\[\d+\]"), re.compile(r"target\[\d+\](\[\d+\])?")
OUTPUT_PLACE = re.compile(r"configuration\.output_types\[\d+\]")

T = TypeVar("T")
Numbers = list[float | Literal["NaN"] | None]  #: one product's history [T]; null and "NaN" are missing
Target = TypeVar("Target", Numbers, list[Numbers])  #: [T] for an archive of one product, [D][T] for several
Whole = Annotated[int, Meta(ge=-(2**53), le=2**53)]
NumSamples = Annotated[int, Meta(ge=1, le=10_000)]
Seed = Annotated[int, Meta(ge=0, le=2**53)]
Category = Annotated[int, Meta(ge=0, le=2**53)]


class Instance(Struct, Generic[Target], forbid_unknown_fields=True):
    """One time series, or one of each product, and its known-future covariates.

    `target_model` is what a call for many models names; it has been read when the instance comes here. `names`: of the
    rows of `dynamic_feat` and then of `cat`, where they came as columns of a table, in any order.
    """

    start: str
    target: Target
    cat: list[Category] | None = None
    dynamic_feat: list[list[float]] | None = None
    item_id: str | Whole | None = None
    target_model: Any = None
    names: list[str] | None = None


class Configuration(Struct, forbid_unknown_fields=True):
    """The requested contents of the answer. `quantiles` are levels as text, which the answer repeats.

    `marginal` is the distribution of `samples`, all trained quantiles as numbers, from which joint scenarios are made.
    """

    num_samples: NumSamples = 100
    output_types: tuple[Literal["mean", "quantiles", "samples", "marginal"], ...] = ("mean", "quantiles")
    quantiles: Annotated[list[str], Meta(min_length=1, max_length=1000)] | None = None
    seed: Seed | None = None
    joint: bool = False
    correlation: str | None = None


class DeepArRequest(Struct, Generic[Target], forbid_unknown_fields=True):
    """The body of a request."""

    instances: Annotated[list[Instance[Target]], Meta(min_length=1, max_length=MAX_ROWS)]
    configuration: Configuration = msgspec.field(default_factory=Configuration)


class JsonLine(Instance[Target], Generic[Target], forbid_unknown_fields=True):
    """One line of JSON Lines: an instance, and optionally the requested contents of the answer."""

    configuration: Configuration = msgspec.field(default_factory=Configuration)


INSTANCE_KEYS = tuple(key for key in Instance.__struct_fields__ if key not in ("target_model", "names"))
REQUEST_KEYS, LINE_KEYS = DeepArRequest.__struct_fields__, (*INSTANCE_KEYS, "configuration")
_ONE = msgspec.json.Decoder[Any](DeepArRequest[Numbers]), msgspec.json.Decoder[Any](JsonLine[Numbers])
_SEVERAL = msgspec.json.Decoder[Any](DeepArRequest[list[Numbers]]), msgspec.json.Decoder[Any](JsonLine[list[Numbers]])


class RequestReader:
    """Reads the requests for an archive: `target` is [T] for one product, [D][T] for several."""

    def __init__(self, products: Sequence[str]) -> None:
        self._several = len(products) > 1
        self._body, self._line = _SEVERAL if self._several else _ONE
        self._depth = "[D][T] belongs to archives of several products; this one has one: send [T]"
        if self._several:
            self._depth = f"the model has {len(products)} products{quote_names(products)}: send [D][T], a row for each"

    def body(self, raw: bytes) -> DeepArRequest[Any]:
        """Parse a body. Raises RequestError that names instance and field."""
        found: DeepArRequest[Any] = self._read(self._body, raw, REQUEST_KEYS)
        return found

    def line(self, raw: bytes) -> JsonLine[Any]:
        """Parse a line. Raises RequestError that names the field."""
        found: JsonLine[Any] = self._read(self._line, raw, LINE_KEYS)
        return found

    def _read(self, decoder: "msgspec.json.Decoder[T]", raw: bytes, keys: Sequence[str]) -> T:
        try:
            return decoder.decode(raw)
        except FAULTS as error:
            fault = explain_fault(error)
            if not isinstance(error, msgspec.ValidationError):
                raise RequestError(f"the body is not valid JSON: {fault.message}") from error
            raise self._placed(fault, keys) from error

    def _placed(self, fault: JsonFault, keys: Sequence[str]) -> RequestError:
        """The fault, with what the place would take. `keys`: of the whole document."""
        match = PLACE.fullmatch(fault.place)
        assert match is not None, "every text fits"
        instance, field = match.groups()
        message, got = fault.message, fault.message.rpartition(", not ")[2]
        row = message.startswith("expected a list") if self._several else got == "a list"
        if row and ROW.fullmatch(field):
            field, message = "target", self._depth
        elif VALUE.fullmatch(field) and "out of range" not in message:
            message = f'expected a number, null or "NaN", not {got.removesuffix(NO_CHOICE)}'
        elif OUTPUT_PLACE.fullmatch(field):
            message = f"expected one of {', '.join(OUTPUT_TYPES)}, not {got.removesuffix(NO_CHOICE)}"
        elif message == NO_KEY and field.startswith("configuration."):
            message = _refuse_key(field.removeprefix("configuration."), Configuration.__struct_fields__)
        elif message == NO_KEY:
            message = _refuse_key(field, keys if instance is None else INSTANCE_KEYS)
        return RequestError(message, instance=None if instance is None else int(instance), field=field or None)


def _refuse_key(key: str, known: Sequence[str]) -> str:
    """Say which keys there are in the place of an unknown one, and which one may be meant."""
    near = get_close_matches(key[:SHOWN], known, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"there is no such key{meant}; there are {', '.join(known)}"


def parse_start(text: str) -> datetime:
    """Parse the `start` of an instance; without an offset it is a time of the archive's zone. Raises RequestError."""
    try:
        if START.fullmatch(text):
            return datetime.fromisoformat(text)
    except ValueError:
        pass
    message = f"expected YYYY-MM-DD HH:MM:SS, or with an offset such as +01:00 or Z, not {text[:40]!r}"
    raise RequestError(message, field="start")


def quote_names(names: Sequence[str]) -> str:
    """Quote the first names in brackets for a message; empty without names."""
    more = ", ..." if len(names) > SHOWN_NAMES else ""
    return f" ({', '.join(names[:SHOWN_NAMES])}{more})" if names else ""
