"""What a job *is*: the facts that are fixed when it is created and that every later process must agree with."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from psa_store.compression import NONE, Compression, parse_compression
from psa_store.errors import DataIntegrity, JobMismatch, UsageError
from psa_store.job.mode import SYNC, Mode, ModeName, parse_mode

COMMIT_EVERY_DEFAULT = 50
COMMIT_EVERY_ON_ARRIVAL = 4
"""The default where pushes are applied on arrival: workers keep every gradient until it is durable."""
COMMIT_EVERY_ROUNDS = 10
"""The default in rounds: with each commit ranks send their state, and a worker's death costs the rounds since."""
SHARD_VERSIONS_KEPT = 3
"""Versions of a shard that Redis keeps. Three suffice for a common one to exist at any moment: a server starts the
commit of version v+K only when its own commit of v is done, so the heads of two servers are never further apart than
one finished and one unfinished commit."""
SHARD_VERSIONS_KEPT_ON_ARRIVAL = 5
"""There a server may also be ahead of another by one push of every rank, which can be one commit more, and commit where
a hand-over was called off."""

RUN_NODE = "run"
"""Name that a `psa run` holds in ZooKeeper while its run of the job goes on; the text begins with the run's id."""
CREATOR_NODE = "creator"
"""Name that a process holds in ZooKeeper while it creates the job."""

_AGREED = ("ranks", "seed", "optimizer", "mode", "commit_every", "skip_nonfinite", "compression")
"""What a process must have as it is stored; the layout is compared before, tensor by tensor."""


def commit_every_default(mode: Mode) -> int:
    """Steps (in rounds: rounds) between commits of a job that does not say it."""
    if mode.in_rounds:
        return COMMIT_EVERY_ROUNDS
    return COMMIT_EVERY_ON_ARRIVAL if mode.on_arrival else COMMIT_EVERY_DEFAULT


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class JobConfig:
    """The fixed facts of one named training run.

    ``ranks``: logical data-parallel world size. ``optimizer``: as ``psa.optim`` writes it (names and numbers, no
    code). ``commit_every``: versions between commits, 0 for none but those at hand-over and at the end; on arrival,
    steps of all ranks.
    ``skip_nonfinite``: skip a step with NaN or Inf gradients, for all ranks alike, instead of failing.
    ``mode``: which ranks wait for which. ``compression``: in how many bytes float32 travels.
    """

    name: str
    ranks: int
    seed: int
    optimizer: dict[str, Any]
    layout: str
    """Fingerprint of the layout."""
    commit_every: int = COMMIT_EVERY_DEFAULT
    skip_nonfinite: bool = False
    mode: Mode = SYNC
    compression: Compression = NONE

    def __post_init__(self) -> None:
        check_job_name(self.name)
        if not 1 <= self.ranks <= 65536:
            raise UsageError(f"ranks={self.ranks}: must be between 1 and 65536")
        if self.commit_every < 0:
            raise UsageError(f"commit_every={self.commit_every}: must be 0 (never) or a number of steps")
        if self.mode.on_arrival and self.commit_every == 0:
            raise UsageError(f"commit_every=0: in mode {self.mode} workers keep gradients until they are committed")
        if self.ranks_stay and self.commit_every == 0:
            raise UsageError(f"commit_every=0: in mode {self.mode} ranks change hands at commits")
        if self.mode.backup >= self.ranks:
            raise UsageError(f"mode {self.mode}: a step needs at least one of {self.ranks} ranks")
        if self.compression.needs_residual and self.mode.may_miss_versions:
            raise UsageError(
                f"compression {self.compression} in mode {self.mode}: what a rank holds back cannot be followed where "
                "others may compute it, or none. Use int8."
            )

    @property
    def commit_interval(self) -> int:
        """Versions between commits, 0 for none: a version is a step, or the update of one rank."""
        return self.commit_every * (self.ranks if self.mode.on_arrival else 1)

    @property
    def keeps_rank_state(self) -> bool:
        """Whether what a rank carries from version to version is kept with every regular commit.

        Then the bits do not depend on who holds a rank: whoever gets one begins with what was committed. On arrival it
        is lost with its worker.
        """
        if self.mode.on_arrival or self.mode.forget:
            return False
        return self.mode.in_rounds or self.compression.needs_residual

    @property
    def publishes_movements(self) -> bool:
        """Whether parameters travel compressed, too: each version as what it adds to the one before."""
        return self.mode.in_rounds and self.compression.encodes

    @property
    def ranks_stay(self) -> bool:
        """Whether ranks change hands only between terms, because they carry something."""
        return self.mode.in_rounds or self.keeps_rank_state

    def rank_state_is_due(self, version: int) -> bool:
        """Whether the push that makes ``version`` brings the state of its rank, too."""
        return self.keeps_rank_state and version % self.commit_interval == 0

    @property
    def versions_kept(self) -> int:
        """Versions of a shard that Redis keeps."""
        return SHARD_VERSIONS_KEPT_ON_ARRIVAL if self.mode.on_arrival else SHARD_VERSIONS_KEPT

    @property
    def window(self) -> int:
        """On arrival: how many gradients of a rank may wait for being durable, before it must wait.

        One rank alone must be able to reach the next commit while another does not move, and go on during it.
        """
        return 2 * self.commit_interval

    def facts(self) -> dict[str, Any]:
        """All of it as JSON knows it."""
        return {**asdict(self), "mode": str(self.mode), "compression": str(self.compression)}

    def to_json(self) -> str:
        return json.dumps(self.facts(), sort_keys=True)

    def must_agree_with(self, stored: JobConfig) -> None:
        """Refuse to join a job that is not the one this process was written for.

        Raises:
            JobMismatch: naming the first fact that differs, both values, and the way out.
        """
        ours, stored_facts = self.facts(), stored.facts()
        for what in _AGREED:
            mine, theirs = ours[what], stored_facts[what]
            if mine != theirs:
                raise JobMismatch(
                    f"job {self.name!r} exists with {what}={theirs!r}, this process has {what}={mine!r}. "
                    f"Use the stored value, or another job name to start over."
                )


def job_config_from_json(text: str) -> JobConfig:
    """Rebuild a job's facts from :meth:`JobConfig.to_json`; raises DataIntegrity if the text is not such."""
    try:
        facts = json.loads(text)
        facts["mode"] = parse_mode(facts.get("mode", ModeName.SYNC))
        facts["compression"] = parse_compression(facts.get("compression", str(NONE)))
        return JobConfig(**facts)
    except (ValueError, TypeError, UsageError) as error:
        raise DataIntegrity(f"the stored job configuration cannot be read: {error}") from error


def check_job_name(name: str) -> str:
    """Return ``name`` if it can be part of Redis keys and znodes; raises UsageError if not."""
    return check_name(name, "job name")


def check_name(name: str, what: str) -> str:
    """The same for the name of ``what``."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{what} {name!r}: use up to 100 letters, digits, '_', '.' and '-', the first a letter or digit"
        )
    return name
