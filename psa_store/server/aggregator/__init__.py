"""What a server does with gradients, by mode: a step of all ranks at once, or each push as it arrives."""

from __future__ import annotations

from collections.abc import Mapping

from psa_store.cluster import Plan
from psa_store.optim.history import OptimizerHistory
from psa_store.server.aggregator.async_ import AsyncAggregator
from psa_store.server.aggregator.base import Aggregator, Tools
from psa_store.server.aggregator.rules import Rules, rules_of
from psa_store.server.aggregator.sync import SyncAggregator
from psa_store.server.shard import OwnedShard

__all__ = ["Aggregator", "Rules", "Tools", "make_aggregator", "rules_of"]


def make_aggregator(
    tools: Tools, plan: Plan, owned_shards: Mapping[int, OwnedShard], history: OptimizerHistory
) -> Aggregator:
    """The aggregator of this job's mode, for the shards of one term."""
    if tools.config.mode.on_arrival:
        return AsyncAggregator(tools, plan, owned_shards)
    return SyncAggregator(tools, plan, owned_shards, history)
