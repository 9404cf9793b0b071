"""The loop of the synchronous strategies: a pure machine says what is next, and it is done.

Every disturbance (a new term, a lost connection, a cell more or less) only changes what the loop finds the next time.
"""

from __future__ import annotations

from typing import Protocol

from psa_store import logs
from psa_store.consistency.worker_instructions import Compute, Finish
from psa_store.consistency.worker_step import Help, Reload, Show
from psa_store.worker.batches import RankStep
from psa_store.worker.session import PlanSession, Tools


class StepMachine(Protocol):
    """What decides: :class:`psa_store.consistency.worker_step.WorkerStep`, or ``CellStep``."""

    @property
    def watches(self) -> bool: ...

    def next(self) -> object: ...


class Executor(Protocol):
    """What differs between the strategies: how they do what the machine says."""

    def take_gradient_memory(self, step: int, *, shared: bool) -> None:
        """Have memory for the gradient of one rank, which servers read in place if it is ``shared``."""

    def show(self, version: int) -> None:
        """Let the model be at a version of which all shards are here."""

    def execute(self, instruction: object) -> None:
        """Do what the machine says besides."""


class StepLoop:
    """One step after the other, with all ranks. A strategy owns one, and is its :class:`Executor`."""

    def __init__(self, tools: Tools, session: PlanSession, machine: StepMachine, executor: Executor) -> None:
        self._servers = tools.servers
        self._journal = tools.journal
        self._session = session
        self._machine = machine
        self._executor = executor
        self._log = logs.get_logger()

    def next_rank_step(self) -> RankStep | None:
        """See :meth:`psa_store.worker.strategy.base.Strategy.next_rank_step`."""
        session = self._session
        session.look()
        while (decided := self._decide()) is not None:
            match decided:
                case Finish(version):
                    if session.finish([server.id for server in session.plan.servers], version):
                        return None
                case Compute(step, rank) | Help(step, rank):
                    if self._take_gradient_memory(step):
                        if isinstance(decided, Help):
                            self._log.debug("computing the rank of a slow worker", step=step, rank=rank)
                            self._journal.record("speculated", term=session.term, step=step, rank=rank)
                        return RankStep(step, rank)
        return None

    def hand_over(self) -> None:
        """Behind the gradient that is the step's last, wait for the next version and load it.

        A term may end in the middle of a new version: user code must not see a mixture, so the step is handed over
        once all shards are at one version.
        """
        self._decide(handing_over=True)

    def _decide(self, *, handing_over: bool = False) -> Compute | Help | Finish | None:
        """Do what is due until there is a rank to compute, or the end; None: told to leave, or nothing to do."""
        session, machine = self._session, self._machine
        while not session.leaving:
            if not (session.stands or session.settle()):
                session.wait()
                continue
            if handing_over and machine.watches:
                return None
            match machine.next():
                case Compute() | Help() | Finish() as decided:
                    return decided
                case Show(version):
                    if session.recording:
                        self._journal.record("acked", term=session.term, version=version)
                    self._executor.show(version)
                case Reload(why):
                    session.lose(why)
                case instruction:
                    self._executor.execute(instruction)
        return None

    def _take_gradient_memory(self, step: int) -> bool:
        """Have memory that nothing reads for the next gradient; False if one must wait for it."""
        shares = self._servers.shares
        if not shares and self._servers.sending:
            self._session.wait()
            return False
        self._executor.take_gradient_memory(step, shared=shares)
        return True
