"""The process that reads one Parquet body: bytes in, columns as JSON out. It starts from nothing of ours but this file.

Parquet is unpacked by a large library of C++ from what a stranger has sent, and sizes in its headers may be lies. So it
runs in no front: this process has limits of its own, no secrets, and ends after one body.
"""

import json
import math
import os
import resource
import sys
from typing import Any

MEMORY_BYTES = 1024 * 1024 * 1024
CPU_S = 10
TOO_MANY, NOT_READ = 3, 4  #: exit codes, with the reason on the standard output


def main(most_values: int) -> None:
    """Read the standard input, write `{name: [cells]}`."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # others reserve more than is used, which counts here
    import pyarrow as pa  # noqa: PLC0415 -- after the limits
    from pyarrow import parquet  # noqa: PLC0415

    try:
        file = parquet.ParquetFile(pa.BufferReader(sys.stdin.buffer.read()))
        declared = _count_values(file.metadata)
        if declared > most_values:
            _end(TOO_MANY, f"{declared}")
        table = file.read(use_threads=False)
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        _end(NOT_READ, str(error)[:300])
    columns = {name: [_make_plain(cell) for cell in table[name].to_pylist()] for name in table.column_names}
    sys.stdout.write(json.dumps(columns, allow_nan=False))


def _count_values(metadata: Any) -> int:
    """Cells as the file declares them: those of lists are counted by themselves."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    chunks: int = sum(group.column(i).num_values for group in groups for i in range(metadata.num_columns))
    return max(chunks, int(metadata.num_rows) * int(metadata.num_columns))


def _make_plain(cell: Any) -> Any:
    """A cell as JSON has it: what is no number is missing, times are text."""
    if isinstance(cell, list):
        return [_make_plain(each) for each in cell]
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    return cell if cell is None or isinstance(cell, (int, str)) else str(cell)


def _end(code: int, said: str) -> None:
    sys.stdout.write(said)
    sys.exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
