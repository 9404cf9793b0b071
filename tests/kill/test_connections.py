"""Connections break while all processes live: none is replaced, no term ends, and the result stays."""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import closing
from pathlib import Path

import pytest

from chaos.check.arrival import check_arrivals
from chaos.history import read_history
from psa_store.job.mode import parse_mode
from tests.harness import Run, Site

STEPS, RANKS = 120, 2
_PIDFD_GETFD = 438
"""The number of the system call, on every architecture."""


def sockets_of(pid: int) -> list[socket.socket]:
    """The sockets of another process, duplicated: what is shut down here is shut down there."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    found = []
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if not os.readlink(entry).startswith("socket:"):
                    continue
            except FileNotFoundError:
                continue
            fd = libc.syscall(_PIDFD_GETFD, pidfd, int(entry.name), 0)
            if fd >= 0:
                found.append(socket.socket(fileno=fd))
    finally:
        os.close(pidfd)
    return found


def cut(site: Site, job: str, worker: int) -> int:
    """Break all connections of a worker to the servers of its job; returns how many there were."""
    ports = {int(server.address.rpartition(":")[2]) for server in site.describe(job).servers}
    count = 0
    for sock in sockets_of(site.pids(job, "workers")[worker]):
        with closing(sock):
            try:
                if sock.family == socket.AF_INET and sock.getpeername()[1] in ports:
                    sock.shutdown(socket.SHUT_RDWR)
                    count += 1
            except OSError:
                pass  # a listener, or closed meanwhile
    return count


def start(site: Site, job: str, mode: str, compress: str, folder: Path, **options: object) -> Run:
    script = ["--steps", str(STEPS), "--pace-s", "0.03", *(["--bufferless"] if "overlap" in mode else [])]
    env = {"PSA_JOURNAL": str(folder), "PSA_CARRIER": "tcp"}
    defaults: dict[str, object] = {"workers": 2, "servers": 2, "ranks": RANKS, "commit_every": 5}
    return site.run(job, *script, env=env, mode=mode, compress=compress, **{**defaults, **options})


@pytest.mark.parametrize(
    ("name", "mode", "compress"),
    [
        ("sync", "sync", "none"),
        pytest.param("topk", "sync", "topk:0.1", marks=pytest.mark.long),
        ("speculate", "sync:speculate", "none"),
        pytest.param("rounds", "local:steps=4", "int8", marks=pytest.mark.long),
        ("overlap", "local:steps=4,fragments=2,overlap", "int4"),
        ("ssp", "ssp:staleness=2", "none"),
    ],
)
def test_a_connection_that_breaks_changes_nothing(
    site: Site, tmp_path: Path, name: str, mode: str, compress: str
) -> None:
    job, cuts, terms = f"cut-{name}", 0, set()
    run = start(site, job, mode, compress, tmp_path)
    site.wait_until_serving(run, job, 2)
    for turn, step in enumerate(range(15, STEPS - 20, 25)):
        run.wait_for_step(step)
        cuts += cut(site, job, turn % 2)
        terms.add(site.describe(job).term)
    assert run.finish() == 0, run.output
    assert cuts > 0, "there was nothing to break"
    assert len(terms) == 1, "a term ended"
    history = read_history(tmp_path)
    version = STEPS // parse_mode(mode).round_steps
    if parse_mode(mode).on_arrival:
        assert check_arrivals(history) == []
        return
    calm = start(site, f"calm-cut-{name}", mode, compress, tmp_path, workers=1, servers=1)
    assert calm.finish() == 0, calm.output
    assert site.digest(job, version) == site.digest(f"calm-cut-{name}", version)
