"""Arms a failpoint of the product, provokes the event that reaches it, and waits for the hit."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from chaos.faults import FAULTS
from chaos.inject.context import FIRE_WITHIN_S, Context, NotFired, choose, kill, living
from chaos.job import signal_if_alive, start_role
from chaos.schedule import ScheduledFault
from psa_store.testing.failpoints import FailpointAction, arm, disarm, hit


def arm_for(context: Context, fault: ScheduledFault) -> None:
    """Arm the failpoint of a fault."""
    how, _, name = fault.kind.partition("-")
    arm(context.spec.failpoints, name, FailpointAction.KILL if how == "die" else FailpointAction.STOP, fault.number)


@contextmanager
def hit_failpoint(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Kill or stop the process that reaches a failpoint."""
    name = fault.kind.partition("-")[2]
    folder = context.spec.failpoints
    if not FAULTS[fault.kind].at_start:
        arm_for(context, fault)
    extra = _provoke(context, fault, name)

    def reached() -> int | None:
        return next(iter(hit(folder, name)), None)

    try:
        pid = context.until(reached, FIRE_WITHIN_S, f"no process reached the failpoint {name}")
    except NotFired:
        disarm(folder, name)
        raise
    try:
        yield f"process {pid} reached {name}" + extra
    finally:
        signal_if_alive(pid, signal.SIGCONT)


def _provoke(context: Context, fault: ScheduledFault, name: str) -> str:
    """Make the job reach a failpoint that it does not reach in every step; return the evidence."""
    room = name.partition(".")[0]
    if room == "takeover":
        others = [each for each in living(context, "server") if each != context.tail.controller()]
        return "; to provoke it, " + kill([choose(others, fault, "second server").pid])
    if room == "serve":
        return "; to provoke it, " + kill([choose(living(context, "server"), fault, "server").pid])
    if name == "worker.loaded":
        return "; to provoke it, " + kill([choose(living(context, "worker"), fault, "worker").pid])
    if room == "handover":
        context.extra_processes.append(start_role(context.site, context.spec, "server-more", {}))
        return "; to provoke it, a server joined"
    return ""
