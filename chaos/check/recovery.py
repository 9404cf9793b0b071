"""R: how long training paused for a fault, and how much of the time was useful.

A step is completed when the first worker is told of its version. A pause is a gap between two such moments that is much
longer than usual; recovery is the time from the fault to the end of the longest pause that began while the fault lasted
or soon after. A fault that waits for the job to reach a failpoint begins when it is reached.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from chaos.history import History

_PAUSE_FACTOR = 3.0
"""A gap counts as a pause from so many normal steps on: shorter ones come and go by themselves."""
_SOON_S = 2.0
"""A pause that begins later than this after a fault was over has another reason: this machine does other work, too."""
_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class Steps:
    """When steps were completed, by the clock of the journals."""

    times: Sequence[float]
    versions: Sequence[int]
    normal_s: float
    """The median gap, before it is quiet."""
    paced: int
    """How many of them were completed before it was quiet: then the job hurries."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What one fault cost."""

    fault: int
    kind: str
    at_s: float
    recovery_s: float
    """From the fault to the next completed step after the pause; 0 if there was no pause."""
    pause_s: float
    """The longest gap between completed steps, less a normal step."""
    gap_ratio: float
    """p95 of the gaps while the fault lasted and a little after, in normal steps."""
    outage_s: float
    """How long the fault itself lasted, until the harness had undone it."""


def steps_of(history: History) -> Steps:
    """The moments at which some worker was first told of a version in a term; where there are none since pushes are
    applied on arrival, those at which a server first applied a push of a step."""
    first: dict[tuple[int, int], float] = {}
    for event in history.of("acked"):
        first.setdefault((event["term"], event["version"]), event.t)
    if not first:
        for event in history.of("updated"):
            first.setdefault((event["term"], event["step"]), event.t)
    completed = sorted((t, version) for (_, version), t in first.items())
    times = [t for t, _ in completed]
    quiet = history.of("quiet")
    paced = bisect.bisect(times, quiet[0].t) if quiet else len(times)
    usual = times[:paced] if paced > 1 else times
    gaps = [later - time for time, later in itertools.pairwise(usual)]
    return Steps(times, [version for _, version in completed], median(gaps) if gaps else 0.0, paced)


def recoveries(history: History, steps: Steps) -> list[Recovery]:
    """What each fault cost."""
    if len(steps.times) < 2:
        return []
    faults = history.of("fault")
    ends = [event.t for event in faults[1:]] + [steps.times[-1]]
    fired = {event["id"]: event.t for event in history.of("fired")}
    healed = {event["id"]: event.t for event in history.of("healed")}
    found = []
    for fault, end in zip(faults, ends, strict=True):
        waits = fault["kind"].startswith(("die-", "hang-"))
        begun = fired.get(fault["id"], fault.t) if waits else fault.t
        over = max(healed.get(fault["id"], begun), begun)
        until = min(end, over + _SOON_S)
        low = max(bisect.bisect_right(steps.times, begun) - 1, 0)
        gaps = [
            (steps.times[i + 1] - steps.times[i], steps.times[i + 1])
            for i in range(low, len(steps.times) - 1)
            if steps.times[i] < until
        ]
        longest, ended = max(gaps, default=(0.0, begun))
        paused = longest > _PAUSE_FACTOR * steps.normal_s
        near = [gap for gap, t in gaps if t < begun + _AFTER_S]
        found.append(
            Recovery(
                fault=fault["id"],
                kind=fault["kind"],
                at_s=begun - steps.times[0],
                recovery_s=max(0.0, ended - begun) if paused else 0.0,
                pause_s=max(0.0, longest - steps.normal_s),
                gap_ratio=(quantiles(near, n=20)[-1] if len(near) > 1 else longest) / steps.normal_s,
                outage_s=over - begun,
            )
        )
    return found


def goodput(steps: Steps) -> float:
    """Useful steps, each at its normal length, in the wall time from the first to the last before it was quiet."""
    times, versions = steps.times[: steps.paced], steps.versions[: steps.paced]
    if len(times) < 2:
        return 0.0
    return min(1.0, (max(versions) - versions[0]) * steps.normal_s / (times[-1] - times[0]))
