"""A job's curve for TensorBoard: follows what its controller tells in Redis, and writes it as event files.

Whoever dies, the curve in Redis goes on, so one writer is enough, and it may itself come and go. It begins where the
files of an earlier one end: they say up to which time points and events have been written. On the axis is the version.
It does not go back where steps are computed again; after a rollback TensorBoard is told to forget what lies beyond it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from psa_store import logs
from psa_store.errors import DataIntegrity, DependencyUnreachable, UsageError
from psa_store.storage import History

CURVE = ("loss", "learning_rate", "gradient_norm", "samples_per_s", "steps_per_s", "workers", "servers")
"""Members of a point, and the names under which TensorBoard shows them."""
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
        self._version = -1
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

    def write(self, points: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]) -> None:
        """Add what is new. Both are whole, and in order, as History gives them."""
        new = [(float(each["time"]), False, each) for each in points if each["time"] > self._points_s]
        new += [(float(each["time"]), True, each) for each in events if each["time"] > self._events_s]
        for time_s, is_event, document in sorted(new, key=lambda entry: entry[0]):
            if is_event:
                self._events_s = time_s
                self._event(time_s, document)
            else:
                self._points_s = time_s
                self._point(time_s, document)
        self._writer.flush()

    def _point(self, time_s: float, point: Mapping[str, Any]) -> None:
        version = point.get("version")
        if version is None or version <= self._version:
            return
        self._version = version
        scalars = {name: float(point[name]) for name in CURVE if point.get(name) is not None}
        self._add(time_s, version, scalars)

    def _event(self, time_s: float, event: Mapping[str, Any]) -> None:
        version = event.get("version")
        if event["kind"] == "recovered":
            self._recoveries += 1
            self._add(time_s, max(0, self._version if version is None else version), {RECOVERIES: self._recoveries})
        elif event["kind"] == "rollback" and version is not None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            forget = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time_s, step=version + 1, session_log=forget))
            self._version = version

    def _add(self, time_s: float, version: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=number) for name, number in scalars.items()]
        self._writer.add_event(Event(wall_time=time_s, step=version, summary=Summary(value=values)))

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
                self._version = max(self._version, event.step)
            elif event.session_log.status == SessionLog.START:
                self._events_s = max(self._events_s, event.wall_time)
                self._version = event.step - 1


class BoardWriter:
    """Writes a job's curve into ``folder / job`` while it runs. Owns the thread ``psa-tensorboard``.

    Raises:
        UsageError: as :class:`Board`.
    """

    def __init__(self, job: str, folder: Path, redis: str, timeout_s: float) -> None:
        self._job = job
        self._board = Board(folder / job)
        self._history = History(redis, timeout_s=timeout_s)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="psa-tensorboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what is there, and stop. Redis should still answer, but need not."""
        self._over.set()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        log = logs.get_logger()
        complained = False
        with closing(self._board), closing(self._history):
            over = False
            while not over:
                over = self._over.wait(_POLL_S)
                try:
                    self._board.write(self._history.curve(self._job), self._history.events(self._job))
                    complained = False
                except (DependencyUnreachable, DataIntegrity, OSError) as error:
                    if not complained:
                        log.warning("nothing new for TensorBoard", why=str(error))
                    complained = True
