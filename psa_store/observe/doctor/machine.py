"""Judgements on this machine and what is installed on it. Pure: facts in, checks out."""

from __future__ import annotations

import re
from collections.abc import Mapping

from psa_store.observe.doctor.check import Check, Verdict
from psa_store.observe.formatting import count

OLDEST: Mapping[str, tuple[int, ...]] = {"python": (3, 11), "torch": (2, 4), "redis": (5, 2), "kazoo": (2, 10)}
"""As pyproject.toml demands it."""
_CALLED = {"redis": "redis-py"}
"""A package whose name is also that of a server."""

DESCRIPTORS_PER_RANK = 4
"""Of a server: a connection, the memory of the rank's gradients, and as much again while one that was cut off is
replaced."""
DESCRIPTORS_BESIDE = 128
"""What a process has open besides: libraries, Redis, ZooKeeper, other servers."""
LOOPBACK_SLOW_BYTES_PER_S = 500e6
"""A tenth of what plain sockets reach on an ordinary machine."""


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to compare by: 2.13.0+cpu is (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def judge_installed(package: str, version: str | None) -> Check:
    """``version``: None if it is not installed, or under another name."""
    name = _CALLED.get(package, package)
    oldest = ".".join(map(str, OLDEST[package]))
    fix = f"install Python {oldest} or newer" if package == "python" else f"pip install '{package}>={oldest}'"
    if version is None:
        return Check(name, Verdict.WARN, "its version is not known", fix)
    if numbers(version) < OLDEST[package]:
        return Check(name, Verdict.FAIL, f"{version}, older than {oldest}", fix)
    return Check(name, Verdict.PASS, version)


def judge_descriptors(limit: int, ranks: int, stages: int = 1) -> Check:
    """``limit``: files that a process may have open. ``ranks``: of the job; 1 if none is meant."""
    needed = DESCRIPTORS_BESIDE + DESCRIPTORS_PER_RANK * ranks * stages  # there may be a worker for each cell
    shared_out = count(ranks, "rank") if stages == 1 else f"{stages} stages of {count(ranks, 'rank')}"
    found = f"{limit} open files for a process; a server may need {needed} for {shared_out}"
    if limit < needed:
        enough = max(4096, 1 << (needed - 1).bit_length())
        fix = f"`ulimit -n {enough}` before psa starts, or LimitNOFILE={enough} in its systemd unit"
        return Check("file descriptors", Verdict.WARN, found, fix)
    return Check("file descriptors", Verdict.PASS, found)


def judge_loopback(bytes_per_s: float) -> Check:
    found = f"{bytes_per_s / 1e6:.0f} MB/s over TCP to this machine itself"
    if bytes_per_s < LOOPBACK_SLOW_BYTES_PER_S:
        fix = "see what else runs here (`top`), and whether a sandbox or a firewall handles packets of 127.0.0.1"
        return Check("loopback", Verdict.WARN, found, fix)
    return Check("loopback", Verdict.PASS, found)


def no_loopback(why: str) -> Check:
    return Check("loopback", Verdict.WARN, why, "`ip link set lo up`: without it nothing here can talk over TCP")
