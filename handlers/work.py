"""Limits of the work of a row and of a request, the same for every kind of model. Pure, no torch.

`handlers.kinds.row_work` finds the `Work` of one row of a family before any request runs; limits of one row are checked
when an archive is loaded, those of a request before its rows are allocated.
"""

from dataclasses import dataclass
from math import prod

from handlers.base import Shape
from handlers.errors import RequestError
from model_store.errors import ArchiveInvalid

#: Limits of one row. Numbers in the results of all its operations together (128 MB), floating-point operations (about
#: a second of one core), calls of torch, of which a recurrence makes some for every step, and numbers of its input and
#: of its answer (16 MB each).
ROW_NUMBERS, ROW_FLOPS, ROW_CALLS, ROW_SIDE = 1 << 25, 20_000_000_000, 400_000, 1 << 22
#: Limits of one request; the server has a setting for each (`max_request_gflop`, `max_request_numbers`).
REQUEST_GFLOP, REQUEST_NUMBERS = 200.0, 1 << 25
#: Limits of models that run alone (`max_session_bytes`, `max_forward_s`).
SESSION_BYTES, FORWARD_S = 512 * 2**20, 10.0
#: Assumed speed of a core until its pace is measured; it decides which models run apart from others.
FLOPS_PER_S, NUMBERS_PER_S, CALL_S = 4e9, 5e8, 1e-5


@dataclass(frozen=True, slots=True)
class WorkLimits:
    """Limits of one request: rows times the floating-point operations of a row, rows times its input and answer."""

    gflop: float = REQUEST_GFLOP
    numbers: int = REQUEST_NUMBERS


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Limits of ONNX models: bytes of intermediate results of all models of this process, seconds of one run.

    `loops` says whether a model may have control flow, whose time does not follow from the size of the model.
    """

    memory_bytes: int = SESSION_BYTES
    forward_s: float = FORWARD_S
    loops: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """The work of one row of a family.

    `given`, `answered`: numbers in its input and its answer. `flops`: floating-point operations, `numbers`: those that
    its operations allocate, `calls`: calls of torch. `scratch`: of `numbers` those that a binding keeps for each row.
    """

    given: int
    answered: int
    flops: int = 0
    numbers: int = 0
    calls: int = 0
    scratch: int = 0

    @property
    def seconds(self) -> float:
        """Estimate the seconds of a row on one core."""
        return self.flops / FLOPS_PER_S + self.numbers / NUMBERS_PER_S + self.calls * CALL_S


def require_sides(what: str, input_shape: Shape, output_shape: Shape) -> None:
    """Check that a worker can hold many inputs and answers of a row. Raises ArchiveInvalid with the numbers."""
    for side, shape in (("input", input_shape), ("answer", output_shape)):
        if prod(shape) > ROW_SIDE:
            raise ArchiveInvalid(f"{what}: one {side} {list(shape)} has {prod(shape)} numbers, {ROW_SIDE} are allowed")


@dataclass(frozen=True, slots=True)
class RequestBudget:
    """The limits of a request for one family. It is called with the rows before memory is allocated for them."""

    work: Work
    limits: WorkLimits

    def __call__(self, rows: int) -> None:
        """Check the number of rows. Raises RequestError that gives the numbers and names the setting."""
        work, limits = self.work, self.limits
        numbers = rows * (work.given + work.answered)
        if rows > 1 and numbers > limits.numbers:
            what = f"{rows} instances of {work.given} numbers in and {work.answered} out are {numbers} numbers"
            raise RequestError(f"{what}, {limits.numbers} are allowed (max_request_numbers); send fewer instances")
        gflop = rows * work.flops / 1e9
        if rows > 1 and gflop > limits.gflop:
            what = f"{rows} instances take {gflop:.3g} thousand million floating-point operations"
            raise RequestError(f"{what}, {limits.gflop:g} are allowed (max_request_gflop); send fewer instances")
