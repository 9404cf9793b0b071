"""How long a step takes beside the computation of gradients, from what it moves and how fast this machine moves it.

Everything is taken to be on this machine, and nothing to overlap: in truth gradients travel during backward already.
What the script computes is not known here.

Pure: no I/O, no threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psa_store.estimate.traffic import ServerShare, Traffic, pulls_per_version
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, TensorRole
from psa_store.server.aggregator.base import INLINE_BYTES

LINK_S = 1.2e-3
"""Processor time of one worker and one server that exchange a step, whatever its size: frames, wake-ups, Python. As
``psa bench --megabytes 0.01`` shows it on two cores of an ordinary machine: 1.2 ms a step with two workers, 2.4 with
four."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of this machine, one thread each; seconds are per element of the job's trained parameters."""

    cores: int
    copy_bytes_per_s: float
    wire_bytes_per_s: float
    """TCP to this machine itself: one sender, one receiver."""
    check_s: float
    """Looking for NaN in a gradient."""
    encode_s: float
    """Compressing a gradient; 0 without compression, and so is ``decode_s``."""
    decode_s: float
    update_s: float
    """The servers' update with the gradient of one rank, its norm included where it is clipped."""
    part_s: float
    """What each further rank adds to that."""
    local_update_s: float
    """In rounds: the update that a rank makes by itself; else 0."""
    redis_bytes_per_s: float | None
    """What Redis takes in over one connection; None if it was not measured."""


@dataclass(frozen=True, slots=True)
class Term:
    """A part of a step."""

    what: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one step; in rounds, the average over a round."""

    terms: tuple[Term, ...]
    commit_s: float | None
    """How long a commit takes to be written, in the background; None if that is not known."""
    commit_interval_steps: float
    """0: no commits."""

    @property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.terms)


def forecast(
    config: JobConfig, layout: Layout, traffic: Traffic, speeds: Speeds, threads: int, compute_s: float
) -> Forecast:
    """What a step costs.

    Args:
        threads: of each server.
        compute_s: forward and backward of all ranks, as it is without psa; 0 leaves it out.
    """
    busy_workers = sum(1 for held in traffic.ranks if held)
    owners = [server for server in traffic.servers if server.shards]
    trained = sum(shard.numel for shard in layout.shards_of(TensorRole.TRAINED))
    per_worker = min(speeds.cores, max(1, busy_workers))
    per_server = min(speeds.cores, max(1, sum(_threads(server, threads) for server in owners)))
    pushed = config.ranks * trained / config.steps_per_exchange  # elements, by all ranks in a step
    exchanges = sum(pulls_per_version(config, held) for held in traffic.ranks) / config.steps_per_version
    up = [[link.up_bytes for link in links] for links in traffic.links]
    down = [[link.down_bytes for link in links] for links in traffic.links]

    encoding = pushed * (speeds.check_s + speeds.encode_s) / per_worker
    updated = trained * config.updates_per_step / config.steps_per_exchange
    update = updated * (speeds.update_s + (config.gradients_per_update - 1) * speeds.part_s)
    terms = [
        Term("workers: check, compress" if speeds.encode_s else "workers: check", encoding),
        Term("gradients travel", _travel_s(up, speeds)),
        Term("servers: reduce, update", (update + pushed * speeds.decode_s) / per_server),
        Term("parameters travel", _travel_s(down, speeds)),
        Term("messages", LINK_S * exchanges * len(owners) / speeds.cores),
    ]
    if config.ranks_update:
        terms.insert(0, Term("ranks: own update", config.ranks * trained * speeds.local_update_s / per_worker))
    interval = config.commit_every * config.steps_per_version
    commit_s = None if speeds.redis_bytes_per_s is None else traffic.commit_bytes / speeds.redis_bytes_per_s
    if interval:
        terms.append(Term("copies for commits", traffic.commit_bytes / speeds.copy_bytes_per_s / per_server / interval))
    if compute_s:
        terms.insert(0, Term("compute, as you say", compute_s))
    if interval and commit_s is not None:
        waits = commit_s / interval - sum(term.seconds for term in terms)
        if waits > 0:
            terms.append(Term("waiting for Redis", waits))
    return Forecast(tuple(terms), commit_s, interval)


def _threads(server: ServerShare, threads: int) -> int:
    return 1 if server.parameter_bytes < INLINE_BYTES else min(threads, server.shards)


def _travel_s(sent: Sequence[Sequence[float]], speeds: Speeds) -> float:
    """A stream keeps two cores busy, one at each end, and no process sends or receives two at a time.

    ``sent``: bytes, by worker and server.
    """
    busiest = max([*map(sum, sent), *map(sum, zip(*sent, strict=True))], default=0.0)
    streams = max(1, speeds.cores // 2)
    return max(busiest, sum(map(sum, sent)) / streams) / speeds.wire_bytes_per_s
