"""Answers lines of JSON in this process, without a server: the part of `fleetcast batch` between reading and writing.

Each line is an item of `POST /v1/forecasts`: `target_model`, the fields of a DeepAR instance, and optionally its own
`configuration`. Lines are answered model by model, so that each model is loaded once in any order of the lines, and
the answers are kept in a checkpoint. Memory holds twenty bytes a line, one chunk of answers, and a few models.
"""

import hashlib
from array import array
from codecs import BOM_UTF8
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from handlers.errors import RequestError, RunFailed
from handlers.model import Model
from model_store.errors import LoadError, StoreDenied, StoreUnavailable
from model_store.names import InvalidModelName, ModelName, parse_model_name
from server.errors import Detail, Refused, Situation, situation_of
from server.front.raw_json import extract_prediction
from server.front.slices import finish_slices
from server.offline.checkpoint import Checkpoint

CHUNK = 64  #: most lines of one model that are answered together
NO_MODEL = -1


class _Head(msgspec.Struct):
    target_model: str
    configuration: msgspec.Raw = msgspec.Raw(b"")


_HEAD = msgspec.json.Decoder(_Head)


class LineError(ValueError):
    """A line that names no model."""


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """The places of the lines of a file and the model of each; `model` is NO_MODEL for a line without a valid one."""

    start: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    model: npt.NDArray[np.int32]
    names: Sequence[ModelName]
    digest: bytes

    def __repr__(self) -> str:
        return f"<Index {len(self.start)} lines for {len(self.names)} models>"

    def groups(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yield (model, its lines), models in the order of their first lines."""
        order = np.argsort(self.model, kind="stable")
        cuts = np.flatnonzero(np.diff(self.model[order])) + 1
        for lines in np.split(order, cuts):
            if len(lines):
                yield int(self.model[lines[0]]), lines

    def chunks(self, left: npt.NDArray[np.bool_]) -> Iterator[tuple[int, Sequence[npt.NDArray[np.int64]]]]:
        """Yield (model, its chunks of lines of which any is `left`), without models of which none is.

        INVARIANT: which lines form a chunk does not depend on what is left. A forward over other rows may differ in
        the last bit, so that a run that goes on would end with other bytes than one that was never interrupted.
        """
        for model, lines in self.groups():
            chunks = [chunk for chunk in np.split(lines, range(CHUNK, len(lines), CHUNK)) if left[chunk].any()]
            if chunks:
                yield model, chunks


def index_lines(file: BinaryIO, longest: int, step: Callable[[int], None]) -> Index:
    """Read the file once. A line longer than `longest` bytes is not kept in memory. `step` gets the bytes read."""
    start, size, model = array("q"), array("q"), array("i")
    names: dict[ModelName, int] = {}
    digest, at = hashlib.sha256(), 0
    while line := file.readline(longest + 2):
        read, whole = len(line), line.endswith(b"\n") or len(line) <= longest
        digest.update(line)
        while not whole and (more := file.readline(longest + 2)):
            digest.update(more)
            read, whole = read + len(more), more.endswith(b"\n")
        mark = 0 if at or not line.startswith(BOM_UTF8) else len(BOM_UTF8)  # spreadsheets begin a file with it
        start.append(at + mark)
        size.append(read - mark)
        try:
            name = _parse_head(line[mark:]).model if read <= longest + 1 else None
        except LineError:
            name = None
        model.append(NO_MODEL if name is None else names.setdefault(name, len(names)))
        at += read
        step(read)
    found = (np.frombuffer(start, np.int64), np.frombuffer(size, np.int64), np.frombuffer(model, np.int32))
    return Index(*found, list(names), digest.digest())


@dataclass(frozen=True, slots=True)
class BatchJob:
    """One batch: its input, the opener of models, and the configuration of lines that have none.

    `open_model` is called on `threads` threads. `longest` is the largest length of a line in bytes.
    """

    file: BinaryIO
    index: Index
    open_model: Callable[[ModelName], Model]
    configuration: bytes
    longest: int
    threads: int

    def run(self, journal: Checkpoint, step: Callable[[int], None]) -> None:
        """Answer all lines that are left. Raises LoadError if the store cannot be reached; a later run continues."""
        left = journal.left()
        groups = list(self.index.chunks(left))
        with ThreadPoolExecutor(self.threads) as pool:
            loads: deque[Future[Model | LoadError]] = deque()
            for i, (_, chunks) in enumerate(groups):
                while len(loads) < 2 * self.threads and i + len(loads) < len(groups):
                    loads.append(pool.submit(self._load, groups[i + len(loads)][0]))
                try:
                    model = loads.popleft().result()
                except (StoreUnavailable, StoreDenied):
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                for chunk in chunks:
                    answers = zip(chunk.tolist(), self._answers(model, chunk.tolist()), strict=True)
                    journal.add([(line, answer) for line, answer in answers if left[line]])
                    step(int(left[chunk].sum()))

    def _load(self, model: int) -> Model | LoadError:
        """Load a model and run its golden sample; returns the error if it does not load."""
        if model == NO_MODEL:
            return LoadError("no model")
        try:
            opened = self.open_model(self.index.names[model])
            opened.prove()
        except (StoreUnavailable, StoreDenied):
            raise
        except LoadError as error:
            return error
        return opened

    def _answers(self, model: Model | LoadError, lines: Sequence[int]) -> list[bytes]:
        """Answer each line with a line of JSON."""
        if isinstance(model, LoadError):
            return [_encode_error(self._why_no_model(line) or _to_refusal(model)) for line in lines]
        return [_encode_answer(answer) for answer in model.answer_many([self._request(line) for line in lines])]

    def _request(self, line: int) -> bytes:
        """Turn a line into a request of one instance to its model."""
        raw = self._line(line)
        own = bytes(_parse_head(raw).configuration)
        if own:  # it stands beside the instance, where a request has it
            fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
            del fields["configuration"]
            raw = msgspec.json.encode(fields)
        return b'{"instances":[' + raw + b'],"configuration":' + (own or self.configuration) + b"}"

    def _line(self, line: int) -> bytes:
        self.file.seek(int(self.index.start[line]))
        return self.file.read(int(self.index.size[line])).strip()

    def _why_no_model(self, line: int) -> Refused | None:
        """Return what is wrong with the line itself; None if it names a model."""
        if self.index.size[line] > self.longest + 1:
            message = f"the line has {self.index.size[line]} bytes, the limit is {self.longest} (max_body_bytes)"
            return Refused(Situation.TOO_LARGE, message)
        try:
            _parse_head(self._line(line))
        except LineError as error:
            return Refused(Situation.BAD_REQUEST, str(error), field="target_model")
        return None


@dataclass(frozen=True, slots=True)
class LineHead:
    """The fields of a line that do not depend on its model."""

    model: ModelName
    configuration: bytes


def _parse_head(line: bytes) -> LineHead:
    """Parse the fields of a line that do not depend on its model. Raises LineError that says what is wrong."""
    try:
        found = _HEAD.decode(line)
        return LineHead(parse_model_name(found.target_model), bytes(found.configuration))
    except InvalidModelName as error:
        raise LineError(str(error)) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LineError(f"the line is no request: {error}") from error


def _encode_answer(answer: bytes | RequestError | RunFailed) -> bytes:
    if isinstance(answer, RequestError):
        return _encode_error(Refused(Situation.BAD_REQUEST, answer.message, field=answer.field))
    if isinstance(answer, RunFailed):
        return _encode_error(Refused(Situation.MODEL_FAILED, str(answer)))
    try:
        return finish_slices(extract_prediction(answer)) + b"\n"
    except Refused as refused:
        return _encode_error(refused)


def _to_refusal(error: LoadError) -> Refused:
    return Refused(situation_of(error), str(error))


def _encode_error(refused: Refused) -> bytes:
    detail: Detail = refused.detail
    place = {} if detail.field is None else {"field": detail.field}
    error = {"code": refused.situation.name.lower(), "message": detail.message, **place}
    return msgspec.json.encode({"error": error}) + b"\n"
