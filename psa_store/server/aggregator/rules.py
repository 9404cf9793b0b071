"""What a job's mode means for the rest of a server, which knows no modes."""

from __future__ import annotations

from dataclasses import dataclass

from psa_store.job.config import JobConfig


@dataclass(frozen=True, slots=True)
class Rules:
    """The facts that follow from the mode, besides those that a job's configuration names for workers as well."""

    on_arrival: bool
    """Whether each push is applied when it arrives: it may come before its turn, and wait for others of its rank.
    Ranks wait for commits then, and workers say where in their ranks a checkpoint ends."""
    workers_race: bool
    """Whether a worker may push a rank that the plan gives to another: the first one counts."""
    skips_nonfinite: bool
    """Whether a push with NaN or Inf is taken, and counts without an update."""


def rules_of(config: JobConfig) -> Rules:
    """Read them off a job's mode."""
    mode = config.mode
    return Rules(
        on_arrival=mode.on_arrival,
        workers_race=mode.speculate,
        skips_nonfinite=config.skip_nonfinite and not mode.in_rounds,
    )
