"""No reads from a server that may be dead: once ZooKeeper has been away from all of them for a session, none answers.

A server may believe in its place for as long as ZooKeeper keeps its session; then another may own its shards. So no
worker is told of a version from one session after the beginning of such a fault until its end.
"""

from __future__ import annotations

from chaos.check.violation import Violation
from chaos.history import History, Reference

_NAME = "lease"
CUT_OFF = ("kill-zk-quorum", "zk-stall")
"""Faults that take ZooKeeper from all servers."""


def check(history: History, _reference: Reference) -> list[Violation]:
    """See the module. Of each fault the first one that was told is named."""
    lasting = {event["id"]: event["for_s"] for event in history.of("fault") if event["kind"] in CUT_OFF}
    violations = []
    for fired in history.of("fired"):
        if fired["id"] not in lasting:
            continue
        begin, end = fired.t + history.scenario["session_timeout_s"], fired.t + lasting[fired["id"]]
        told = next((event for event in history.of("acked") if begin < event.t < end), None)
        if told is not None:
            late_s = told.t - fired.t
            text = f"{told.name} was told of version {told['version']} {late_s:.1f} s after servers lost ZooKeeper"
            violations.append(Violation(_NAME, text, told.t))
    return violations
