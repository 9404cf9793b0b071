"""Decide what the controller does next: the rules by which owners of shards and holders of cells change.

Theory of operation. The controller looks at one immutable :class:`View` (the plan and the members that are alive)
and :func:`decide` answers with one action; the controller carries it out and looks again. Killing it between any two
actions is harmless, because the next controller starts from what is stored.

Changing *cells* keeps the term: a gradient is a pure function of (seed, step, rank, stage), so it does not matter
which worker computes it. In a model of several stages a cell that a living worker holds goes between two steps, so
that nothing of it is computed again; one whose holder died goes at once. Changing the owner of a *shard* needs a new
term, and so does moving a rank that has rank state, which is committed now and then. A new term begins in one of two
ways:

* Take-over, when an owner died (or a holder): seal, read heads, resume at the newest version that all shards have
  committed.
* Hand-over, when a server joins or leaves and all owners are well; no step is lost::

      RUN ──▶ FREEZE ──▶ STOP ──▶ take-over at the version where all owners stopped
       ▲        │          │      (no server stays: a plan without owners; the next server starts from it)
       └────────┴──────────┘ the reason went away

  FREEZE: owners stop updating and report their version. Versions of two owners differ by one at most (by a push of
  each rank, where pushes are applied on arrival), so the larger one can be reached by all. STOP: owners go on to
  exactly that version (to the next that is committed with rank state), commit it, and report.

Pure: no I/O, no threads, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from psa_store.cluster.members import Member
from psa_store.cluster.plan import NO_WORKER, Phase, Plan, Server
from psa_store.job.document import Damaged

_MOVE_AHEAD = 2
"""In how many versions a living worker's cells go: the next one may be there before all have read the plan. Those that
read it later compute something again, and nothing else."""


@dataclass(frozen=True, slots=True)
class View:
    """Everything that a decision depends on."""

    plan: Plan | None
    servers: Mapping[str, Member]
    workers: Mapping[str, Member]
    shard_sizes: tuple[int, ...]
    ranks: int
    stages: int = 1
    stop_interval: int = 0
    """With rank state: ranks change hands with a term only, which begins at a multiple of this version. Else 0."""
    damage: Damaged | None = None
    """Why there is no plan, where one stands that cannot be read."""
    last: Plan | None = None
    """The newest plan that could be read by this process."""
    on_arrival: bool = False
    """Whether pushes are applied as they come, so that a cut needs the word of the workers that hold the ranks."""
    version: int = 0
    """The newest version that this process knows of."""


@dataclass(frozen=True, slots=True)
class TakeOver:
    """Seal everything under a new term, find the version to resume at, and publish these owners."""

    servers: tuple[Server, ...]
    owners: tuple[int, ...]
    cells: tuple[str, ...]
    stages: int
    reason: str
    above: tuple[int, int] = (0, 0)
    """Term and revision that the new plan exceeds: those of any plan that a member may have spoken of."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Write this plan; its term is the present one."""

    plan: Plan
    reason: str


def decide(view: View) -> TakeOver | Publish | None:
    """The next action of the controller, or None if the plan fits the members."""
    plan = view.plan
    known = view.last if view.damage is not None else plan
    cells = assign_cells(known.cells if known else (NO_WORKER,) * (view.ranks * view.stages), view.workers)
    staying = [member for member in view.servers.values() if not member.leaving or view.damage is not None]
    previous = [server.id for server in known.servers] if known else []
    servers, owners = assign_shards(view.shard_sizes, _in_order(staying, previous))

    why = _take_over_reason(view)
    if why and servers:
        return TakeOver(servers, owners, cells, view.stages, why, _above(view))
    if why:
        return _end(plan, f"{why}, and no server stays") if plan is not None and plan.owners else None
    assert plan is not None
    if {server.id for server in servers} != set(previous) or (view.stop_interval and cells != plan.cells):
        return _hand_over(view, plan, servers, owners, cells)
    if plan.phase is not Phase.RUN:
        moves = _moves(view, plan, cells)
        return _publish(
            plan, "hand-over no longer needed", **moves, phase=Phase.RUN, freeze_revision=None, stop_version=None
        )
    if cells != plan.cells:
        # Where a cut on arrival ends is said by the workers that held the ranks.
        cut = None if view.on_arrival else plan.cut
        return _publish(plan, "workers changed", **_moves(view, plan, cells), cut=cut)
    return None


def _moves(view: View, plan: Plan, cells: tuple[str, ...]) -> dict[str, Any]:
    """What changes in a plan of the same term that is to give out cells in this way; where it does already: nothing.

    Of one stage, a rank goes at once: a worker that joins helps with the present step. So does a cell in the first step
    of a term: workers that gather there may have memory for their own stages only.
    """
    if cells == plan.cells:
        return {}
    now = zip(plan.cells_at(view.version), cells, strict=True)
    before = tuple(holder if holder in view.workers else new for holder, new in now)
    if plan.stages == 1 or view.version == plan.resume or before == cells:
        return {"cells": cells, "moved_at": 0, "cells_before": ()}
    return {"cells": cells, "moved_at": view.version + _MOVE_AHEAD, "cells_before": before}


def _take_over_reason(view: View) -> str:
    plan = view.plan
    if view.damage is not None:
        return f"the plan is damaged: {view.damage.why}"
    if plan is None:
        return "the job has no plan yet"
    if not plan.owners:
        return "the shards have no owner"
    for server in plan.servers:
        member = view.servers.get(server.id)
        if member is None:
            return f"server {server.id} is gone"
        if member.reload_term == plan.term:
            return f"server {server.id} cannot serve what it owns"
    if view.stop_interval and view.workers and any(holder not in view.workers for holder in plan.cells):
        return "a rank is without its worker, and its state was committed"
    if plan.stop_version is not None and not view.workers and _is_behind(view, plan, plan.stop_version):
        return "no worker is left to finish the step at which to hand over"
    return ""


def _above(view: View) -> tuple[int, int]:
    """Members go on saying for which revision they stand still, also when the plan that had it cannot be read."""
    plans = [plan for plan in (view.plan, view.last) if plan is not None]
    said = [member.frozen_revision or 0 for member in view.servers.values()]
    return max((plan.term for plan in plans), default=0), max([*said, *(plan.revision for plan in plans)], default=0)


def _is_behind(view: View, plan: Plan, version: int) -> bool:
    """Whether some owner has said, when it was frozen, that not all of its shards have this version."""
    said = [view.servers[server.id].frozen_version for server in plan.servers]
    return any(each is None or each < version for each in said)


def _hand_over(
    view: View, plan: Plan, servers: tuple[Server, ...], owners: tuple[int, ...], cells: tuple[str, ...]
) -> TakeOver | Publish | None:
    members = [view.servers[server.id] for server in plan.servers]
    meanwhile = {} if view.stop_interval else _moves(view, plan, cells)
    if plan.phase is Phase.RUN:
        revision = plan.revision + 1
        return _publish(plan, "members changed", **meanwhile, phase=Phase.FREEZE, freeze_revision=revision, cut=None)
    if plan.phase is Phase.FREEZE and all(member.frozen_revision == plan.freeze_revision for member in members):
        stop = max(member.frozen_newest or 0 for member in members)
        if view.stop_interval:
            stop = -(-stop // view.stop_interval) * view.stop_interval
        return _publish(
            plan, "all owners are frozen", **meanwhile, phase=Phase.STOP, freeze_revision=None, stop_version=stop
        )
    if plan.phase is Phase.STOP and all(member.stopped_version == plan.stop_version for member in members):
        if servers:
            why = f"hand-over at version {plan.stop_version}"
            return TakeOver(servers, owners, cells, view.stages, why, _above(view))
        return _end(plan, "the last server leaves", cells=cells, resume=plan.stop_version)
    if meanwhile:
        return _publish(plan, "workers changed", **meanwhile)
    return None


def _end(plan: Plan, reason: str, **changes: Any) -> Publish:
    """End with a plan without owners; the next server begins with a take-over."""
    return _publish(
        plan,
        reason,
        phase=Phase.RUN,
        freeze_revision=None,
        stop_version=None,
        servers=(),
        owners=(),
        moved_at=0,
        cells_before=(),
        **changes,
    )


def _publish(plan: Plan, reason: str, **changes: Any) -> Publish:
    return Publish(replace(plan, revision=plan.revision + 1, **changes), reason)


def _in_order(members: Iterable[Member], previous: Sequence[str]) -> list[Member]:
    """Present owners first and in their order, so that a change moves few shards; then the others by id."""
    place = {member: index for index, member in enumerate(previous)}
    return sorted(members, key=lambda member: (place.get(member.id, len(previous)), member.id))


def assign_shards(sizes: Sequence[int], members: Sequence[Member]) -> tuple[tuple[Server, ...], tuple[int, ...]]:
    """Give each member a contiguous run of shards of about equal bytes; members beyond the shards get none."""
    members = members[: len(sizes)]
    total = sum(sizes) or 1
    owners = []
    before = 0
    for size in sizes:
        middle = before + size / 2
        owners.append(min(int(middle * len(members) / total), len(members) - 1) if members else 0)
        before += size
    used = sorted(set(owners)) if members else []
    servers = tuple(Server(members[i].id, members[i].address, members[i].local, members[i].host) for i in used)
    renumber = {index: place for place, index in enumerate(used)}
    return servers, tuple(renumber[index] for index in owners) if members else ()


def assign_cells(current: Sequence[str], workers: Iterable[str]) -> tuple[str, ...]:
    """Share the cells out evenly (counts differ by one at most) and move as few as possible; neighbours stay together,
    so that a worker needs few stages."""
    alive = sorted(workers)
    if not alive:
        return (NO_WORKER,) * len(current)
    share, extras = divmod(len(current), len(alive))
    counts = dict.fromkeys(alive, 0)
    cells = [NO_WORKER] * len(current)

    def has_room(worker: str) -> bool:
        return counts[worker] < share or (counts[worker] == share and extras > 0)

    def give(cell: int, worker: str) -> None:
        nonlocal extras
        extras -= counts[worker] == share
        counts[worker] += 1
        cells[cell] = worker

    for cell, holder in enumerate(current):
        if holder in counts and has_room(holder):
            give(cell, holder)
    for cell, holder in enumerate(cells):
        if holder == NO_WORKER:
            before = cells[cell - 1] if cell else NO_WORKER
            fits = before != NO_WORKER and has_room(before)
            give(cell, before if fits else min(alive, key=lambda worker: (counts[worker], worker)))
    return tuple(cells)
