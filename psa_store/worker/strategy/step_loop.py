"""The loop of the synchronous strategies: a pure machine says what is next, and it is done.

Every disturbance (a new term, a lost connection, a cell more or less) only changes what the loop finds the next time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from psa_store.consistency.worker_instructions import Compute, Finish
from psa_store.consistency.worker_step import Help, Reload, Show
from psa_store.worker.batches import RankStep
from psa_store.worker.gradients import GradientMemory, GradientPool
from psa_store.worker.session import PlanSession, Tools


class StepMachine(Protocol):
    """What decides: :class:`psa_store.consistency.worker_step.WorkerStep`, or ``CellStep``."""

    @property
    def watches(self) -> bool: ...

    @property
    def version(self) -> int: ...

    def next(self) -> object: ...


Machine = TypeVar("Machine", bound=StepMachine)


class StepLoop(ABC, Generic[Machine]):
    """What strategies share that make one step after the other with all ranks; see ``Strategy`` in ``base``."""

    session: PlanSession
    _step: Machine
    _gradients: GradientMemory

    def __init__(self, tools: Tools) -> None:
        self._servers = tools.servers
        self._journal = tools.journal
        self._pool = GradientPool(tools.layout, tools.wire)

    @property
    def version(self) -> int:
        return self._step.version

    def next_rank_step(self) -> RankStep | None:
        self.session.look()
        while (decided := self._decide()) is not None:
            match decided:
                case Finish(version):
                    if self.session.finish([server.id for server in self.session.plan.servers], version):
                        return None
                case Compute(step, rank) | Help(step, rank):
                    if self._take_gradient_memory(step):
                        self._begun(decided)
                        return RankStep(step, rank)
        return None

    def _decide(self, *, handing_over: bool = False) -> Compute | Help | Finish | None:
        """Do what has to be done until there is a rank to compute, or the end; None: told to leave, or nothing to do.

        A term may end in the middle of a new version: user code must not see a mixture, so the step is handed over
        once all shards are at one version.
        """
        session, step = self.session, self._step
        while not session.leaving:
            if not (session.stands or session.settle()):
                session.wait()
                continue
            if handing_over and step.watches:
                return None
            match step.next():
                case Compute() | Help() | Finish() as decided:
                    return decided
                case Show(version):
                    if session.recording:
                        self._journal.record("acked", term=session.term, version=version)
                    self._show(version)
                case Reload(why):
                    session.lose(why)
                case instruction:
                    self._execute(instruction)
        return None

    def _take_gradient_memory(self, step: int) -> bool:
        """Have memory that nothing reads for the next gradient; False if one must wait for it."""
        shares = self._servers.shares
        if not shares and self._servers.sending:
            self.session.wait()
            return False
        self._gradients = self._gradients_for(step, shared=shares)
        return True

    def _gradients_for(self, step: int, *, shared: bool) -> GradientMemory:
        """Memory for the gradient of one rank, which servers read in place if it is ``shared``."""
        return self._pool.take_for(step, shared=shared)

    def _begun(self, decided: Compute | Help) -> None:
        """A rank is about to be computed."""

    @abstractmethod
    def _show(self, version: int) -> None:
        """Let the model be at a version of which all shards are here."""

    @abstractmethod
    def _execute(self, instruction: object) -> None:
        """Do what the machine says besides."""
