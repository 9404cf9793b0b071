"""A job's curve for TensorBoard: follows it in Redis, and writes it as event files.

The curve in Redis goes on whatever dies, so one writer is enough, and it may itself come and go. It begins where the
files of an earlier one end: they say up to which time points and events have been written. The axis is the version.
It does not go back where steps are computed again; a rollback makes TensorBoard forget what lies beyond it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

from psa_store import logs
from psa_store.errors import DataIntegrity, DependencyUnreachable, UsageError
from psa_store.observe.curve import Point
from psa_store.observe.events import Event, EventKind
from psa_store.observe.history import JobHistory

CURVE = ("loss", "learning_rate", "gradient_norm", "samples_per_s", "steps_per_s", "workers", "servers")
"""Fields of a point, and the names under which TensorBoard shows them."""
RECOVERIES = "recoveries"
_POLL_S = 2.0
_JOIN_S = 30.0


def check_tensorboard() -> None:
    """Raise UsageError if TensorBoard is not installed."""
    try:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401
    except ImportError as error:
        raise UsageError("TensorBoard is not installed: `pip install 'psa_store[tensorboard]'`") from error


class Board:
    """The event files of one job in one folder. Not thread-safe.

    Raises:
        UsageError: the folder cannot be written to, or TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        check_tensorboard()
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._points_s = 0.0
        """Time of the newest point that is written ..."""
        self._events_s = 0.0
        """... and of the newest event."""
        self._version: int | None = None
        """The newest that is on the axis."""
        self._recoveries = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("events.out.tfevents.*")):
                self._take_up(path)
            self._writer = EventFileWriter(str(folder))
        except OSError as error:
            raise UsageError(f"{folder} cannot be used for TensorBoard: {error}") from error

    def close(self) -> None:
        self._writer.close()

    def write(self, points: Iterable[Point], events: Iterable[Event]) -> None:
        """Add what is new. Both are whole, and in order, as JobHistory gives them."""
        new: list[Point | Event] = [each for each in points if each.time > self._points_s]
        new += [each for each in events if each.time > self._events_s]
        for each in sorted(new, key=lambda entry: entry.time):
            if isinstance(each, Event):
                self._events_s = each.time
                self._event(each)
            else:
                self._points_s = each.time
                self._point(each)
        self._writer.flush()

    def _point(self, point: Point) -> None:
        if self._version is not None and point.version <= self._version:
            return
        self._version = point.version
        values = ((name, getattr(point, name)) for name in CURVE)
        numbers = {name: float(value) for name, value in values if value is not None}
        own = {f"metrics/{name}": value for name, value in sorted(point.metrics.items())}
        self._add(point.time, point.version, numbers | own)

    def _event(self, event: Event) -> None:
        if event.kind is EventKind.RECOVERED:
            self._recoveries += 1
            version = self._version or 0 if event.version is None else event.version
            self._add(event.time, version, {RECOVERIES: self._recoveries})
        elif event.kind is EventKind.ROLLBACK and event.version is not None:
            from tensorboard.compat.proto.event_pb2 import Event as BoardEvent
            from tensorboard.compat.proto.event_pb2 import SessionLog

            forget = SessionLog(status=SessionLog.START)
            self._writer.add_event(BoardEvent(wall_time=event.time, step=event.version + 1, session_log=forget))
            self._version = event.version

    def _add(self, time_s: float, version: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as BoardEvent
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=number) for name, number in scalars.items()]
        self._writer.add_event(BoardEvent(wall_time=time_s, step=version, summary=Summary(value=values)))

    def _take_up(self, path: Path) -> None:
        """Go on where this file ends; what a writer that was killed has torn at its end is not there."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from tensorboard.compat.proto.event_pb2 import SessionLog

        for event in LegacyEventFileLoader(str(path)).Load():
            numbers = {value.tag: value.simple_value for value in event.summary.value}
            if RECOVERIES in numbers:
                self._events_s = max(self._events_s, event.wall_time)
                self._recoveries = max(self._recoveries, round(numbers[RECOVERIES]))
            elif numbers:
                self._points_s = max(self._points_s, event.wall_time)
                self._version = event.step if self._version is None else max(self._version, event.step)
            elif event.session_log.status == SessionLog.START:
                self._events_s = max(self._events_s, event.wall_time)
                self._version = event.step - 1


class BoardWriter:
    """Writes a job's curve into ``folder / job`` while it runs. Owns the thread ``psa-tensorboard``.

    Raises:
        UsageError: as :class:`Board`.
    """

    def __init__(self, job: str, folder: Path, redis: str, timeout_s: float) -> None:
        self._board = Board(folder / job)
        self._history = JobHistory(job, redis, timeout_s=timeout_s)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="psa-tensorboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what is there, and stop. Redis should still answer, but need not."""
        self._over.set()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        log = logs.get_logger()
        warned = False
        with closing(self._board), closing(self._history):
            over = False
            while not over:
                over = self._over.wait(_POLL_S)
                try:
                    self._board.write(self._history.curve(), self._history.events())
                    warned = False
                except (DependencyUnreachable, DataIntegrity, OSError) as error:
                    if not warned:
                        log.warning("nothing new for TensorBoard", why=str(error))
                    warned = True
