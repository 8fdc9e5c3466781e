"""Keeps the trials of a search in a file of lines, so that a search that was ended goes on. No torch."""

from collections import defaultdict
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec


class OtherSearch(ValueError):
    """The file is of another search; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of a candidate on one unit: infinite scores if it failed, and the seconds that it took."""

    score: float
    rmae: float
    seconds: float


class _Head(msgspec.Struct):
    search: str


class _Line(msgspec.Struct, array_like=True):
    candidate: str
    market: int
    fold: int
    score: float | None  #: none: it failed
    rmae: float | None
    seconds: float


class Journal:
    """The trials by candidate and unit. A context manager; lines are written as trials are added."""

    def __init__(self, path: Path, search: str) -> None:
        """`search` identifies what was asked. Raises OtherSearch, OSError."""
        self._path = path
        self.trials: dict[str, dict[tuple[int, int], Trial]] = defaultdict(dict)
        good = self._recover(search)
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(good)
        self._file.seek(good)
        if not good:
            self._write(_Head(search))

    def __repr__(self) -> str:
        return f"<Journal {self._path.name}: {sum(map(len, self.trials.values()))} trials>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def seconds(self) -> float:
        """The seconds of all trials."""
        return sum(trial.seconds for of in self.trials.values() for trial in of.values())

    def add(self, candidate: str, unit: tuple[int, int], trial: Trial) -> None:
        """Keep a trial. Raises OSError."""
        self.trials[candidate][unit] = trial
        score, rmae = (each if isfinite(each) else None for each in (trial.score, trial.rmae))
        self._write(_Line(candidate, *unit, score, rmae, trial.seconds))

    def _write(self, line: msgspec.Struct) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()

    def _recover(self, search: str) -> int:
        """Read what an earlier search left; returns the bytes of its whole lines, so that a torn one is cut off."""
        if not self._path.exists():
            return 0
        raw = self._path.read_bytes()
        lines = raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)
        if not lines:
            return 0
        try:
            same = msgspec.json.decode(lines[0], type=_Head).search == search
            found = [msgspec.json.decode(line, type=_Line) for line in lines[1:]] if same else []
        except msgspec.MsgspecError as error:
            raise OtherSearch(f"{self._path} is no log of a search: {error}; give another --log") from None
        if not same:
            what = f"{self._path} is the log of a search with other prices or flags"
            raise OtherSearch(f"{what}; delete it, or give another --log")
        for line in found:
            score, rmae = (inf if each is None else each for each in (line.score, line.rmae))
            self.trials[line.candidate][line.market, line.fold] = Trial(score, rmae, line.seconds)
        return sum(map(len, lines))
