"""Who owns and computes what in a job of so many workers and servers, and how many bytes a step sends where.

Averages over many steps: what is sent once in a round, or with a commit, counts for each step in between. Tensors only:
headers (64 bytes a frame) are left out, and so is what a death or a change of members costs.

Pure: no I/O, no threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from psa_store.cluster import NOBODY, Member, assign_ranks, assign_shards
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
    """From the worker: gradients (or movements), buffers, and what its ranks carry."""
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


def traffic_of(config: JobConfig, layout: Layout, workers: int, servers: int, *, shares_memory: bool) -> Traffic:
    """What the job sends.

    ``shares_memory``: all are on one host, and a worker and a server share memory where the mode allows it.

    Raises:
        DataIntegrity: the optimizer cannot be read.
    """
    members = [Member(f"{index:08}", "", 0) for index in range(max(workers, servers))]
    sizes = [shard.size_bytes for shard in layout.shards]
    used, owners = assign_shards(sizes, members[:servers])
    holders = assign_ranks((NOBODY,) * config.ranks, [member.id for member in members[:workers]])
    ranks = [tuple(r for r, holder in enumerate(holders) if int(holder) == worker) for worker in range(workers)]
    led = [
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
            for own in led
        ),
        tuple(
            tuple(
                Link(
                    sum(ways.up_bytes(shard, rank) for shard in own for rank in held),
                    sum(ways.down_bytes(shard) for shard in own) * _fetches(config, held),
                )
                for own in led
            )
            for held in ranks
        ),
    )


def _fetches(config: JobConfig, held: tuple[int, ...]) -> int:
    """How often a worker gets parameters in a step: on arrival each of its ranks does, else all of them together."""
    return len(held) if config.mode.on_arrival else min(1, len(held))


class _Ways:
    """How a shard travels in this job."""

    def __init__(self, config: JobConfig, layout: Layout, shares_memory: bool) -> None:
        self._config = config
        self._wire = WireLayout(layout, config.compression)
        self._shares = shares_memory and not config.mode.by_value

    def up_bytes(self, shard: Shard, rank: int) -> float:
        """What one rank sends of a shard, per step."""
        config, mode = self._config, self._config.mode
        match shard.role:
            case TensorRole.FROZEN:
                return 0.0
            case TensorRole.BUFFER:
                # Elsewhere it is not known in time whose push counts.
                all_send = mode.on_arrival or mode.backup > 0
                return shard.size_bytes / mode.round_steps if all_send or rank == RANK_OF_BUFFERS else 0.0
        carried = rank_state_of(config, shard)
        state = 0.0 if carried is None else carried.size_bytes / (config.commit_interval * mode.round_steps)
        if config.compression.applies_to(shard.dtype):
            return config.compression.payload_bytes(shard.numel) / mode.steps + state
        return (0.0 if self._shares else self._wire.size_bytes(shard) / mode.steps) + state

    def down_bytes(self, shard: Shard) -> float:
        """What a worker receives of a shard each time that it gets parameters, per step."""
        config, mode = self._config, self._config.mode
        match shard.role:
            case TensorRole.FROZEN:
                return 0.0
            case TensorRole.BUFFER:
                return shard.size_bytes / mode.round_steps
        if config.publishes_movements and config.compression.applies_to(shard.dtype):
            return config.compression.payload_bytes(shard.numel) / mode.steps
        # On arrival parameters change while workers compute: they are sent, also within a host.
        shared = self._shares and not mode.on_arrival
        return 0.0 if shared else self._wire.size_bytes(shard) / mode.steps
