"""How numbers, times, sizes and ranks are written for people, in every table, page and sentence. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from psa_store.cluster import Cell

UNKNOWN = "-"
_RUNS_MAX = 6
"""Runs of ranks that are written before the other ranks are counted: a worker may hold hundreds."""
_NAMES_MAX = 4


def whole(number: float | None) -> str:
    return UNKNOWN if number is None else f"{number:.0f}"


def seconds(number: float | None) -> str:
    return UNKNOWN if number is None else f"{number:.1f} s"


def milliseconds(number_s: float, digits: int = 1) -> str:
    return f"{number_s * 1e3:.{digits}f} ms"


def size(count: float | None) -> str:
    """Bytes, in the largest unit that fits."""
    if count is None:
        return UNKNOWN
    factor, unit = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if count >= pair[0]), (1e3, "kB"))
    return f"{count / factor:.1f} {unit}"


def duration(seconds: float) -> str:
    """In two units at most."""
    if seconds < 60.0:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def ranks(held: Sequence[int]) -> str:
    """Ranks, three or more in a row as 0-3."""
    runs: list[list[int]] = []
    for rank in sorted(held):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    written = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs[:_RUNS_MAX]]
    left = sum(map(len, runs[_RUNS_MAX:]))
    return ", ".join(written) + (f" and {left} more" if left else "")


def model_parts(stages: int, microbatches: int) -> str:
    """Into what a job cuts its model and its batches; empty for a model that is trained whole."""
    parts = ((stages, "stages"), (microbatches, "micro-batches"))
    return ", ".join(f"{number} {noun}" for number, noun in parts if number > 1)


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """As rank 3, or ranks 0-3."""
    return f"{noun if len(numbers) == 1 else noun + 's'} {ranks(numbers)}"


def names(all_names: Iterable[str]) -> str:
    """A list; of a long one how many more there are."""
    written = list(all_names)
    shown = ", ".join(written[:_NAMES_MAX])
    return shown if len(written) <= _NAMES_MAX else f"{shown} and {len(written) - _NAMES_MAX} more"


def cells(held: Iterable[Cell]) -> str:
    """Cells by their stages, as stage 1 of ranks 0-3; stages of which the ranks are equal stand together."""
    of_stage: dict[int, list[int]] = {}
    for cell in sorted(held):
        of_stage.setdefault(cell.stage, []).append(cell.rank)
    stages_of: dict[tuple[int, ...], list[int]] = {}
    for stage, numbers in sorted(of_stage.items()):
        stages_of.setdefault(tuple(numbers), []).append(stage)
    return " and ".join(f"{numbered('stage', stages)} of {numbered('rank', of)}" for of, stages in stages_of.items())


def host_name(identity: str) -> str:
    """The name in a host's identity, without the boot id that makes it unique."""
    return identity.partition("/")[0]


def clock(time_s: float) -> str:
    """The time of day, in the zone of this process."""
    return time.strftime("%H:%M:%S", time.localtime(time_s))


def date(time_s: float | None) -> str:
    """Day and time of day, in the zone of this process."""
    return UNKNOWN if time_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
