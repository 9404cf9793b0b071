"""What a job *is*: the facts that are fixed when it is created and that every later process must agree with.

Pure: no I/O, no threads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, PlainSerializer

from psa_store.compression import NONE, Compression, parse_compression
from psa_store.errors import JobMismatch, UsageError
from psa_store.job.average import Average
from psa_store.job.change import OPTIMIZER_NUMBERS, Change
from psa_store.job.document import ADDED_LATER, from_text, to_fields, to_text
from psa_store.job.mode import SYNC, Mode, parse_mode

COMMIT_EVERY_DEFAULT = 50
COMMIT_EVERY_ON_ARRIVAL = 4
"""The default where pushes are applied on arrival: workers keep each gradient until it is durable."""
COMMIT_EVERY_ROUNDS = 10
"""The default in rounds: with each commit ranks send their state, and a worker's death costs the rounds since."""
SHARD_VERSIONS_KEPT = 3
"""Versions of a shard that Redis keeps. Three suffice for a common one to exist at any moment: a server starts the
commit of version v+K only when its own commit of v is done, so the heads of two servers are never further apart than
one finished and one unfinished commit."""
SHARD_VERSIONS_KEPT_ON_ARRIVAL = 5
"""There a server may also be ahead of another by one push of every rank, which can be one commit more, and commit where
a hand-over was called off."""

STAGES_MAX = 32
"""A worker names those that it holds in a word of 32 bits."""
RUN_NODE = "run"
"""Name that a `psa run` holds in ZooKeeper while it lasts; the text begins with the id of the run."""
CREATOR_NODE = "creator"
"""Name that a process holds in ZooKeeper while it creates the job."""

_Value = TypeVar("_Value")


def _read_with(parse: Callable[[str], _Value]) -> BeforeValidator:
    """Read a field from its text; a value that has been read already stays as it is."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


_AS_TEXT = PlainSerializer(str)
_AGREED = (
    "ranks",
    "stages",
    "microbatches",
    "seed",
    "mode",
    "commit_every",
    "skip_nonfinite",
    "compression",
    "average",
)
"""What a process must have as it is stored; the layout is compared before, tensor by tensor."""


def commit_every_default(mode: Mode) -> int:
    """Steps (in rounds: rounds) between commits of a job that does not say it."""
    if mode.in_rounds:
        return COMMIT_EVERY_ROUNDS
    return COMMIT_EVERY_ON_ARRIVAL if mode.on_arrival else COMMIT_EVERY_DEFAULT


_SHOWN_MAX = 120
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class JobConfig:
    """The fixed facts of one named training run: a document, kept in Redis and in ZooKeeper.

    ``ranks``: logical data-parallel world size. ``optimizer``: as ``psa.optim`` writes it (names and numbers, no
    code). ``commit_every``: versions between commits, 0 for none but those at hand-over and at the end; on arrival,
    steps of all ranks.
    ``skip_nonfinite``: skip a step with NaN or Inf gradients, for all ranks alike, instead of failing.
    ``mode``: which ranks wait for which. ``compression``: in how many bytes float32 travels. ``average``: of the
    parameters, kept by servers; None for none.
    """

    FORMAT: ClassVar[int] = 1

    name: str
    ranks: int
    seed: int
    optimizer: dict[str, Any]
    layout: str
    """Fingerprint of the layout."""
    commit_every: int = COMMIT_EVERY_DEFAULT
    skip_nonfinite: bool = False
    mode: Annotated[Mode, _read_with(parse_mode), _AS_TEXT] = SYNC
    compression: Annotated[Compression, _read_with(parse_compression), _AS_TEXT] = NONE
    average: Average | None = field(default=None, metadata=ADDED_LATER)
    changes: tuple[Change, ...] = field(default=(), metadata=ADDED_LATER)
    """Of numbers of the optimizer and of the loop, since the job began; each counts from a step on."""
    stages: int = field(default=1, metadata=ADDED_LATER)
    """Parts of the model; a worker computes cells, each a stage of a rank."""
    microbatches: int = field(default=1, metadata=ADDED_LATER)
    """Equal parts in which a rank's batch goes through the stages."""

    def __post_init__(self) -> None:
        check_job_name(self.name)
        if not 1 <= self.ranks <= 65536:
            raise UsageError(f"ranks={self.ranks}: must be between 1 and 65536")
        if not 1 <= self.stages <= STAGES_MAX:
            raise UsageError(f"stages={self.stages}: must be between 1 and {STAGES_MAX}")
        if not 1 <= self.microbatches <= 65535:
            raise UsageError(f"microbatches={self.microbatches}: must be between 1 and 65535")
        if self.is_staged and not (self.weighs_ranks and not self.mode.may_miss_versions):
            raise UsageError(f"mode {self.mode} with stages: only sync goes with them, without backup and speculate")
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
    def is_staged(self) -> bool:
        """Whether the model is trained in parts: a script gives stages, and calls ``worker.compute()``."""
        return self.stages > 1 or self.microbatches > 1

    @property
    def cells(self) -> int:
        """How many there are: each stage of each rank."""
        return self.ranks * self.stages

    @property
    def bubble(self) -> float:
        """The share of time in which a worker waits for others, with one worker for each cell and stages of equal cost.

        Source: of M + S - 1 turns M are used, with 1F1B as with GPipe, https://arxiv.org/abs/2104.04473, section 2.2.
        """
        return (self.stages - 1) / (self.microbatches + self.stages - 1)

    def step_of(self, version: int) -> int:
        """How many steps each rank has made at a version; on arrival, in the mean."""
        return version * self.steps_per_version // self.updates_per_step

    @property
    def updates_per_step(self) -> int:
        """How often a shard is updated while each rank makes one step, in rounds: one round."""
        return self.ranks if self.mode.on_arrival else 1

    @property
    def gradients_per_update(self) -> int:
        """Of how many ranks an update takes the mean."""
        return 1 if self.mode.on_arrival else self.ranks - self.mode.backup

    @property
    def steps_per_version(self) -> int:
        """Steps that a rank makes from one version to the next: several in rounds."""
        return self.mode.round_steps

    @property
    def steps_per_exchange(self) -> int:
        """Steps that a rank makes between two pushes of one shard."""
        return self.mode.steps

    @property
    def commit_interval(self) -> int:
        """Versions between commits, 0 for none: a version is a step, or the update of one rank."""
        return self.commit_every * self.updates_per_step

    @property
    def clocks(self) -> int:
        """How many ranks each shard counts the steps of: all where they may be at different steps, else none."""
        return self.ranks if self.mode.on_arrival else 0

    @property
    def window(self) -> int:
        """How many gradients of a rank may wait for being durable, before the rank must wait.

        On arrival one rank alone must be able to reach the next commit while another does not move, and go on during
        it. Elsewhere a step is one gradient of each rank.
        """
        return 2 * self.commit_interval if self.mode.on_arrival else 1

    @property
    def shards_keep_step(self) -> bool:
        """Whether all shards are at one version while a rank computes."""
        return not self.mode.on_arrival

    @property
    def shares_memory(self) -> bool:
        """Whether workers and servers of one host share the memory of gradients, and of parameters if these stay."""
        return not self.mode.by_value

    @property
    def shares_parameters(self) -> bool:
        """The same for parameters: on arrival they change while workers compute, and are sent also within a host."""
        return self.shares_memory and not self.mode.on_arrival

    @property
    def weighs_ranks(self) -> bool:
        """Whether a version is made of a mean over ranks in which one may count more than another."""
        return not (self.mode.on_arrival or self.mode.in_rounds)

    @property
    def keeps_script_state(self) -> bool:
        """Whether one worker alone makes what a version has of rank 0, and all see it with the version."""
        return self.weighs_ranks and not self.mode.may_miss_versions

    @property
    def pushes_all_buffers(self) -> bool:
        """Whether each rank pushes buffers: it is not known in time whose push counts."""
        return self.mode.on_arrival or self.mode.backup > 0

    @property
    def ranks_update(self) -> bool:
        """Whether each rank applies the job's optimizer by itself, and servers apply another one."""
        return self.mode.in_rounds

    @property
    def ranks_drift(self) -> bool:
        """Whether a rank has parameters of its own from version to version."""
        return self.mode.in_rounds and (self.mode.fragments > 1 or self.mode.overlap)

    @property
    def server_optimizer(self) -> Mapping[str, Any]:
        """What servers apply, as ``psa.optim`` writes it."""
        return self.mode.server_optimizer(self.optimizer)

    @property
    def keeps_rank_state(self) -> bool:
        """Whether the rank state is kept with every regular commit.

        Then the bits do not depend on which worker computes a rank: the next one begins with what was committed. On
        arrival the state is lost with its worker.
        """
        if self.mode.on_arrival or self.mode.forget:
            return False
        return self.mode.in_rounds or self.compression.needs_residual

    @property
    def publishes_movements(self) -> bool:
        """Whether parameters travel encoded, too: each version as what it adds to the one before."""
        return self.mode.in_rounds and self.compression.encodes

    @property
    def ranks_stay(self) -> bool:
        """Whether ranks go to other workers between terms only, because they have state."""
        return self.mode.in_rounds or self.keeps_rank_state

    def rank_state_is_due(self, version: int) -> bool:
        """Whether the push that makes ``version`` brings the rank's state, too."""
        return self.keeps_rank_state and version % self.commit_interval == 0

    @property
    def ranks_cut_checkpoints(self) -> bool:
        """Whether workers say, for each rank, with which push a checkpoint ends; else it is cut at a version."""
        return self.mode.on_arrival

    @property
    def versions_kept(self) -> int:
        """Versions of a shard that Redis keeps."""
        return SHARD_VERSIONS_KEPT_ON_ARRIVAL if self.mode.on_arrival else SHARD_VERSIONS_KEPT

    def check_shards(self, trained: int) -> None:
        """Raise UsageError if the mode cannot share out so many trained shards."""
        if self.mode.fragments > max(1, trained):
            raise UsageError(
                f"mode {self.mode}: this model has {trained} trained shards, so use at most {trained} fragments"
            )

    def check_steps(self, steps: int) -> None:
        """Raise UsageError if the job can not end there."""
        if steps % self.mode.steps:
            raise UsageError(
                f"steps={steps}: mode {self.mode} ends after whole rounds; use a multiple of {self.mode.steps}"
            )

    def facts(self) -> dict[str, Any]:
        """All of it as JSON knows it."""
        return to_fields(self)

    def to_json(self) -> str:
        return to_text(self)

    def must_agree_with(self, stored: JobConfig) -> None:
        """Refuse to join a job that is not the one this process was written for.

        Raises:
            JobMismatch: naming the first fact that differs, both values, and the way out.
        """
        ours, stored_facts = self.facts(), stored.facts()
        self._must_agree_on_optimizer(stored)
        for what in _AGREED:
            mine, theirs = ours.get(what), stored_facts.get(what)
            if what == "average" and theirs is None and mine is not None:
                raise JobMismatch(
                    f"job {self.name!r} exists without an average, this process has average={mine!r}. "
                    "One begins with its job: leave average= out, or use another job name to start over."
                )
            if mine != theirs:
                raise JobMismatch(
                    f"job {self.name!r} exists with {what}={theirs!r}, this process has {what}={mine!r}. "
                    f"Use the stored value, or another job name to start over."
                )

    def _must_agree_on_optimizer(self, stored: JobConfig) -> None:
        """A script may say what the job began with, or what it has now."""
        mine, theirs = self.facts()["optimizer"], stored.facts()["optimizer"]
        now = theirs
        for change in stored.changes:
            now = change.applied_to(now)
        if mine in (theirs, now):
            return
        wrong = [name for name in {**theirs, **mine} if mine.get(name) != now.get(name)]
        first = wrong[0] if "name" not in wrong else "name"
        what = "optimizer" if first == "name" else first
        way = ""
        if all(name in OPTIMIZER_NUMBERS for name in wrong):
            to_set = " ".join(f"{name}={mine.get(name) or 0}" for name in wrong)
            way = f"`psa job set {self.name} {to_set}` changes it from now on. "
            if any(isinstance(mine.get(name), dict) for name in wrong):
                way = f"`psa job set {self.name} lr=…` gives it another constant rate from now on. "
        raise JobMismatch(
            f"job {self.name!r} exists with {what}={_shown(now.get(first))}, this process has "
            f"{what}={_shown(mine.get(first))}. "
            f"{way}Use the stored value, or another job name to start over."
        )


def _shown(value: object) -> str:
    """A value for an error; a schedule may be long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_MAX else f"{text[: _SHOWN_MAX - 2]} …"


def job_config_from_json(text: str, what: str = "the stored job configuration") -> JobConfig:
    """Rebuild a job's facts from :meth:`JobConfig.to_json`; raises DataIntegrity, naming ``what``, if it is no such."""
    return from_text(JobConfig, text, what)


def check_job_name(name: str) -> str:
    """Return ``name`` if it can be part of Redis keys and znodes; raises UsageError if not."""
    return check_name(name, "job name")


def is_name(name: str) -> bool:
    """Whether it can be part of Redis keys and znodes."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str, what: str) -> str:
    """The same for the name of ``what``."""
    if not is_name(name):
        raise UsageError(
            f"{what} {name!r}: use up to 100 letters, digits, '_', '.' and '-', the first a letter or digit"
        )
    return name
