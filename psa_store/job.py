"""What a job *is*: the facts that are fixed when it is created and that every later process must agree with."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from psa_store.compression import NONE, Compression, parse_compression
from psa_store.errors import DataIntegrity, JobMismatch, UsageError
from psa_store.mode import SYNC, Mode, ModeName, parse_mode
from psa_store.transport import Transport

COMMIT_EVERY_DEFAULT = 50
COMMIT_EVERY_ON_ARRIVAL = 4
"""The default where pushes are applied on arrival: workers keep every gradient until it is durable."""
SHARD_VERSIONS_KEPT = 3
"""Versions of a shard that Redis keeps. Three suffice for a common one to exist at any moment: a server starts the
commit of version v+K only when its own commit of v is done, so the heads of two servers are never further apart than
one finished and one unfinished commit."""
SHARD_VERSIONS_KEPT_ON_ARRIVAL = 5
"""There a server may also be ahead of another by one push of every rank, which can be one commit more, and commit where
a hand-over was called off."""

RUN_NODE = "run"
"""Name that a `psa run` holds in ZooKeeper while its run of the job goes on; the text begins with the run's id."""

_AGREED = ("ranks", "seed", "optimizer", "mode", "commit_every", "skip_nonfinite", "transport", "compression")
"""What a process must have as it is stored; the layout is compared before, tensor by tensor."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class JobConfig:
    """The fixed facts of one named training run.

    ``ranks``: logical data-parallel world size. ``optimizer``: as ``psa.optim`` writes it (names and numbers, no
    code). ``commit_every``: steps between commits, 0 for none but those at hand-over and at the end.
    ``skip_nonfinite``: skip a step with NaN or Inf gradients, for all ranks alike, instead of failing.
    ``transport``: how gradients and parameters are rounded between workers and servers. ``mode``: who waits for whom.
    ``compression``: in how many bytes float32 gradients travel.
    """

    name: str
    ranks: int
    seed: int
    optimizer: dict[str, Any]
    layout: str
    """Fingerprint of the layout."""
    commit_every: int = COMMIT_EVERY_DEFAULT
    skip_nonfinite: bool = False
    transport: Transport = Transport.EXACT
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

        if self.compression != NONE and self.transport is not Transport.EXACT:
            raise UsageError(f"transport {self.transport} and compression {self.compression}: choose one of them")
        if self.compression.needs_residual and not self.mode.on_arrival:
            raise UsageError(
                f"compression {self.compression} in mode {self.mode}: what a rank holds back is lost with its worker, "
                "so the result could not be repeated. Use it in mode async or ssp, or use int8."
            )

    @property
    def commit_interval(self) -> int:
        """Versions between commits, 0 for none: a version is a step, or the update of one rank."""
        return self.commit_every * (self.ranks if self.mode.on_arrival else 1)

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
        return {
            **asdict(self),
            "transport": self.transport.value,
            "mode": str(self.mode),
            "compression": str(self.compression),
        }

    def to_json(self) -> str:
        return json.dumps(self.facts(), sort_keys=True)

    def must_agree_with(self, stored: JobConfig) -> None:
        """Refuse to join a job that is not the one this process was written for.

        Raises:
            JobMismatch: naming the first fact that differs, both values, and the way out.
        """
        ours, stored_facts = self.facts(), stored.facts()
        for what in (
            "ranks",
            "seed",
            "optimizer",
            "mode",
            "commit_every",
            "skip_nonfinite",
            "transport",
            "compression",
        ):
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
        facts["transport"] = Transport(facts.get("transport", Transport.EXACT))
        facts["mode"] = parse_mode(facts.get("mode", ModeName.SYNC))
        facts["compression"] = parse_compression(facts.get("compression", str(NONE)))
        return JobConfig(**facts)
    except (ValueError, TypeError, UsageError) as error:
        raise DataIntegrity(f"the stored job configuration cannot be read: {error}") from error


def check_job_name(name: str) -> str:
    """Return ``name`` if it can be part of Redis keys and znodes; raises UsageError if not."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"job name {name!r}: use up to 100 letters, digits, '_', '.' and '-'")
    return name
