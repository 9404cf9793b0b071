"""What waits says so: in its log, and in the status, with what is known of the cause."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from psa_store.launch import PrivateRedis
from tests.harness import PATIENCE_S, Site


@pytest.fixture
def own(site: Site, tmp_path: Path) -> Iterator[Site]:
    """The same ZooKeeper, and a Redis that refuses what the test does not allow."""
    server = PrivateRedis(tmp_path / "redis")
    server.start(PATIENCE_S)
    yield Site(server.url, site.zookeeper, tmp_path, site.spawner)
    server.stop()


def held_up(site: Site, job: str, of: Callable[[str], bool]) -> str:
    """Wait until the status says what a process waits for."""
    pause, end_s = threading.Event(), time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        status = site.describe(job)
        said = [str(each.held_up) for each in (*status.servers, *status.workers) if each.held_up]
        if found := [each for each in said if of(each)]:
            assert any(found[0] in finding.what for finding in status.findings)
            return found[0]
        pause.wait(0.1)
    raise AssertionError(f"not in the status: {said}")


def test_a_server_says_whose_gradients_are_missing_and_a_worker_whose_version(site: Site) -> None:
    env = {"PSA_SESSION_TIMEOUT_S": "60"}  # nothing is given to others meanwhile
    run = site.run("waits", "--steps", "100000", "--pace-s", "0.01", workers=2, env=env)
    run.wait_for_step(12)
    paused = site.describe("waits").workers[0]
    os.kill(paused.pid, signal.SIGSTOP)
    try:
        gradients = rf"gradients of step \d+ from rank {paused.ranks[0]} \({paused.id}\)"
        run.wait_for_line(lambda line: bool(re.search(f"waiting for {gradients}", line)))
        run.wait_for_line(lambda line: bool(re.search(r"waiting for version \d+ from server-", line)))
        held_up(site, "waits", lambda text: bool(re.fullmatch(gradients, text)))
    finally:
        os.kill(paused.pid, signal.SIGCONT)
    run.wait_for_line(lambda line: bool(re.search(f"waited for {gradients}", line)))
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0, run.output


def test_the_end_of_a_job_that_redis_refuses_is_not_silent(own: Site) -> None:
    run = own.run("ends", "--steps", "40", "--pace-s", "0.01", workers=1, commit_every=10, held=True)
    run.wait_for_step(12)
    with redis.Redis.from_url(own.redis) as client:
        client.execute_command("ACL", "SETUSER", "default", "-hdel")
        try:
            run.wait_for_line(lambda line: "waiting for Redis to commit version" in line and "'hdel'" in line)
            end = Path(own.home / "ends.end")
            end.touch()
            run.wait_for_line(lambda line: "durable, for workers that wait for that" in line and "waiting for" in line)
            run.wait_for_line(lambda line: bool(re.search(r"waiting for server-\S+ to make version \d+ durable", line)))
            held_up(own, "ends", lambda text: "Redis to commit version" in text and "'hdel'" in text)
        finally:
            client.execute_command("ACL", "SETUSER", "default", "+hdel")
    assert run.finish() == 0, run.output
    begun = [line for line in run.output.splitlines() if "waiting for Redis to commit version" in line]
    assert len(begun) < 8, "five times a second before"
