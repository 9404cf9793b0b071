"""A worker's part in the synchronous steps as a state machine: which rank is next, which version is awaited.

Theory of operation. The worker stands in a term with parameters of some version. Then, again and again::

    COMPUTING ──all held ranks pushed──▶ AWAITING version + 1 ──every owner has brought it──▶ COMPUTING the next

and :meth:`WorkerStep.next` says what to do now:

* Compute a rank that it holds and has not pushed. If it becomes such a rank while it awaits a version, Reload: it told
  the servers that it has done with the present one, so that may change where the model has it.
* Await a version: each owner of shards brings it once it is there. A worker without ranks awaits the last one. Where a
  step may be complete without this worker's ranks, owners may bring different versions: those that are behind are
  asked again for the newest. Elsewhere a version beyond the awaited one means that the job went on while these ranks
  were with others: Reload.
* Show the version in the model, once all owners have brought it; Finish after the last.
* Listen otherwise.

With speculation, a worker that has waited for long (``slow``) asks the owners how far each rank is (AskClocks) and
computes a missing one for its holder (Help), if :func:`rank_to_help` gives it one. It still has the version for that as
long as no newer parameters have come into the model (``overwritten``): they come by value, and only once the step is
complete.

``lost`` forgets whatever was in flight. Each instruction but Compute, Help, Show and Finish is given once.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from psa_store.consistency.worker_instructions import LISTEN, AskClocks, Await, Compute, Finish, Listen

NEVER = 1 << 62
"""A version that no job reaches: to await it is to await another plan."""


@dataclass(frozen=True, slots=True)
class Help:
    """Compute and push as with :class:`Compute`, for a worker that holds the rank and is slow."""

    step: int
    rank: int


@dataclass(frozen=True, slots=True)
class Show:
    """All owners have brought this version: let the model have it, and say ``loaded``."""

    version: int


@dataclass(frozen=True, slots=True)
class Reload:
    """Connect anew and load the newest version."""

    why: str


Instruction = Compute | Help | Await | Show | AskClocks | Reload | Finish | Listen


class WorkerStep:
    """One worker's view of the present step. Not thread-safe.

    Args:
        last: the version at which the job ends; None: never.
        may_miss_versions: whether a step may be complete without this worker's ranks.
    """

    def __init__(self, last: int | None, *, may_miss_versions: bool = False) -> None:
        self._last = last
        self._may_miss_versions = may_miss_versions
        self.version = 0
        """That of the parameters in the model."""
        self._held: Sequence[int] = ()
        self._owners: frozenset[str] = frozenset()
        self._pushed: set[int] = set()
        self._awaited: int | None = None
        self._brought: dict[str, int] = {}
        """The version that each owner has brought since it was asked."""
        self._overwritten = False
        self._slow = False
        self._clocks: dict[str, Sequence[int]] = {}
        self._helps: int | None = None
        """A rank of another worker that is computed next."""
        self._helped: set[int] = set()
        """Those that were computed of the present version."""

    @property
    def watches(self) -> bool:
        """Whether this worker has no part in the present step."""
        return not self._held and self._awaited is None

    @property
    def awaits(self) -> tuple[int, frozenset[str]] | None:
        """The version that is awaited for what is held here, and the owners that have not brought it."""
        if not self._held or self._awaited is None:
            return None
        return self._awaited, self._owners - self._brought.keys()

    # --- what has happened

    def loaded(self, version: int) -> None:
        """The model has a version: that with which a term begins, or one that was shown."""
        self.version = version
        self._helped.clear()
        self.lost()  # nothing is in flight yet

    def ends_at(self, last: int | None) -> None:
        """The job ends at another version than was known."""
        self._last = last

    def planned(self, held: Sequence[int], owners: frozenset[str]) -> None:
        """What the plan says: the ranks held here, and the owners of what changes."""
        self._held, self._owners = held, owners

    def pushed(self, rank: int) -> None:
        """The whole gradient of a rank is on its way."""
        self._pushed.add(rank)
        if rank == self._helps:
            self._helps = None

    def brought(self, server: str, version: int) -> None:
        """An owner has brought a version of all its shards."""
        self._brought[server] = version

    def overwritten(self) -> None:
        """Parameters of a newer version have begun to come into the model."""
        self._overwritten = True

    def refused(self, step: int, rank: int) -> None:
        """A server has refused a push: it has to be made again, if the rank stays here."""
        if step == self.version:
            self._pushed.discard(rank)

    def told(self, server: str, clocks: Sequence[int]) -> None:
        """An owner says how many steps of each rank it has."""
        self._clocks[server] = clocks

    def slow(self) -> None:
        """The awaited version takes long."""
        self._slow = True

    def lost(self) -> None:
        """The connections are gone, and with them whatever was in flight."""
        self._pushed.clear()
        self._awaited = None
        self._brought = {}
        self._overwritten = self._slow = False
        self._helps = None
        self._clocks = {}

    # --- what is to be done

    def next(self) -> Instruction:
        """What to do now."""
        if self._last is not None and self.version >= self._last:
            return Finish(self.version)
        for rank in self._held:
            if rank not in self._pushed:
                if self._awaited is not None:
                    return Reload("more ranks came in the middle of a step")
                return Compute(self.version, rank)
        if self._helps is not None and not self._overwritten:
            return Help(self.version, self._helps)
        if self._awaited is None:
            last = NEVER if self._last is None else self._last
            self._awaited = self.version + 1 if self._held else last
            return Await(self._awaited, self._owners)
        if self._brought.keys() >= self._owners:
            return self._all_have_brought(self._awaited)
        if self._slow:
            self._slow = False
            return self._look_for_help()
        return LISTEN

    def _all_have_brought(self, awaited: int) -> Instruction:
        newest = max(self._brought.values())
        if newest != awaited and not self._may_miss_versions:
            return Reload("the job went on while the ranks held here were with others")
        behind = [server for server, version in self._brought.items() if version < newest]
        for server in behind:
            del self._brought[server]
        return Await(newest, behind) if behind else Show(newest)

    def _look_for_help(self) -> Instruction:
        if self._overwritten or not self._held:
            return LISTEN
        if not self._clocks.keys() >= self._owners:
            return AskClocks(self._owners - self._clocks.keys())
        clocks = [min(each) for each in zip(*self._clocks.values(), strict=True)]
        self._clocks = {}
        self._helps = rank_to_help(clocks, self.version, self._held, self._helped)
        if self._helps is None:
            return LISTEN
        self._helped.add(self._helps)
        return Help(self.version, self._helps)


def rank_to_help(clocks: Sequence[int], version: int, held: Collection[int], helped: Collection[int]) -> int | None:
    """Which missing rank a worker computes that holds these: one after whose place comes a rank held here that is not
    missing, with only missing ones in between. So two workers do not compute the same.

    Args:
        clocks: by rank, how many of its steps servers have.
        helped: ranks that this worker has computed already.
    """
    ranks = len(clocks)
    for missing in (rank for rank in range(ranks) if clocks[rank] <= version and rank not in helped):
        helper = next((after for i in range(1, ranks) if clocks[after := (missing + i) % ranks] > version), None)
        if helper in held:
            return missing
    return None
