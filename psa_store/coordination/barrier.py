"""The checkpoint barrier: a fixed list of members either all have arrived, or the attempt is over; never both.

    /psa/<job>/barriers/<id>            who must arrive, under which term, and what came of it      replaced once
    /psa/<job>/barriers/<id>/<member>   the member has arrived, with what it brings                  ephemeral

One compare-and-set takes the document from OPEN to DONE or to ABORTED, and it is never written again: all who read an
outcome read the same. DONE is written only while the term is still the barrier's, in one transaction. Whoever arrives
looks who else has; ZooKeeper orders the arrivals, so the last one sees them all, and nobody needs to watch them.
What aborts is found by whoever minds: the controller when a member or its own term is gone, anybody when his patience
is. Waiting is watching the document. Only ``coordination.py`` may use this.

Kazoo's DoubleBarrier counts instead of naming, keeps its mark of success beyond the members' death, and has no
deadline: after all members died, one alone passes it (``chaos/planted/double_barrier.py`` shows that).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from psa_store.coordination import terms
from psa_store.coordination.znodes import Znode, Znodes
from psa_store.errors import DataIntegrity
from psa_store.testing.failpoints import failpoint

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

    term: int
    members: tuple[str, ...]
    """Who must arrive; frozen when the barrier is opened."""
    state: BarrierState = BarrierState.OPEN
    brought: Mapping[str, str] = field(default_factory=dict)
    """DONE: what each member brought."""
    reason: str = ""
    """ABORTED: why."""

    def decided(
        self, arrivals: Mapping[str, str], *, term: int, gone: Collection[str] = (), expired: bool = False
    ) -> Barrier:
        """What becomes of this barrier when this is known; itself while it must wait, and once it is decided.

        A newer term counts before everything: what members brought belongs to a plan that is over. Otherwise all
        having arrived counts before what happened to them since: they brought what the barrier was for.

        Args:
            arrivals: who has arrived, with what he brings.
            term: the newest term.
            gone: members that are members of the job no longer.
            expired: somebody will not wait any longer.
        """
        if self.state is not BarrierState.OPEN:
            return self
        if term > self.term:
            return self._aborted(f"term {term} has begun, this one is of term {self.term}")
        missing = [member for member in self.members if member not in arrivals]
        if not missing:
            return replace(self, state=BarrierState.DONE, brought={each: arrivals[each] for each in self.members})
        lost = [member for member in missing if member in gone]
        if lost:
            return self._aborted(f"gone before they arrived: {', '.join(lost)}")
        if expired:
            return self._aborted(f"not all arrived in time; missing: {', '.join(missing)}")
        return self

    def _aborted(self, reason: str) -> Barrier:
        return replace(self, state=BarrierState.ABORTED, reason=reason)


def open_barrier(znodes: Znodes, folder: str, term: int, members: Iterable[str]) -> str:
    """Returns the id. An attempt that was cut off may leave a barrier that nobody hears of; it goes with its age."""
    created = znodes.create(f"{folder}/", _written(Barrier(term, tuple(sorted(members)))), sequence=True)
    assert created is not None, "a sequential name was used twice"
    failpoint("barrier.opened")
    for name in _by_age(znodes.children(folder))[:-BARRIERS_KEPT]:
        znodes.delete(*(f"{folder}/{name}/{member}" for member in znodes.children(f"{folder}/{name}")))
        znodes.delete(f"{folder}/{name}")  # whom somebody enters just now goes the next time
    return created.path.rpartition("/")[2]


def read_barrier(znodes: Znodes, path: str, *, watch: bool) -> Barrier | None:
    """None if there is no such barrier any more."""
    node = _find(znodes, path, watch=watch)
    return _read(node) if node is not None else None


def arrive(znodes: Znodes, path: str, term_path: str, member: str, text: str) -> Barrier | None:
    """Be there, and decide if all are; returns the barrier as it is then, or None if it is gone."""
    while True:
        node = _find(znodes, path)
        if node is None:
            return None
        barrier = _read(node)
        if barrier.state is not BarrierState.OPEN or member not in barrier.members:
            return barrier
        created = znodes.create(f"{path}/{member}", text, ephemeral=True, parents=False)
        there = created if created is not None else znodes.get(f"{path}/{member}")
        if there is None:
            continue  # the barrier went, or an arrival of our former session did
        if there.owner == znodes.session_id:
            break
        znodes.delete(there.path)
    failpoint("barrier.arrived")
    return _decide(znodes, path, term_path, gone=(), expired=False)


def settle(znodes: Znodes, path: str, term_path: str, *, living: Collection[str], expired: bool) -> Barrier | None:
    """Decide what can be decided. ``living``: the members of the job, read before this call."""
    node = _find(znodes, path)
    if node is None:
        return None
    gone = [each for each in _read(node).members if each not in living]
    return _decide(znodes, path, term_path, gone=gone, expired=expired)


def _decide(znodes: Znodes, path: str, term_path: str, *, gone: Collection[str], expired: bool) -> Barrier | None:
    """A compare-and-set that fails, or was cut off, is answered by the document: somebody has decided, perhaps we."""
    while True:
        node, newest = znodes.get_all([path, term_path])
        if node is None:
            return None
        barrier = _read(node)
        names = [name for name in znodes.children(path) if name in barrier.members]
        complete = len(names) == len(barrier.members)
        found = znodes.get_all([f"{path}/{name}" for name in names]) if complete else []
        arrivals = dict.fromkeys(names, "") if not complete else _texts(names, found)
        decided = barrier.decided(arrivals, term=terms.newest(newest), gone=gone, expired=expired)
        if decided is barrier:
            return barrier
        failpoint("barrier.before_decision")
        text = _written(decided)
        if decided.state is BarrierState.DONE and newest is not None:
            # Whoever takes a term now must find that it aborts this barrier, or that it came too late.
            written = znodes.set_while(path, text, node.version, newest)
        else:
            written = znodes.set(path, text, node.version)
        if written is not None:
            failpoint("barrier.decided")
            return decided


def _find(znodes: Znodes, path: str, *, watch: bool = False) -> Znode | None:
    """Who was told of a barrier by its opener may ask a ZooKeeper node that has not heard of it yet."""
    node = znodes.get(path, watch=watch)
    if node is None:
        znodes.sync()
        node = znodes.get(path, watch=watch)
    return node


def _texts(names: Iterable[str], found: Iterable[Znode | None]) -> dict[str, str]:
    return {name: node.text for name, node in zip(names, found, strict=True) if node is not None}


def _by_age(names: Iterable[str]) -> list[str]:
    return sorted(names, key=int)


def _written(barrier: Barrier) -> str:
    return json.dumps(
        {
            "state": barrier.state.value,
            "term": barrier.term,
            "members": list(barrier.members),
            "brought": dict(barrier.brought),
            "reason": barrier.reason,
        }
    )


def _read(node: Znode) -> Barrier:
    try:
        raw = json.loads(node.text)
        return Barrier(
            raw["term"], tuple(raw["members"]), BarrierState(raw["state"]), dict(raw["brought"]), raw["reason"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataIntegrity(f"{node.path} holds {node.text[:80]!r}, not a barrier: {error}") from error
