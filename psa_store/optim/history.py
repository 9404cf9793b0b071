"""The optimizer of each step: that with which the job began, and what was changed since. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from psa_store.job.change import Change, Numbers
from psa_store.job.config import JobConfig
from psa_store.optim.spec import Optimizer, from_dict


class OptimizerHistory:
    """Immutable. ``first``: the optimizer of step 0.

    ``changes``: in the order in which they were made. After a rollback one that was made later may count from an
    earlier step; where two change the same number, the one that was made later wins.
    """

    def __init__(self, first: Optimizer, changes: Iterable[Change] = ()) -> None:
        made = tuple(changes)
        self._steps = sorted({change.step for change in made})
        self._optimizers = [first]
        for step in self._steps:
            document = first.to_dict()
            for change in made:
                if change.step <= step:
                    document = change.applied_to(document)
            self._optimizers.append(from_dict(document))

    def at(self, step: int) -> Optimizer:
        """The optimizer that makes the update of ``step``; the same object as long as it is the same."""
        return self._optimizers[bisect_right(self._steps, step)]

    def has(self, numbers: Numbers, step: int) -> bool:
        """Whether the optimizer of a step has these numbers already."""
        document = self.at(step).to_dict()
        return Change(step, numbers).applied_to(document) == document

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped in some step."""
        return any(each.clip_grad_norm is not None for each in self._optimizers)


def of_ranks(config: JobConfig) -> OptimizerHistory:
    """The job's optimizer, as the script gave it: applied by servers, or in rounds by each rank."""
    return OptimizerHistory(from_dict(config.optimizer), config.changes)


def of_servers(config: JobConfig) -> OptimizerHistory:
    """What servers apply: in rounds, to what ranks have moved; nothing of that changes."""
    return OptimizerHistory(from_dict(config.server_optimizer), () if config.ranks_update else config.changes)
