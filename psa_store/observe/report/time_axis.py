"""Where a time lies on the picture: rests take little room, however long they were. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from psa_store.observe.report.timeline import Segment, State

_REST_SHARE = 0.02
"""Of the time that the job was not at rest: so wide is a rest, at most."""
_UNITS = (
    (3 * 86400.0, 86400.0, "days"),
    (3 * 3600.0, 3600.0, "hours"),
    (300.0, 60.0, "minutes"),
    (0.0, 1.0, "seconds"),
)
_TICKS = 8


class TimeAxis:
    """Maps times (seconds since 1970) to places, which are seconds of the picture, from 0 to ``length``."""

    def __init__(self, segments: Sequence[Segment], begin_s: float | None) -> None:
        active_s = sum(each.length_s for each in segments if each.state is not State.REST)
        widest = _REST_SHARE * active_s
        self._knots = [(begin_s or 0.0, 0.0)]
        self._active = [(0.0, 0.0)]
        """Seconds that the job was not at rest, and their places."""
        for each in segments:
            place, active = self._knots[-1][1], self._active[-1][0]
            rest = each.state is State.REST
            length = min(each.length_s, widest) if rest else each.length_s
            self._knots.append((each.end_s, place + length))
            self._active.append((active + (0.0 if rest else each.length_s), place + length))
        self.length = self._knots[-1][1]
        self.unit_s, self.unit = next((unit_s, unit) for least, unit_s, unit in _UNITS if active_s >= least)

    def place(self, time_s: float) -> float:
        """Where a time lies; what is before or after all goes to the edge."""
        return _between(self._knots, time_s)

    def ticks(self) -> list[tuple[float, str]]:
        """Round numbers of units of time without rests, with their places."""
        active = self._active[-1][0] / self.unit_s
        step = next((size for size in _steps() if active / size <= _TICKS), active)
        count = int(active / step) if step > 0.0 else 0
        return [(_between(self._active, index * step * self.unit_s), f"{index * step:g}") for index in range(count + 1)]


def _steps() -> list[float]:
    return [digit * 10.0**power for power in range(-3, 9) for digit in (1, 2, 5)]


def _between(knots: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between knots; of two places at the same x, the later; beyond the ends, theirs."""
    for (a, at), (b, to) in zip(reversed(knots[:-1]), reversed(knots[1:]), strict=True):
        if x >= a:
            return to if x >= b else at + (to - at) * (x - a) / (b - a)
    return knots[0][1]
