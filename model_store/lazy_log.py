"""The log of this package, which imports structlog with its first line.

The import takes a fifth of a second, of which a command that opens one archive and logs nothing has no use.
"""

from typing import Any


class LazyLog:
    """Has the methods of a structlog logger."""

    def __getattr__(self, level: str) -> Any:
        import structlog  # noqa: PLC0415 -- see the module

        return getattr(structlog.get_logger(), level)


log = LazyLog()
