"""Logging: one line per event on standard error, through structlog.

structlog is imported when it is used: that takes as long as all else that a command which logs nothing imports.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import structlog

Log: TypeAlias = "structlog.stdlib.BoundLogger"


def configure(level: str, role: str) -> None:
    """Send this process's log to standard error, each line marked with the role and the process id."""
    import structlog

    marks = {"role": role, "pid": os.getpid()}
    structlog.configure(
        processors=[
            lambda _logger, _method, event: {**event, **marks},
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def get_logger() -> Log:
    """A logger; cheap, call it where it is needed."""
    import structlog

    logger: Log = structlog.get_logger()
    return logger
