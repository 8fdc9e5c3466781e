"""Loads in one thread, for tests of what they are made of."""

from collections.abc import Callable

from server.worker.model_loader import AskStore, LoadedModel, LoadSteps


def make_load(build: Callable[[], LoadedModel]) -> LoadSteps:
    """A load of one step, in the disk lane."""
    further: list[AskStore] = []
    yield from further
    return build()


def run_load(steps: LoadSteps) -> LoadedModel:
    """Run all steps in this thread. Raises LoadError."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            loaded: LoadedModel = end.value
            return loaded
