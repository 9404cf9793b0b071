"""The checkpoint barrier: a fixed list of members either all have arrived, or the attempt is over; never both.

    /psa/<job>/barriers/<id>            its members, their term, and what came of it                replaced once
    /psa/<job>/barriers/<id>/<member>   the member has arrived, with the version that it has pinned  ephemeral

One compare-and-set takes the document from OPEN to DONE or to ABORTED, and it is never written again: every process
that reads an outcome reads the same. DONE is written only while the term is still the barrier's, in one transaction. A
member that arrives looks which others have; ZooKeeper orders the arrivals, so the last one sees them all, and none
needs to watch them. What aborts is found by the process that minds: the controller when a member or its own term is
gone, any other when its patience is. Waiting is watching the document. Only ``coordination.py`` may use this.

Kazoo's DoubleBarrier counts instead of naming, keeps its sign of success beyond the members' death, and has no
deadline: after all members died, one alone passes it (``chaos/planted/double_barrier.py`` shows that).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import ClassVar

from psa_store.coordination import terms
from psa_store.coordination.documents import Reader
from psa_store.coordination.znodes import Znode, Znodes
from psa_store.errors import DataIntegrity
from psa_store.job.document import Damaged, from_text, to_text
from psa_store.testing.failpoints import failpoint

_DIGITS_MAX = 16
BARRIERS_KEPT = 8
"""The newest ones; a member that slept through more than these is told that its barrier is gone."""


class BarrierState(StrEnum):
    """OPEN -> DONE | ABORTED, once."""

    OPEN = "open"
    DONE = "done"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Barrier:
    """A barrier's document."""

    FORMAT: ClassVar[int] = 1

    term: int
    members: tuple[str, ...]
    """Those that must arrive; frozen when the barrier is opened."""
    state: BarrierState = BarrierState.OPEN
    versions: Mapping[str, int] = field(default_factory=dict)
    """DONE: the version that each member has pinned."""
    reason: str = ""
    """ABORTED: why."""

    def decided(
        self, arrivals: Mapping[str, int], *, term: int, gone: Collection[str] = (), expired: bool = False
    ) -> Barrier:
        """What becomes of this barrier when this is known; itself while it must wait, and once it is decided.

        A newer term counts before everything: what members pinned belongs to a plan that is over. Otherwise all
        having arrived counts before what happened to them since: they did what the barrier was for.

        Args:
            arrivals: the members that have arrived, with the versions that they have pinned.
            term: the newest term.
            gone: members that are members of the job no longer.
            expired: a process will not wait any longer.
        """
        if self.state is not BarrierState.OPEN:
            return self
        if term > self.term:
            return self.aborted(f"term {term} has begun, this one is of term {self.term}")
        missing = [member for member in self.members if member not in arrivals]
        if not missing:
            return replace(self, state=BarrierState.DONE, versions={each: arrivals[each] for each in self.members})
        lost = [member for member in missing if member in gone]
        if lost:
            return self.aborted(f"gone before they arrived: {', '.join(lost)}")
        if expired:
            return self.aborted(f"not all arrived in time; missing: {', '.join(missing)}")
        return self

    def aborted(self, reason: str) -> Barrier:
        """This one, given up."""
        return replace(self, state=BarrierState.ABORTED, reason=reason)


def open_barrier(znodes: Znodes, folder: str, term: int, members: Iterable[str]) -> str:
    """Returns the id. An attempt that was cut off may leave a barrier that no member is told; it goes with its age."""
    created = znodes.create(f"{folder}/", to_text(Barrier(term, tuple(sorted(members)))), sequence=True)
    assert created is not None, "a sequential name was used twice"
    failpoint("barrier.opened")
    for name in _by_age(znodes.children(folder))[:-BARRIERS_KEPT]:
        znodes.delete(*(f"{folder}/{name}/{member}" for member in znodes.children(f"{folder}/{name}")))
        znodes.delete(f"{folder}/{name}")  # one at which a member arrives just now goes the next time
    return created.path.rpartition("/")[2]


def read_barrier(znodes: Znodes, path: str, reader: Reader, *, watch: bool) -> Barrier | None:
    """None if there is no such barrier any more."""
    node = _find(znodes, path, watch=watch)
    return _read(node, reader) if node is not None else None


def arrive(znodes: Znodes, path: str, term_path: str, reader: Reader, member: str, version: int) -> Barrier | None:
    """Be there, and decide if all are; returns the barrier as it is then, or None if it is gone."""
    while True:
        node = _find(znodes, path)
        if node is None:
            return None
        barrier = _read(node, reader)
        if barrier.state is not BarrierState.OPEN or member not in barrier.members:
            return barrier
        created = znodes.create(f"{path}/{member}", str(version), ephemeral=True, parents=False)
        there = created if created is not None else znodes.get(f"{path}/{member}")
        if there is None:
            continue  # the barrier went, or an arrival of our former session did
        if there.owner == znodes.session_id:
            break
        znodes.delete(there.path)
    failpoint("barrier.arrived")
    return _decide(znodes, path, term_path, reader, gone=(), expired=False)


def settle(
    znodes: Znodes, path: str, term_path: str, reader: Reader, *, living: Collection[str], expired: bool
) -> Barrier | None:
    """Decide what can be decided. ``living``: the members of the job, read before this call."""
    node = _find(znodes, path)
    if node is None:
        return None
    gone = [each for each in _read(node, reader).members if each not in living]
    return _decide(znodes, path, term_path, reader, gone=gone, expired=expired)


def _decide(
    znodes: Znodes, path: str, term_path: str, reader: Reader, *, gone: Collection[str], expired: bool
) -> Barrier | None:
    """A compare-and-set that fails, or was cut off, is answered by the document: it is decided, perhaps by us."""
    while True:
        node, newest = znodes.get_all([path, term_path])
        if node is None:
            return None
        barrier = _read(node, reader)
        if barrier.state is not BarrierState.OPEN:
            return barrier
        names = [name for name in znodes.children(path) if name in barrier.members]
        complete = len(names) == len(barrier.members)
        found = znodes.get_all([f"{path}/{name}" for name in names]) if complete else []
        arrivals = _versions(names, found, reader) if complete else dict.fromkeys(names, 0)
        term = terms.newest(newest, barrier.term, reader)
        versions = {name: each for name, each in arrivals.items() if not isinstance(each, Damaged)}
        if isinstance(term, Damaged) or len(versions) < len(arrivals):
            decided = barrier.aborted("an arrival, or the term, can not be read")
        else:
            decided = barrier.decided(versions, term=term, gone=gone, expired=expired)
        if decided is barrier:
            return barrier
        failpoint("barrier.before_decision")
        text = to_text(decided)
        if decided.state is BarrierState.DONE and newest is not None:
            # A controller that takes a term now must find that it aborts this barrier, or that it came too late.
            written = znodes.set_while(path, text, node.version, newest)
        else:
            written = znodes.set(path, text, node.version)
        if written is not None:
            failpoint("barrier.decided")
            return decided


def _find(znodes: Znodes, path: str, *, watch: bool = False) -> Znode | None:
    """A member that was told of a barrier may ask a ZooKeeper server that does not have it yet."""
    node = znodes.get(path, watch=watch)
    if node is None:
        znodes.sync()
        node = znodes.get(path, watch=watch)
    return node


def _versions(names: Iterable[str], found: Iterable[Znode | None], reader: Reader) -> dict[str, int | Damaged]:
    return {
        name: reader.read(node, _version, ephemeral=True)
        for name, node in zip(names, found, strict=True)
        if node is not None
    }


def _version(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX):
        raise DataIntegrity(f"{text[:40]!r} is no version")
    return int(text)


def _by_age(names: Iterable[str]) -> list[str]:
    return sorted((name for name in names if name.isascii() and name.isdecimal()), key=int)


def _read(node: Znode, reader: Reader) -> Barrier:
    """One that cannot be read is over: what was pinned for it is let go, and another is opened."""
    found = reader.read(node, lambda text: from_text(Barrier, text, "the barrier"))
    return Barrier(0, ()).aborted(found.why) if isinstance(found, Damaged) else found
