"""Log lines: text for people on a terminal, JSON for machines, always on standard error."""

import logging
import sys
from typing import Any

import structlog


def configure_logs(level: str, form: str, **bound: Any) -> None:
    """Set up structlog for this process; `bound` (such as worker=0) is on every line."""
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if text else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            lambda _logger, _method, event: {**bound, **event},  # not context variables: threads and callbacks log too
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # the stream as it is then, not as it was now
    )
