"""What each server owns and each worker computes, and how many bytes a step sends, in a job of so many of both.

Averages over many steps: what is sent once in a round, or with a commit, counts for each step in between. Tensors only:
headers (64 bytes a frame) are left out, and so is what a death or a change of members costs.

Pure: no I/O, no threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from psa_store.cluster import NO_WORKER, Cell, Member, Plan, assign_cells, assign_shards
from psa_store.consistency import RANK_OF_BUFFERS
from psa_store.consistency.residence import next_residence
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, Shard, TensorRole
from psa_store.job.wire_layout import WireLayout
from psa_store.observe.doctor.footprint import stored_bytes
from psa_store.optim.rank_state import rank_state_of


@dataclass(frozen=True, slots=True)
class Link:
    """Between one worker and one server. Bytes of a step, all ranks of the worker together."""

    up_bytes: float
    """From the worker: gradients (or movements), buffers, and rank state."""
    down_bytes: float
    """To the worker: parameters and buffers."""


@dataclass(frozen=True, slots=True)
class ServerShare:
    """What one server owns."""

    shards: int
    parameter_bytes: int
    """Of all its shards, buffers and frozen ones included."""
    commit_bytes: int
    """What it writes to Redis with each commit."""


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """What one worker computes, and what it needs memory for at least: activations and the script's own come on top."""

    cells: tuple[Cell, ...]
    """A worker beyond the cells stands by."""
    parameter_bytes: int
    """Of the stages that it has a cell of, or of the largest of them that are in memory together, buffers and frozen
    ones included."""
    gradient_bytes: int
    """Of a gradient of each of those stages."""
    loads: tuple[int, ...] = ()
    """The stages that are loaded in a step, each as often as it is, as not all are in memory at once."""
    twice: int = 0
    """Cells of which the forward passes are made twice."""

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(cell.rank for cell in self.cells))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of a job with every worker and server alive."""

    workers: tuple[WorkerShare, ...]
    servers: tuple[ServerShare, ...]
    """A server beyond the shards owns nothing."""
    links: tuple[tuple[Link, ...], ...]
    """By worker and server."""
    cuts: int
    """Places, in all ranks together, at which one stage is with another worker than the next."""

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """By worker, those of which it computes a stage at least."""
        return tuple(worker.ranks for worker in self.workers)

    @property
    def commit_bytes(self) -> int:
        return sum(server.commit_bytes for server in self.servers)


def pulls_per_version(config: JobConfig, held: Sequence[int]) -> int:
    """How often a worker with these ranks gets parameters: once for all ranks that wait for the same update."""
    return min(config.updates_per_step, len(held))


def traffic_of(
    config: JobConfig,
    layout: Layout,
    workers: int,
    servers: int,
    *,
    shares_memory: bool,
    resident_stages: int | None = None,
) -> Traffic:
    """What the job sends.

    ``shares_memory``: all are on one host, and a worker and a server share memory where the mode allows it.
    ``resident_stages``: how many a worker has in memory at once; None: all that it computes.

    Raises:
        DataIntegrity: the optimizer cannot be read.
    """
    members = [Member(f"{index:08}", "", 0) for index in range(max(workers, servers))]
    sizes = [shard.size_bytes for shard in layout.shards]
    used, owners = assign_shards(sizes, members[:servers])
    cells = assign_cells((NO_WORKER,) * config.cells, [member.id for member in members[:workers]])
    plan = Plan(0, 0, 0, (), (), cells, stages=config.stages)
    most = resident_stages or config.stages
    residences = [_residences(plan.cells_of(member.id), most) for member in members[:workers]]
    shares = [_share(layout, plan.cells_of(member.id), each) for member, each in zip(members, residences, strict=False)]
    owned_shards = [
        [shard for shard, owner in zip(layout.shards, owners, strict=True) if used and int(used[owner].id) == server]
        for server in range(servers)
    ]
    ways = _Ways(config, layout, shares_memory)
    return Traffic(
        tuple(shares),
        tuple(
            ServerShare(
                len(own),
                sum(shard.size_bytes for shard in own),
                sum(stored_bytes(config, shard) for shard in own if shard.role is not TensorRole.FROZEN),
            )
            for own in owned_shards
        ),
        tuple(
            tuple(
                Link(
                    sum(ways.up_bytes(s, cell.rank) for s in own for cell in share.cells if cell.stage == s.home),
                    sum(ways.down_bytes(shard) for shard in _needed(each.kept, own))
                    * pulls_per_version(config, share.ranks)
                    + sum(shard.size_bytes for stage in share.loads for shard in _needed([stage], own)),
                )
                for own in owned_shards
            )
            for share, each in zip(shares, residences, strict=True)
        ),
        sum(plan.holder(r, s) != plan.holder(r, s + 1) for r in range(config.ranks) for s in range(config.stages - 1)),
    )


@dataclass(frozen=True, slots=True)
class _Residences:
    """How a worker comes through a step, with so many stages in memory at once."""

    together: tuple[tuple[int, ...], ...]
    """Those that are there together, one after the other."""
    loads: tuple[int, ...] = ()
    twice: int = 0

    @property
    def kept(self) -> tuple[int, ...]:
        """Those that are there between two steps: they come with the version."""
        return self.together[-1]


def _residences(cells: tuple[Cell, ...], most: int) -> _Residences:
    stages = tuple(sorted({cell.stage for cell in cells}))
    if len(stages) <= most:
        return _Residences((stages,))
    together, loads, twice = [tuple[int, ...]()], list[int](), 0
    for _ in range(2):  # the second time it begins as the step before ends
        here = set(together[-1])
        together, loads, twice = [], [], 0
        for rank in dict.fromkeys(cell.rank for cell in cells):
            left = [cell.stage for cell in cells if cell.rank == rank]
            forwarded = set[int]()
            while left:
                due = next_residence(left, forwarded, most)
                loads += sorted(set(due.stages) - here)
                both = here.union(due.stages)
                here = both if len(both) <= most else set(due.stages)
                together.append(tuple(sorted(here)))
                if due.backward:
                    left = [stage for stage in left if stage not in due.stages]
                    twice += len(forwarded.intersection(due.stages))
                else:
                    forwarded.update(due.stages)
    return _Residences(tuple(together), tuple(loads), twice)


def _share(layout: Layout, cells: tuple[Cell, ...], residences: _Residences) -> WorkerShare:
    needed = [_needed(stages, layout.shards) for stages in residences.together]
    return WorkerShare(
        cells,
        max(sum(shard.size_bytes for shard in each) for each in needed),
        max(sum(shard.size_bytes for shard in each if shard.role is TensorRole.TRAINED) for each in needed),
        residences.loads,
        residences.twice,
    )


def _needed(stages: Iterable[int], shards: Iterable[Shard]) -> list[Shard]:
    """Those of these stages."""
    wanted = set(stages)
    return [shard for shard in shards if not wanted.isdisjoint(shard.stages)]


class _Ways:
    """How a shard travels in this job."""

    def __init__(self, config: JobConfig, layout: Layout, shares_memory: bool) -> None:
        self._config = config
        self._wire = WireLayout(layout, config.compression)
        self._shares = shares_memory and config.shares_memory

    def up_bytes(self, shard: Shard, rank: int) -> float:
        """What one rank sends of a shard, per step."""
        config = self._config
        match shard.role:
            case TensorRole.FROZEN:
                return 0.0
            case TensorRole.BUFFER:
                pushes = config.pushes_all_buffers or rank == RANK_OF_BUFFERS
                return shard.size_bytes / config.steps_per_version if pushes else 0.0
        kept = rank_state_of(config, shard)
        state = 0.0 if kept is None else kept.size_bytes / (config.commit_interval * config.steps_per_version)
        if config.compression.applies_to(shard.dtype):
            return config.compression.payload_bytes(shard.numel) / config.steps_per_exchange + state
        return (0.0 if self._shares else self._wire.size_bytes(shard) / config.steps_per_exchange) + state

    def down_bytes(self, shard: Shard) -> float:
        """What a worker receives of a shard each time that it gets parameters, per step."""
        config = self._config
        match shard.role:
            case TensorRole.FROZEN:
                return 0.0
            case TensorRole.BUFFER:
                return shard.size_bytes / config.steps_per_version
        if config.publishes_movements and config.compression.applies_to(shard.dtype):
            return config.compression.payload_bytes(shard.numel) / config.steps_per_exchange
        shared = self._shares and config.shares_parameters
        return 0.0 if shared else self._wire.size_bytes(shard) / config.steps_per_exchange
