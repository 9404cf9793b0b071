"""What a worker does in a mode: one strategy each for ``sync``, ``async`` and ``ssp``, ``local``."""

from psa_store.worker.session import Tools
from psa_store.worker.strategy.async_ import AsyncStrategy
from psa_store.worker.strategy.base import Strategy
from psa_store.worker.strategy.local_sgd import LocalSGDStrategy
from psa_store.worker.strategy.sync import SyncStrategy

__all__ = ["Strategy", "strategy_of"]


def strategy_of(tools: Tools, *, may_share: bool) -> Strategy:
    """The strategy of the job's mode. ``may_share``: memory may be shared with servers of this host."""
    mode = tools.config.mode
    if may_share and tools.config.shares_memory:
        tools.servers.share_memory()
    if mode.on_arrival:
        return AsyncStrategy(tools)
    return LocalSGDStrategy(tools) if mode.in_rounds else SyncStrategy(tools)
