"""A worker's part in the synchronous steps of a model in stages: which rank is next, which version is awaited.

As :class:`psa_store.consistency.worker_step.WorkerStep`, but what a worker holds are cells, and it has the parameters
of those stages only of which it holds one. A step goes on in the order of ranks in all workers, so the first rank that
is not complete is worked at by all that hold a cell of it, and no two workers wait for each other.

A cell that comes while the worker awaits a version is computed after a Reload: the worker told the servers that it has
done with the present one. What it has pushed of this step is not computed again: before it reloads it has the servers
Confirm that whatever it sent has come to them, so new connections lose nothing of it.

A cell that a living worker has goes between two steps: the plan says from which version on another one computes it.
That one follows each version until then, so it has the parameters in time.

When a cell goes in the middle of a step, and its gradients were pushed, the cells that were computed together with it
are computed again: what they sent each other stayed in this worker, and the next holder needs it. To keep it would cost
memory in every step.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from psa_store.cluster import Cell
from psa_store.consistency.worker_instructions import LISTEN, Await, Compute, Finish, Listen
from psa_store.consistency.worker_step import NEVER, Reload, Show


@dataclass(frozen=True, slots=True)
class Confirm:
    """Have all servers say that they have what was sent to them so far, then say ``confirmed``."""


CONFIRM = Confirm()
Instruction = Compute | Await | Show | Confirm | Reload | Finish | Listen


class CellStep:
    """One worker's view of the present step. Not thread-safe. ``last``: the version at which the job ends, or None."""

    def __init__(self, last: int | None) -> None:
        self._last = last
        self.version = 0
        """That of the parameters in the stages here."""
        self._blind = False
        """Whether nothing was loaded, so that ``version`` is only where the term began."""
        self._cells: Sequence[Cell] = ()
        """Those that are computed here from version ``_moved_at`` on ..."""
        self._cells_before: Sequence[Cell] = ()
        """... and those before it."""
        self._moved_at = 0
        self._owners: frozenset[str] = frozenset()
        self._term: int | None = None
        self._pushed: list[frozenset[Cell]] = []
        """Cells whose gradients are on their way, together those that were computed together ..."""
        self._confirmed: list[frozenset[Cell]] = []
        """... and those whose gradients the servers of this term have, and the relay all that they sent."""
        self._awaited: int | None = None
        self._brought: dict[str, int] = {}

    @property
    def _held(self) -> Sequence[Cell]:
        """The cells that are computed here in the present step."""
        return self._cells if self.version >= self._moved_at else self._cells_before

    @property
    def watches(self) -> bool:
        """Whether this worker has no part in the present step."""
        return not self._held and self._awaited is None

    def missing(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank that are to be computed here."""
        return tuple(cell.stage for cell in self._missing() if cell.rank == rank)

    @property
    def first(self) -> int | None:
        """The first rank of which something is to be computed here."""
        return min((cell.rank for cell in self._missing()), default=None)

    def _missing(self) -> list[Cell]:
        done = frozenset[Cell]().union(*self._pushed, *self._confirmed)
        return [cell for cell in self._held if cell not in done]

    @property
    def awaits(self) -> tuple[int, frozenset[str]] | None:
        """The version that is awaited for what is held here, and the owners that have not brought it."""
        if not self._held or self._awaited is None:
            return None
        return self._awaited, self._owners - self._brought.keys()

    # --- what has happened

    def loaded(self, term: int, version: int) -> None:
        """The stages have a version: one with which a worker begins in a term, or one that was shown."""
        if (term, version) != (self._term, self.version):
            self._confirmed.clear()
        self._term, self.version, self._blind = term, version, False
        self.lost()  # nothing is in flight yet

    def loaded_nothing(self) -> None:
        """There was nothing to load for this worker: it does not know at which version the others are."""
        self._blind = True

    def ends_at(self, last: int | None) -> None:
        """The job ends at another version than was known."""
        self._last = last

    def planned(
        self, cells: Sequence[Cell], owners: frozenset[str], before: Sequence[Cell] = (), moved_at: int = 0
    ) -> None:
        """What the plan says: the cells here, and the owners of what changes in their stages.

        ``before``: the cells here before version ``moved_at``.
        """
        self._cells, self._cells_before, self._moved_at, self._owners = cells, before, moved_at, owners
        held = self._held
        self._pushed = [each for each in self._pushed if each.issubset(held)]
        self._confirmed = [each for each in self._confirmed if each.issubset(held)]

    def pushed(self, cells: Iterable[Cell]) -> None:
        """The whole gradients of these, which were computed together, are on their way."""
        self._pushed.append(frozenset(cells))

    def confirmed(self) -> None:
        """All servers have what was sent to them, but for what they have refused."""
        self._confirmed += self._pushed
        self._pushed.clear()

    def brought(self, server: str, version: int) -> None:
        """An owner has brought a version of all its shards."""
        self._brought[server] = version

    def refused(self, step: int, rank: int) -> None:
        """A server has refused a push: the cells of the rank have to be computed again, if they stay here."""
        if step == self.version:
            self._pushed = [cells for cells in self._pushed if all(cell.rank != rank for cell in cells)]

    def lost(self) -> None:
        """The connections are gone, and with them whatever was in flight."""
        self._pushed.clear()
        self._awaited = None
        self._brought = {}

    # --- what is to be done

    def next(self) -> Instruction:
        """What to do now."""
        if self._last is not None and self.version >= self._last:
            return Finish(self.version)
        if self._blind and (self._held or self._cells):
            return Reload("cells came to a worker that had none")
        if self.first is not None:
            if self._awaited is None:
                return Compute(self.version, self.first)
            return CONFIRM if self._pushed else Reload("more cells came in the middle of a step")
        last = NEVER if self._last is None else self._last
        wanted = self.version + 1 if self._held or self._cells else last
        if self._awaited is None:
            self._awaited = wanted
            return Await(wanted, self._owners)
        if wanted < self._awaited:
            return Reload("cells come here between two steps")
        if self._brought.keys() >= self._owners:
            if any(version != self._awaited for version in self._brought.values()):
                return Reload("the job went on while the cells held here were with others")
            return Show(self._awaited)
        return LISTEN
