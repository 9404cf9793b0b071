"""Logging: one line per event on standard error, through structlog, for people or (as JSON) for programs.

Secrets are hidden in both, wherever they stand: in the event, in values, and in the text of exceptions. What would act
on a terminal is escaped.

The processes of a run share one standard error. A line and its end are therefore one write(): the kernel does not mix
the lines of two processes, in a file at any length, in a pipe up to PIPE_BUF bytes.

structlog is imported when it is used: that takes as long as all other imports of a command that logs nothing.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

from psa_store.logs.escape import escaped_lines
from psa_store.logs.secrets import HIDDEN, hide_passwords, names_secret
from psa_store.logs.title import entitle_with_job

if TYPE_CHECKING:
    import structlog
    from structlog.types import EventDict, Processor

Log: TypeAlias = "structlog.stdlib.BoundLogger"
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Setup:
    """How this process logs."""

    marks: _Marks
    processors: list[Processor]
    level: int
    as_json: bool


_setup: _Setup | None = None
"""None: not configured yet. It is not structlog's own configuration, which belongs to the user's script."""


def configure(level: str, role: str, *, as_json: bool = False) -> None:
    """Send this process's log to standard error, each line marked with the role and the process id.

    ``as_json``: a line is a JSON object with time (ISO 8601, UTC), level, event, role, pid, and job and member where
    they are known; else it is for people.
    """
    global _setup
    _setup = _make(level, _Marks({"role": role, "pid": os.getpid()}, grows=as_json), as_json=as_json)


def configure_once(level: str, role: str, *, as_json: bool = False) -> None:
    """The same, unless a command has done it: for a script that was started by itself."""
    if _setup is None:
        configure(level, role, as_json=as_json)


def _make(level: str, marks: _Marks, *, as_json: bool) -> _Setup:
    import structlog

    tail: list[Processor]
    if as_json:
        stamp = structlog.processors.TimeStamper(fmt="iso", utc=True, key="time")
        tail = [_in_order, structlog.processors.JSONRenderer()]
    else:
        stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False)
        tail = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)]
    processors: list[Processor] = [
        marks,
        structlog.processors.add_log_level,
        stamp,
        structlog.processors.format_exc_info,
        hide_secrets,
        *tail,
    ]
    return _Setup(marks, processors, getattr(logging, level.upper()), as_json)


def get_logger() -> Log:
    """Return a logger. Cheap: call it where it is needed."""
    import structlog

    setup = _setup or _make("info", _Marks({"pid": os.getpid()}, grows=False), as_json=False)
    logger: Log = structlog.wrap_logger(
        _StandardError(),
        processors=setup.processors,
        wrapper_class=structlog.make_filtering_bound_logger(setup.level),
        cache_logger_on_first_use=False,
    )
    return logger


def identify(*, job: str, **marks: str) -> None:
    """Add ``job``, ``member`` to all later lines for programs, if :func:`configure` was called, and to the title."""
    entitle_with_job(job)
    if _setup is not None:
        _setup.marks.add({"job": job, **marks})


def complain(text: str, *, with_traceback: bool = False) -> None:
    """Write why this process ends: for people ``psa: …``, or the traceback; for programs a log line with both."""
    if _setup is not None and _setup.as_json:
        get_logger().error(text, exc_info=with_traceback)
        return
    shown = traceback.format_exc().rstrip() if with_traceback else f"psa: {text}"
    _StandardError().msg(_shown(shown))


class _StandardError:
    """Writes lines to what is the standard error at that moment, each in one write, as said above."""

    def msg(self, message: str) -> None:
        with _LOCK:
            sys.stderr.write(f"{message}\n")
            sys.stderr.flush()

    debug = info = warning = error = critical = exception = msg


def hide_secrets(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Return the event as plain data without secrets."""
    return {name: _plain(name, value) for name, value in event.items()}


class _Marks:
    """Add what identifies this process to every line. A line about another member has that as ``about_member``."""

    def __init__(self, marks: Mapping[str, Any], *, grows: bool) -> None:
        self._marks = marks
        self._grows = grows

    def add(self, marks: Mapping[str, Any]) -> None:
        if self._grows:
            self._marks = {**self._marks, **marks}

    def __call__(self, _logger: object, _method: str, event: EventDict) -> EventDict:
        others = {name: value for name, value in event.items() if name in self._marks and value != self._marks[name]}
        return {**event, **{f"about_{name}": value for name, value in others.items()}, **self._marks}


def _plain(name: str, value: Any) -> Any:
    if names_secret(name) and value is not None:
        return HIDDEN
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else repr(value)  # JSON has no word for it
        case str():
            return _shown(str(value))
        case PurePath():
            return _shown(str(value))
        case Mapping():
            return {_shown(str(key)): _plain(str(key), each) for key, each in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain("", each) for each in value]
    return _shown(repr(value))


def _shown(text: str) -> str:
    return escaped_lines(hide_passwords(text))


def _in_order(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Put the fields that all lines have first."""
    common = ("time", "level", "event", "role", "pid", "job", "member")
    return {name: event[name] for name in (*(n for n in common if n in event), *(n for n in event if n not in common))}
