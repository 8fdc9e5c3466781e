"""The value of a function that works in slices, and the work of each."""

from typing import TypeVar

from server.front.slices import Slices

T = TypeVar("T")


def count_work(slices: Slices[T]) -> tuple[T, list[int]]:
    """Run to the end; what each slice says it has done."""
    works = []
    while True:
        try:
            works.append(next(slices))
        except StopIteration as end:
            value: T = end.value
            return value, works
