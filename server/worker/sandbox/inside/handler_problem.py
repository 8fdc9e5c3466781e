"""Why an archive's code cannot be loaded, as its owner is told."""


class HandlerProblem(Exception):
    """The archive's handler cannot be loaded; the message says what to do."""
