"""How the parameters of stages come to a worker: those of a term's beginning, and of stages that come in a step.

Used by the worker, in the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from psa_store.cluster import Plan
from psa_store.job.layout import Layout, Shard, TensorRole
from psa_store.worker.session import PlanSession
from psa_store.worker.stages import StagedModel


class StageLoading:
    """Brings stages of ``model`` to one version."""

    def __init__(self, layout: Layout, session: PlanSession, model: StagedModel) -> None:
        self._layout = layout
        self._session = session
        self._model = model

    def wanted(self, step: int) -> set[int]:
        """The stages of the cells here in a step and after it, or those of them that can be in memory at once; rather
        what is there."""
        cells = (*self._session.cells_at(step), *self._session.cells)
        stages, most = {cell.stage for cell in cells}, self._model.resident_max
        if most is None or len(stages) <= most:
            return stages
        return stages.intersection(self._model.stages) or set(sorted(stages)[:most])

    def begin(self, plan: Plan, known: int) -> int | None:
        """Have what is wanted at one version of this term; returns it, or None if the term is over before.

        ``known``: the newest version that this worker knows of.
        """
        session, model = self._session, self._model
        model.hold(self.wanted(known))
        newest, wanted = -1, plan.resume
        while newest < wanted:
            newest = wanted
            if not self._pull(model.stages, newest):
                return None
            # A step may complete meanwhile: then some shards are a version ahead of others.
            wanted = max((session.arrived[shard.index] for shard in self._versioned(model.stages)), default=newest)
        return newest

    def add(self, stages: Sequence[int], version: int) -> bool:
        """Have more stages at the present version; False if passes are to be given up."""
        if not self._pull(stages, version):
            return False
        if any(self._session.arrived[s.index] != version for s in self._versioned(stages)):
            self._session.lose("the step is complete without the cells that came to this worker")
            return False
        self._model.version_arrived()
        return True

    def _versioned(self, stages: Sequence[int]) -> list[Shard]:
        return [shard for shard in self._layout.versioned if not set(stages).isdisjoint(shard.stages)]

    def _pull(self, stages: Sequence[int], version: int) -> bool:
        """Have the shards of some stages at this version or a newer one; False if the term is over before."""
        session = self._session
        frozen = self._layout.shards_of(TensorRole.FROZEN)
        session.want_frozen([shard for shard in frozen if not set(stages).isdisjoint(shard.stages)])
        self._model.fill(stages)
        shards = self._versioned(stages)
        for shard in shards:
            session.arrived.pop(shard.index, None)
        return session.pull(shards, version, session.term_is_over)
