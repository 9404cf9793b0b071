"""What the committer is given to make durable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from psa_store.cluster import Cut
from psa_store.server.shard import OwnedShard


@dataclass(frozen=True, slots=True)
class Work:
    """The snapshots of ``owned_shards`` are version ``version``; write them under ``term``.

    ``frozen`` is what this server owns besides, which was committed when the job was created. ``pin``: the checkpoint
    for which this version is to be kept. It is pinned before the next commit, which might drop it. ``extra``: not all
    servers may commit it.
    """

    term: int
    version: int
    owned_shards: Mapping[int, OwnedShard]
    frozen: Mapping[int, OwnedShard]
    pin: Cut | None = None
    extra: bool = False
