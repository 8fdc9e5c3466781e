"""The checkpoint of a batch or a retraining: two files, valid after a kill, with answers and each one's line.

`OUT.part` has the answers in the order in which they were made. `OUT.index` has a head that identifies the work, and a
fixed record for each answer, written after it. A torn last record, or one without its answer, is cut off. So a run that
continues has exactly the lines that are done.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

RECORD = Struct("<QQQ")  # line, where its answer starts, its bytes
MAGIC = b"fleetcast batch 1\n"
NOT_DONE = -1


class OtherWork(ValueError):
    """The checkpoint belongs to another input, store or configuration."""


class Checkpoint:
    """The checkpoint of a run over `lines` lines, opened to continue it. A context manager."""

    def __init__(self, out: Path, work: bytes, lines: int) -> None:
        """`work` is a digest of everything that determines the answers. Raises OtherWork, OSError."""
        self.part, self.index = (out.with_name(out.name + suffix) for suffix in (".part", ".index"))
        self._start = np.full(lines, NOT_DONE, np.int64)
        self._size = np.zeros(lines, np.int64)
        self._end = self._recover(MAGIC + work)
        self._answers, self._records = self.part.open("r+b"), self.index.open("ab")
        self._answers.truncate(self._end)
        self._answers.seek(self._end)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.part.name}: {self.done} of {len(self._start)} lines done>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._answers.close()
        self._records.close()

    @property
    def done(self) -> int:
        """The number of answered lines."""
        return int((self._start != NOT_DONE).sum())

    def left(self) -> npt.NDArray[np.bool_]:
        """Return a mask [lines] of those not answered yet."""
        return np.equal(self._start, NOT_DONE)

    def add(self, answers: Sequence[tuple[int, bytes]]) -> None:
        """Keep the answers of these lines. INVARIANT: an answer is written before the record that points to it."""
        records = []
        for line, answer in answers:
            self._start[line], self._size[line] = self._end, len(answer)
            records.append(RECORD.pack(line, self._end, len(answer)))
            self._answers.write(answer)
            self._end += len(answer)
        self._answers.flush()
        self._records.write(b"".join(records))
        self._records.flush()

    def in_order(self) -> Iterator[bytes]:
        """Yield all answers in the order of their lines."""
        descriptor = self._answers.fileno()
        for start, size in zip(self._start.tolist(), self._size.tolist(), strict=True):
            yield os.pread(descriptor, size, start)

    def finish(self, out: Path, *, append: bool = False) -> None:
        """Write the answers in order to `out`, or after what it has, atomically, and delete the checkpoint."""
        whole = out.with_name(out.name + ".whole")
        with whole.open("wb") as file:
            if append and out.exists():
                with out.open("rb") as earlier:
                    shutil.copyfileobj(earlier, file)
            file.writelines(self.in_order())
        whole.replace(out)
        self.part.unlink()
        self.index.unlink()

    def _recover(self, head: bytes) -> int:
        """Read what an earlier run left and cut off a torn end; returns how many bytes of answers are valid."""
        self.part.touch()
        if not self.index.exists() or self.index.stat().st_size < len(head):
            self.index.write_bytes(head)
            return 0
        there, end, good = self.part.stat().st_size, 0, len(head)
        with self.index.open("r+b") as file:
            if file.read(len(head)) != head:
                message = f"{self.index} belongs to another input, store or configuration; delete it and {self.part}"
                raise OtherWork(f"{message}, or write elsewhere")
            while len(record := file.read(RECORD.size)) == RECORD.size:
                line, start, size = RECORD.unpack(record)
                if line >= len(self._start) or start != end or start + size > there:
                    break
                self._start[line], self._size[line] = start, size
                end, good = start + size, good + RECORD.size
            file.truncate(good)
        return end
