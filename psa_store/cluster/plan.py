"""The plan: which server owns which shard, and which worker computes which cell. One small znode that a person can
read.

Pure: no I/O, no threads, no clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import groupby
from typing import ClassVar

from psa_store.errors import DataIntegrity, UsageError
from psa_store.job.document import ADDED_LATER, from_fields, to_fields

_BEFORE_STAGES = 2
"""The format of plans in which each rank was one cell."""
NUMBER_MAX = (1 << 53) - 1
"""Of terms, revisions and versions: Lua and JavaScript know no larger whole numbers."""
_OWNERS_MAX = 1 << 20
NO_WORKER = ""
"""Holder of a cell that no living worker computes."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One stage of one rank: the unit of computing. Cells are computed in this order. In a model of one stage it is a
    rank."""

    rank: int
    stage: int = 0


class Phase(StrEnum):
    RUN = "run"
    FREEZE = "freeze"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Server:
    """A shard owner as the plan names it, with what is needed to reach it."""

    id: str
    address: str
    local: str
    host: str


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a checkpoint is to be taken while training goes on: servers commit this, pin it, and enter the barrier."""

    name: str
    barrier: str
    version: int | None = None
    """None where pushes are applied on arrival: there workers say, for each rank, with which push it ends."""
    asked: bool = False
    """Whether it was requested: then it is over when its request goes."""
    named: bool = False
    """Whether a person gave the name."""


@dataclass(frozen=True, slots=True)
class JobShape:
    """What a plan of a job gives out: so many shards and cells, which never change."""

    shards: int
    ranks: int
    stages: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """One small znode. ``owners[s]`` is the index in ``servers`` of shard s's owner; ``cells[i]`` a worker's id.

    The cells of one stage are side by side, in the order of ranks: a worker that holds a run of them needs few stages.

    ``cells`` is as it is from version ``moved_at`` on; the steps before are computed as ``cells_before`` says. So a
    living worker ends what it has begun of a cell that goes to another one, and all processes know where that is.
    """

    FORMAT: ClassVar[int] = 3

    term: int
    revision: int
    """Grows with every plan that is written; ``term`` only when shards change hands."""
    resume: int
    """The version at which this term began."""
    servers: tuple[Server, ...]
    owners: tuple[int, ...]
    cells: tuple[str, ...]
    phase: Phase = Phase.RUN
    freeze_revision: int | None = None
    """FREEZE: the revision at which it began."""
    stop_version: int | None = None
    """STOP: the version to stop at."""
    cut: Cut | None = None
    """The checkpoint that is being taken."""
    stages: int = 1
    moved_at: int = field(default=0, metadata=ADDED_LATER)
    cells_before: tuple[str, ...] = field(default=(), metadata=ADDED_LATER)
    """As ``cells``; empty where no cell moves between two steps. All its workers have something of ``cells``, too."""

    def __post_init__(self) -> None:
        """Refuse what no controller writes: a plan that was read is then safe to follow."""
        for number in (self.term, self.revision, self.resume, self.moved_at):
            if not 0 <= number <= NUMBER_MAX:
                raise UsageError(f"{number} is no term, revision or version")
        if self.stages < 1 or len(self.cells) % self.stages:
            raise UsageError(f"{len(self.cells)} cells are not those of {self.stages} stages")
        if len(self.cells_before) != (len(self.cells) if self.moved_at else 0):
            raise UsageError(f"{len(self.cells_before)} cells before a move at version {self.moved_at}")
        if not set(self.cells_before) <= set(self.cells):
            raise UsageError("a worker has no cell any more after a move")
        if any(not 0 <= index < len(self.servers) for index in self.owners):
            raise UsageError("a shard belongs to a server that is not listed")

    @property
    def attended(self) -> bool:
        """Whether a worker holds a cell."""
        return any(holder != NO_WORKER for holder in self.cells)

    @property
    def ranks(self) -> int:
        """World size."""
        return len(self.cells) // self.stages

    def owner_of(self, shard: int) -> Server:
        return self.servers[self.owners[shard]]

    def shards_of(self, server: str) -> tuple[int, ...]:
        return tuple(shard for shard, index in enumerate(self.owners) if self.servers[index].id == server)

    def cells_at(self, step: int) -> tuple[str, ...]:
        """The workers that compute the cells of a step."""
        return self.cells if step >= self.moved_at else self.cells_before

    def holder(self, rank: int, stage: int = 0, step: int = NUMBER_MAX) -> str:
        """The worker that computes a cell in a step; in none that is named, from the last move on."""
        return self.cells_at(step)[stage * self.ranks + rank]

    def cells_of(self, worker: str, step: int = NUMBER_MAX) -> tuple[Cell, ...]:
        """Those that a worker computes, in their order."""
        ranks = self.ranks
        holders = self.cells_at(step)
        return tuple(sorted(Cell(i % ranks, i // ranks) for i, holder in enumerate(holders) if holder == worker))

    def ranks_of(self, worker: str, step: int = NUMBER_MAX) -> tuple[int, ...]:
        """Those of which a worker computes a stage at least."""
        return tuple(dict.fromkeys(cell.rank for cell in self.cells_of(worker, step)))

    def check(self, shape: JobShape) -> None:
        """Raise DataIntegrity if this is the plan of a job of another shape."""
        if len(self.owners) not in (0, shape.shards) or (self.ranks, self.stages) != (shape.ranks, shape.stages):
            raise DataIntegrity(
                f"a plan of {len(self.owners)} shards, {self.ranks} ranks and {self.stages} stages, but the job has "
                f"{shape.shards}, {shape.ranks} and {shape.stages}"
            )

    def begun_again(self, term: int, version: int) -> Plan:
        """The plan with which the same members go on in a new term, from this version."""
        return replace(
            self,
            term=term,
            revision=self.revision + 1,
            resume=version,
            phase=Phase.RUN,
            freeze_revision=None,
            stop_version=None,
            cut=None,
            moved_at=0,
            cells_before=(),
        )

    def to_json(self) -> str:
        fields = to_fields(self)
        fields["owners"] = [[index, len(list(run))] for index, run in groupby(self.owners)]
        return json.dumps(fields, indent=1)


def plan_from_json(text: str) -> Plan:
    """Rebuild a plan from :meth:`Plan.to_json`; raises DataIntegrity if the text is not a plan."""
    what = "the plan in ZooKeeper"
    try:
        fields = json.loads(text)
        if sum(abs(length) for _, length in fields["owners"]) > _OWNERS_MAX:
            raise ValueError(f"more than {_OWNERS_MAX} shards")
        fields["owners"] = [index for index, length in fields["owners"] for _ in range(length)]
        if fields["format"] == _BEFORE_STAGES:
            fields |= {"format": Plan.FORMAT, "cells": fields.pop("ranks")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataIntegrity(f"{what} cannot be read: {error!r}") from error
    return from_fields(Plan, fields, what)


def newest_common(versions: Mapping[int, Iterable[int]]) -> int | None:
    """The newest version that every shard has committed; ``versions`` maps shard index to its versions."""
    common = set.intersection(*(set(each) for each in versions.values())) if versions else set()
    return max(common, default=None)
