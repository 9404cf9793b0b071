"""What each server owns and each worker computes, and how many bytes a step sends, in a job of so many of both.

Averages over many steps: what is sent once in a round, or with a commit, counts for each step in between. Tensors only:
headers (64 bytes a frame) are left out, and so is what a death or a change of members costs.

Pure: no I/O, no threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psa_store.cluster import NO_WORKER, Member, assign_cells, assign_shards
from psa_store.consistency import RANK_OF_BUFFERS
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
class Traffic:
    """Of a job with every worker and server alive."""

    ranks: tuple[tuple[int, ...], ...]
    """By worker; a worker beyond the ranks stands by."""
    servers: tuple[ServerShare, ...]
    """A server beyond the shards owns nothing."""
    links: tuple[tuple[Link, ...], ...]
    """By worker and server."""

    @property
    def commit_bytes(self) -> int:
        return sum(server.commit_bytes for server in self.servers)


def pulls_per_version(config: JobConfig, held: Sequence[int]) -> int:
    """How often a worker with these ranks gets parameters: once for all ranks that wait for the same update."""
    return min(config.updates_per_step, len(held))


def traffic_of(config: JobConfig, layout: Layout, workers: int, servers: int, *, shares_memory: bool) -> Traffic:
    """What the job sends.

    ``shares_memory``: all are on one host, and a worker and a server share memory where the mode allows it.

    Raises:
        DataIntegrity: the optimizer cannot be read.
    """
    members = [Member(f"{index:08}", "", 0) for index in range(max(workers, servers))]
    sizes = [shard.size_bytes for shard in layout.shards]
    used, owners = assign_shards(sizes, members[:servers])
    holders = assign_cells((NO_WORKER,) * config.ranks, [member.id for member in members[:workers]])
    ranks = [tuple(r for r, holder in enumerate(holders) if int(holder) == worker) for worker in range(workers)]
    owned_shards = [
        [shard for shard, owner in zip(layout.shards, owners, strict=True) if used and int(used[owner].id) == server]
        for server in range(servers)
    ]
    ways = _Ways(config, layout, shares_memory)
    return Traffic(
        tuple(ranks),
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
                    sum(ways.up_bytes(shard, rank) for shard in own for rank in held),
                    sum(ways.down_bytes(shard) for shard in own) * pulls_per_version(config, held),
                )
                for own in owned_shards
            )
            for held in ranks
        ),
    )


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
