"""Judgements on a ZooKeeper ensemble. Pure: facts in, checks out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from psa_store.coordination import ZooKeeperMember
from psa_store.observe.doctor.check import Check, Verdict
from psa_store.observe.doctor.machine import numbers

ZOOKEEPER_OLDEST = (3, 5)
"""Older ones do not return what they have created."""
ZOOKEEPER_ADVISED = (3, 8, 4)
"""ZOOKEEPER-4785 and -4925, both about lost data, are mended there."""
SLOW_SHARE = 1 / 40
"""Of the session timeout: heartbeats are a sixth of it apart, and a lease is counted from when one was sent."""
GRANTED_TOLERANCE = 0.25
_ALONE = "standalone"


def unusable_zookeeper(why: str) -> Check:
    return Check("ZooKeeper", Verdict.FAIL, why, "correct PSA_ZOOKEEPER: host:port,host:port/chroot")


def allowed() -> Check:
    return Check("ZooKeeper access", Verdict.PASS, "a znode was created, changed and deleted")


def refused(why: str) -> Check:
    return Check("ZooKeeper access", Verdict.FAIL, why, "correct PSA_ZOOKEEPER, or the ACL of its chroot")


def judge_zookeeper(members: Sequence[ZooKeeperMember], session_timeout_s: float) -> list[Check]:
    """``members``: all that the connect string names. What cannot be known without one that serves is left out."""
    serving = [member for member in members if member.serves]
    checks = [_judge_quorum(members, serving)]
    if serving:
        checks += [
            _judge_version(serving),
            _judge_latency(serving, session_timeout_s),
            _judge_session(serving, session_timeout_s),
        ]
    return checks


def _judge_quorum(members: Sequence[ZooKeeperMember], serving: Sequence[ZooKeeperMember]) -> Check:
    away = "; ".join(f"{member.address}: {member.problem}" for member in members if not member.serves)
    found = f"{len(serving)} of {len(members)} serve"
    if not serving:
        fix = "start ZooKeeper (more than half of its members), or correct PSA_ZOOKEEPER"
        return Check("ZooKeeper", Verdict.FAIL, f"{found}. {away}", fix)
    modes = [member.mode for member in serving if member.mode]
    if modes:
        found += f" ({', '.join(sorted(modes))})"
    if len(members) > 1 and _ALONE in modes:
        fix = "make them one ensemble (server.N lines in zoo.cfg, myid), or name one of them only"
        return Check("ZooKeeper", Verdict.FAIL, f"{found}: each that is standalone decides for itself", fix)
    if away:
        fix = "start those that do not serve: when half of the members are gone, training stops"
        return Check("ZooKeeper", Verdict.WARN, f"{found}. {away}", fix)
    return Check("ZooKeeper", Verdict.PASS, found)


def _judge_version(serving: Sequence[ZooKeeperMember]) -> Check:
    versions = sorted({member.version for member in serving if member.version}, key=numbers)
    if not versions:
        found, fix = "no member shows its version", "put srvr into 4lw.commands.whitelist of zoo.cfg"
        return Check("ZooKeeper version", Verdict.WARN, found, fix)
    found = ", ".join(versions)
    if numbers(versions[0]) < ZOOKEEPER_OLDEST:
        return Check("ZooKeeper version", Verdict.FAIL, f"{found}, too old", "use ZooKeeper 3.8.4 or newer")
    if numbers(versions[0]) < ZOOKEEPER_ADVISED:
        fix = "use 3.8.4 or newer where data must not be lost (ZOOKEEPER-4785, ZOOKEEPER-4925)"
        return Check("ZooKeeper version", Verdict.WARN, found, fix)
    return Check("ZooKeeper version", Verdict.PASS, found)


def _judge_latency(serving: Sequence[ZooKeeperMember], session_timeout_s: float) -> Check:
    """Of the slowest member: a client may be given any."""
    medians_s = {member.address: statistics.median(member.round_trips_s) for member in serving}
    slowest = max(medians_s, key=lambda address: medians_s[address])
    median_s = medians_s[slowest]
    found = f"median round trip {median_s * 1e3:.1f} ms"
    if len(serving) > 1:
        found += f" through the slowest, {slowest}"
    if median_s > session_timeout_s * SLOW_SHARE:
        fix = (
            f"bring it nearer or give it a disk of its own, or raise PSA_SESSION_TIMEOUT_S above {session_timeout_s:g}"
        )
        return Check("ZooKeeper latency", Verdict.WARN, found, fix)
    return Check("ZooKeeper latency", Verdict.PASS, found)


def _judge_session(serving: Sequence[ZooKeeperMember], session_timeout_s: float) -> Check:
    granted_s = max((member.granted_s for member in serving), key=lambda each: abs(each - session_timeout_s))
    found = f"session timeout {granted_s:g} s, asked for {session_timeout_s:g} s"
    if abs(granted_s - session_timeout_s) > GRANTED_TOLERANCE * session_timeout_s:
        fix = (
            "set tickTime so that PSA_SESSION_TIMEOUT_S lies between 2 and 20 ticks: a death is noticed after that time"
        )
        return Check("ZooKeeper session", Verdict.WARN, found, fix)
    return Check("ZooKeeper session", Verdict.PASS, found)
