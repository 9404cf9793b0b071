"""What compression has held back of gradients, by cell: added to the next gradient, and kept by servers as rank state.

Of each cell held here there are two: what was held back up to the present version, and up to the next, which its step
makes of it. So a step can be made again until the next version is here. Cells stay in their workers from one term to
the next, so what servers keep is read where a term begins.

Used by the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor

from psa_store.cluster import Cell
from psa_store.job.layout import Shard
from psa_store.optim.rank_state import RESIDUAL
from psa_store.worker.batches import RankStep
from psa_store.worker.rank_state import RankMemory, RankStates
from psa_store.worker.server_connections import Answer
from psa_store.worker.session import PlanSession, Tools


class Residuals:
    """Of the cells that the plan gives to this worker; of none, where the compression holds nothing back."""

    def __init__(self, tools: Tools, session: PlanSession) -> None:
        self._shards = tools.layout.shards
        self._session = session
        self._states = RankStates(tools, session)
        self._present: Mapping[int, RankMemory] = {}
        """By rank, up to the present version, for the shards of its stages held here ..."""
        self._next: Mapping[int, RankMemory] = {}
        """... and up to the next."""
        self._version = 0
        self._since: int | None = None
        """The term in which that began."""

    def load(self, term: int, version: int) -> bool:
        """Begin a term, or the present one again, at a version; False if the term is over before."""
        if not self._states.kept or self._since == term:
            return True
        self._present, self._next = self._new(), self._new()
        if not self._states.pull(version, self._present):
            return False
        self._since, self._version = term, version
        return True

    def shown(self, version: int) -> None:
        """The model has this version: the one that was there, or the next."""
        if version == self._version + 1:
            self._present, self._next = self._next, self._present
        self._version = version

    def of(self, rank: int, shard: Shard) -> Tensor | None:
        """A copy of what a rank has held back of a shard, to be changed into that of the next version; None: nothing
        is kept."""
        if rank not in self._present:
            return None
        place = self._next[rank].parts[shard.index][RESIDUAL]
        return place.copy_(self._present[rank].parts[shard.index][RESIDUAL])

    def state_of(self, rank_step: RankStep) -> Mapping[int, Callable[[], Tensor]]:
        """By shard, what its push brings of the rank's state; nothing where that is not due."""
        if not self._states.kept or not self._states.are_due(rank_step.step + 1):
            return {}
        memory = self._next[rank_step.rank]
        return {shard: partial(self._states.pack, shard, memory) for shard in memory.parts}

    def take(self, answer: Answer) -> None:
        """A server has answered with what it keeps."""
        self._states.take(answer)

    def _new(self) -> dict[int, RankMemory]:
        """Of nothing that was held back."""
        cells = self._session.cells
        return {rank: self._memory_of(rank, cells) for rank in self._session.held}

    def _memory_of(self, rank: int, cells: Collection[Cell]) -> RankMemory:
        kept = {i: s for i, s in self._states.kept.items() if Cell(rank, self._shards[i].home) in cells}
        return RankMemory({i: {RESIDUAL: torch.zeros(state.numel)} for i, state in kept.items()})
