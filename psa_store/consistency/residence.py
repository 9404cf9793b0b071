"""Which stages a worker has parameters of, one after the other, where it can not have all that it computes at once.

First all forward passes, from early stages to later ones, of which nothing is kept but what a stage hands to the next.
Then all backward passes, from later stages to earlier ones; a stage makes its forward passes once more for them, from
what was handed to it. The latest stages go forward and backward in one go.

Every worker goes through its stages in that order, so the passes of all of them have one order in common, whichever
worker holds which stage and however many it has at once: all forward passes by stage, then all backward passes by stage
from the last. No two workers wait for each other.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Residence:
    """Stages that are in memory together. ``backward``: both kinds of passes are due, not forward ones only."""

    stages: tuple[int, ...]
    backward: bool


def next_residence(left: Sequence[int], forwarded: Collection[int], stages_max: int) -> Residence:
    """Which stages to have next.

    Args:
        left: in order, those whose gradients are not whole; at least one.
        forwarded: those of which all forward passes were made.
        stages_max: how many are possible at once.
    """
    groups = [tuple(left[max(0, end - stages_max) : end]) for end in range(len(left), 0, -stages_max)]
    for group in reversed(groups[1:]):
        if not set(group).issubset(forwarded):
            return Residence(group, backward=False)
    return Residence(groups[0], backward=True)
