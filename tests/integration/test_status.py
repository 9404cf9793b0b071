"""`psa status` shows what a running job does, to people and to programs."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from psa_store.cli.status_view import job_view, overview
from psa_store.cluster import Cell, Phase
from psa_store.coordination import probe_zookeeper
from psa_store.errors import Disconnected
from psa_store.job.document import from_text
from psa_store.launch import PrivateRedis, PrivateZooKeeper
from psa_store.observe.status import JobStatus
from psa_store.observe.status.assemble import assemble
from psa_store.observe.status.views import RedisView, ZooKeeperView
from psa_store.wire import Door, inspect
from tests.harness import PSA, Site


def test_no_cell_is_cut_for_a_long_name_of_a_job() -> None:
    name = "long-" * 18
    at_rest = ZooKeeperView("zk1:2181", 4.0)
    job = assemble(name, 0.0, RedisView("redis://db:6379", committed=120), at_rest, {}, 0.0)
    console = Console(width=80, file=StringIO(), record=True)
    console.print(overview([job], 80))
    shown = console.export_text()
    assert "at rest" in shown and "120" in shown and "…" not in shown
    assert name in "".join(line.split()[0] for line in shown.splitlines() if line.strip())


def test_a_running_job_is_described(site: Site) -> None:
    run = site.run("described", "--steps", "100000", "--pace-s", "0.01", workers=2, servers=2, commit_every=5)
    run.wait_for_step(12)
    site.wait_until_serving(run, "described", 2)
    asked = site.psa("status", "described", "--json")
    assert asked.finish() == 0, asked.output
    found = from_text(JobStatus, asked.output, "the output")
    assert found.phase is Phase.RUN and found.ranks == 2 and found.committed is not None and found.committed % 5 == 0
    assert sum(server.shards for server in found.servers) == found.shards
    assert sorted(rank for worker in found.workers for rank in worker.ranks) == [0, 1]
    for server in found.servers:
        assert server.version is not None and server.version >= 12
        assert server.lag is not None and 0 <= server.lag <= 10
    shown = site.psa("status", "described")
    assert shown.finish() == 0 and "controller" in shown.output and "running" in shown.output
    assert "page http://" in shown.output

    sleeper = next(server for server in found.servers if server.id != found.controller)
    os.kill(sleeper.pid, signal.SIGSTOP)
    try:
        silent = next(each for each in site.describe("described").servers if each.id == sleeper.id)
    finally:
        os.kill(sleeper.pid, signal.SIGCONT)
    assert silent.version is None and "does not answer" in silent.problem
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0, run.output
    listed = site.psa("status")
    assert listed.finish() == 0 and "described" in listed.output and "at rest" in listed.output


def test_a_job_in_stages_shows_which_worker_waits_for_which(site: Site) -> None:
    """The worker of the last stage is paused: the one of the first waits for it, and is not the slow one."""
    root = Path(__file__).parents[2]
    arguments = ("--steps", "100000", "--stages", "2", "--microbatches", "2", "--pace-s", "0.01")
    run = site.run(
        "staged",
        *arguments,
        script=root / "chaos" / "staged.py",
        env={"PYTHONPATH": str(root), "PSA_SESSION_TIMEOUT_S": "30"},
        workers=2,
        servers=1,
        ranks=1,
        commit_every=10,
    )
    run.wait_for_step(5)

    def look_until(found: Callable[[JobStatus], bool]) -> JobStatus:
        watched = site.psa("status", "staged", "--watch", "--json")
        line = watched.wait_for_line(lambda line: line.startswith("{") and found(from_text(JobStatus, line, "it")))
        watched.process.send_signal(signal.SIGINT)
        assert watched.finish() == 0, watched.output
        return from_text(JobStatus, line, "it")

    def shares_out(status: JobStatus) -> bool:
        """The worker that came first may have had both stages, and shows for a while how fast it was."""
        counted = [each for each in status.workers if each.loss is not None or each.samples_per_s is not None]
        return status.loss is not None and bool(status.samples_per_s) and len(status.workers) == 2 and len(counted) == 1

    status = look_until(shares_out)
    assert (status.ranks, status.stages, status.microbatches) == (1, 2, 2) and status.unheld == ()
    first, last = sorted(status.workers, key=lambda each: each.cells)
    assert (first.cells, last.cells) == ((Cell(0, 0),), (Cell(0, 1),))
    assert first.loss is None and first.samples_per_s is None, "they count once"
    os.kill(last.pid, signal.SIGSTOP)
    try:
        status = look_until(
            lambda status: (
                any(each.waits_for == last.cells for each in status.workers)
                and any(each.member == last.id and f"{first.id} waits for it" in each.what for each in status.findings)
            )
        )
        console = Console(width=160, file=StringIO(), record=True)
        console.print(job_view(status, 160))
        shown = console.export_text()
        assert "waits for stage 1 of rank 0" in shown and "2 stages, 2 micro-batches" in shown
        assert "holds stage 1 of rank 0" in shown and f"worker {first.id} (" not in shown
    finally:
        os.kill(last.pid, signal.SIGCONT)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0, run.output


@pytest.fixture
def own_site(tmp_path: Path) -> Iterator[tuple[Site, PrivateRedis, PrivateZooKeeper]]:
    """Servers that a test may stop."""
    redis, zookeeper = PrivateRedis(tmp_path / "redis"), PrivateZooKeeper(tmp_path / "zookeeper")
    try:
        redis.start(120)
        zookeeper.start(120)
        yield Site(redis.url, zookeeper.hosts, tmp_path), redis, zookeeper
    finally:
        redis.stop()
        zookeeper.stop()


def ask(site: Site, *arguments: str) -> tuple[int, str]:
    asked = site.psa("status", *arguments)
    return asked.finish(), asked.output


def test_outages_are_shown_first_and_looked_through(own_site: tuple[Site, PrivateRedis, PrivateZooKeeper]) -> None:
    site, redis, zookeeper = own_site
    run = site.run("outage", "--steps", "100000", "--pace-s", "0.02", workers=2, servers=1, commit_every=50)
    run.wait_for_step(5)
    watched = site.psa("status", "outage", "--watch", "--json")

    def found(line: str) -> bool:
        document = json.loads(line)
        return document["findings"] == [] and all(each["step"] is not None for each in document["workers"])

    watched.wait_for_line(found)
    redis.stop()
    watched.wait_for_line(lambda line: json.loads(line)["redis"]["problem"] != "")
    code, output = ask(site, "outage", "--json")
    document = json.loads(output)
    assert code == 3 and document["findings"][0]["what"] == document["redis"]["problem"], output
    assert document["findings"][0]["look"] == "psa doctor outage"
    assert [each["version"] is not None for each in document["servers"]] == [True], "servers still say what they have"
    assert sorted(rank for each in document["workers"] for rank in each["ranks"]) == [0, 1]
    code, output = ask(site)
    assert code == 3 and "outage" in output and "SICK" in output, "ZooKeeper knows the jobs as well"
    redis.start(120)
    watched.wait_for_line(lambda line: json.loads(line)["redis"]["problem"] == "")

    zookeeper.stop()
    watched.wait_for_line(lambda line: json.loads(line)["zookeeper"]["problem"] != "")
    code, output = ask(site, "outage")
    lines = output.splitlines()
    assert code == 3 and lines[1].startswith(" SICK  ZooKeeper"), output
    assert "worker-" in output and "server-" in output, "members with a fresh heartbeat are shown"
    redis.stop()
    code, output = ask(site)
    assert code == 3 and "Redis at" in output and "ZooKeeper at" in output and "Traceback" not in output
    code, output = ask(site, "outage", "--json")
    assert code == 3 and [each["severity"] for each in json.loads(output)["findings"]] == ["sick", "sick"]
    redis.start(120)
    zookeeper.start(120)
    watched.wait_for_line(found)
    watched.process.send_signal(signal.SIGINT)
    assert watched.finish() == 0, "to stop watching is no failure"
    assert not [line for line in watched.lines if line and not line.startswith("{")]
    run.process.send_signal(signal.SIGTERM)
    run.finish()


def test_watching_on_a_terminal_restores_it(site: Site) -> None:
    """The alternate screen is left again, and what was there before is still there."""
    ours, theirs = pty.openpty()
    env = {**os.environ, **site.env, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen([*PSA, "status", "--watch"], env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = bytearray()
    entered = threading.Event()

    def read() -> None:
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                return
            if not part:
                return
            output.extend(part)
            if b"\x1b[?1049h" in output and b"job" in output:
                entered.set()

    reader = threading.Thread(target=read, name="test-terminal")
    reader.start()
    try:
        assert entered.wait(30), bytes(output)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        reader.join(30)
        os.close(ours)
    assert b"\x1b[?1049l" in output and b"Traceback" not in output


def test_a_closed_output_ends_the_watch(site: Site) -> None:
    process = subprocess.Popen(
        [*PSA, "status", "--watch", "--json"],
        env={**os.environ, **site.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        json.loads(process.stdout.readline())
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_an_unknown_job_is_a_usage_error(site: Site) -> None:
    for flags in ([], ["--watch"]):
        code, output = ask(site, "never", *flags)
        assert code == 2 and "no job 'never'" in output


def test_status_imports_neither_torch_nor_numpy_nor_structlog() -> None:
    """A command waits for all that it imports."""
    code = "import sys, psa_store.cli.app, psa_store.cli.status; print([m for m in sys.argv[1:] if m in sys.modules])"
    command = [sys.executable, "-c", code, "torch", "numpy", "structlog"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_look_finds_a_paused_server_in_bounded_time(site: Site) -> None:
    """A paused server costs one deadline, not one for each that is paused."""
    run = site.run("paused", "--steps", "100000", "--pace-s", "0.02", workers=1, servers=3)
    site.wait_until_serving(run, "paused", 3)
    pids = site.pids("paused", "servers")
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        began_s = time.monotonic()
        status = site.describe("paused")
        took_s = time.monotonic() - began_s
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    silent = {each.member for each in status.findings if "does not answer" in each.what}
    assert len(pids) == 3 and silent == {each.id for each in status.servers}
    assert took_s < 2.5, took_s
    run.process.send_signal(signal.SIGTERM)
    run.finish()


def test_a_peer_that_is_silent_or_trickles_is_given_up_in_time() -> None:
    """Neither a server nor a ZooKeeper that accepts connections and does not speak keeps a look waiting."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "{}:{}".format(*listener.getsockname())

        def trickle() -> None:
            first, _ = listener.accept()
            with first:
                while not done.wait(0.1):
                    try:
                        first.sendall(b"P")
                    except OSError:
                        return

        peer = threading.Thread(target=trickle, name="test-trickle")
        peer.start()
        try:
            began_s = time.monotonic()
            with pytest.raises(Disconnected, match="does not answer"):
                inspect(address, "", "", 0.5, Door("any"))
            assert time.monotonic() - began_s < 2.0
        finally:
            done.set()
            peer.join()
        (member,) = probe_zookeeper(address, 0.3)
        assert not member.serves and "says nothing within 0.3 s" in member.problem
