"""Cut what a process writes into lines, as they are shown among those of other processes. Pure.

A progress bar writes itself again and again over one line, with a carriage return and no end. Among the lines of other
processes it can not stay in its place: its newest state is shown as a line now and then, and at its end.
"""

from __future__ import annotations

LINE_BYTES_MAX = 1 << 16
"""A line that is longer is shown in pieces."""
PROGRESS_S = 5.0
"""How often the state of a progress bar is shown."""


class LineCutter:
    """The output of one process, in pieces as they come; lines out, without their ends."""

    def __init__(self) -> None:
        self._rest = b""
        self._shown: bytes | None = None
        """The state of a progress bar that was shown last; None: the present line is none."""
        self._show_at_s = 0.0

    def feed(self, data: bytes, now_s: float) -> list[bytes]:
        """Take what was written, and return the lines that are to be shown now."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        lines = []
        for line in whole:
            state = _newest(line)
            if state != self._shown:
                lines.append(state)
            self._shown = None
        if b"\r" in self._rest:
            self._rest = b"\r" + _newest(self._rest)
            if self._rest[1:].strip() and now_s >= self._show_at_s:
                self._shown, self._show_at_s = self._rest[1:], now_s + PROGRESS_S
                lines.append(self._shown)
        while len(self._rest) > LINE_BYTES_MAX:
            lines.append(self._rest[:LINE_BYTES_MAX])
            self._rest = self._rest[LINE_BYTES_MAX:]
        return lines

    def end(self) -> list[bytes]:
        """Return what is left: the process has ended."""
        rest, self._rest = _newest(self._rest), b""
        return [rest] if rest.strip() and rest != self._shown else []


def _newest(line: bytes) -> bytes:
    """What a terminal shows of a line that was written over: roughly, what followed the last carriage return."""
    parts = [part for part in line.split(b"\r") if part.strip()]
    return parts[-1] if b"\r" in line and parts else line.strip(b"\r")
