"""When the controller takes a checkpoint, at which version, and when it gives an attempt up.

Pure: the clock is the caller's. ``wall_s`` is in seconds since 1970, since other controllers may have taken the last
checkpoint; ``now_s`` only grows.
"""

from __future__ import annotations

from dataclasses import dataclass

from psa_store.job.config import JobConfig

_PATIENCE_S = 600.0
"""An attempt is over when training has not moved for so long. A death ends it at once."""
_PATIENCE_AT_RANKS_S = 30.0
"""Where ranks that are past the cut wait for the others: not for ever for one that is slow."""
_AHEAD = 2
_AHEAD_MAX = 1 << 14
_REST_S = 5.0
_REST_MAX_S = 300.0


class Schedule:
    """Of one controller. A checkpoint that is cut at a version is cut a distance ahead of training."""

    def __init__(self, config: JobConfig, every_s: float | None) -> None:
        self._config = config
        self._every_s = every_s
        self._due_at_s: float | None = None
        self._ahead = _AHEAD
        self._rest_s = _REST_S
        self._rest_until_s = 0.0

    # --- when

    def rests(self, now_s: float) -> bool:
        """Whether training is left alone after a failure."""
        return now_s < self._rest_until_s

    @property
    def knows_the_last(self) -> bool:
        """Whether it was said when the last checkpoint was taken; until then none is due."""
        return self._every_s is None or self._due_at_s is not None

    def last_taken(self, wall_s: float) -> None:
        """The next one is due an interval after this."""
        self._due_at_s = None if self._every_s is None else wall_s + self._every_s

    def is_due(self, wall_s: float) -> bool:
        return self._due_at_s is not None and wall_s >= self._due_at_s

    # --- whether and where

    def refusal(self, *, changes: bool, attended: bool) -> str | None:
        """Why one that is asked for cannot be taken.

        Args:
            changes: whether the job has anything that training changes.
            attended: whether a worker holds a rank.
        """
        if not changes:
            return "nothing in this job ever changes"
        if self._config.ranks_cut_checkpoints and not attended:
            return "no worker holds a rank, to say where it ends. Stop the servers, and repeat"
        return None

    def version_to_cut(self, version: int, *, attended: bool, asked: bool) -> int | None:
        """Where to cut when training is at ``version``; None where ranks say it.

        No server has reached it, if that is far enough ahead. One that is not asked for takes the next regular commit,
        so that it costs nothing at all; and where ranks change hands at commits only, so does any.
        """
        if self._config.ranks_cut_checkpoints:
            return None
        interval = self._config.commit_interval
        grid = interval if interval and (self._config.ranks_stay or not asked) else 1
        return -(-(version + (self._ahead if attended else 0)) // grid) * grid

    # --- what came of it

    def taken(self, wall_s: float) -> None:
        self._ahead, self._rest_s = max(_AHEAD, self._ahead // 2), _REST_S
        self.last_taken(wall_s)

    def missed(self) -> None:
        """A server was told too late: the next cut lies twice as far ahead."""
        self._ahead = min(2 * self._ahead, _AHEAD_MAX)

    def failed(self, now_s: float) -> None:
        """Leave training alone for a while, after each failure in a row for longer."""
        self._rest_until_s = now_s + self._rest_s
        self._rest_s = min(2 * self._rest_s, _REST_MAX_S)


@dataclass(slots=True)
class Patience:
    """With one attempt, known by its barrier."""

    config: JobConfig
    barrier: str
    deadline_s: float = 0.0
    reached: int = -1
    """The version at the last deadline."""

    def __post_init__(self) -> None:
        self.deadline_s += self._each_s

    def is_over(self, now_s: float) -> bool:
        """Whether the time is up; whether that ends the attempt says :meth:`stands_still`, which may grant more."""
        return now_s >= self.deadline_s

    @property
    def asks_for_progress(self) -> bool:
        """Whether an attempt whose time is up goes on as long as training moves."""
        return not self.config.ranks_cut_checkpoints

    def stands_still(self, now_s: float, version: int | None) -> bool:
        """The time is up and training is at ``version`` (None: not known): whether nothing has moved in it."""
        self.deadline_s = now_s + self._each_s
        if version is None:
            return False
        before, self.reached = self.reached, version
        return before == version

    @property
    def _each_s(self) -> float:
        return _PATIENCE_AT_RANKS_S if self.config.ranks_cut_checkpoints else _PATIENCE_S
