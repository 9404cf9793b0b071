"""What a worker does in a mode: one strategy each for ``sync``, its stages, ``async`` and ``ssp``, ``local``."""

from psa_store.worker.flat_model import FlatModel
from psa_store.worker.session import Tools
from psa_store.worker.stages import StagedModel
from psa_store.worker.strategy.async_ import AsyncStrategy
from psa_store.worker.strategy.base import Strategy
from psa_store.worker.strategy.local_sgd import LocalSGDStrategy
from psa_store.worker.strategy.staged import StagedStrategy
from psa_store.worker.strategy.sync import SyncStrategy

__all__ = ["Strategy", "strategy_of"]


def strategy_of(tools: Tools, model: FlatModel | StagedModel, *, may_share: bool) -> Strategy:
    """The strategy of the job's mode. ``may_share``: memory may be shared with servers of this host."""
    mode = tools.config.mode
    if may_share and tools.config.shares_memory:
        tools.servers.share_memory()
    if isinstance(model, StagedModel):
        return StagedStrategy(tools, model)
    if mode.on_arrival:
        return AsyncStrategy(tools, model)
    return LocalSGDStrategy(tools, model) if mode.in_rounds else SyncStrategy(tools, model)
