"""The master of Redis changes in the middle of a training: it pauses and goes on, with the same bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from chaos.proxy import Proxy
from psa_store.launch import PrivateRedis
from psa_store.observe.status import Severity
from tests.failover import PASSWORD, Sentinels, eventually, replicated, told
from tests.harness import Run, Site

STEPS, COMMIT_EVERY = 120, 10
YOUNG_S = 3.0
"""How old the heartbeat of a process may be that writes one every second, on a busy machine."""


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> str:
    """Digest of a run to which nothing happens."""
    run = start(site, "failover-undisturbed")
    assert run.finish() == 0, run.output
    return site.digest("failover-undisturbed", STEPS)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[PrivateRedis]]:
    """A master and two replicas."""
    with ExitStack() as stack:
        started = replicated(tmp_path, 2)
        for server in started:
            stack.callback(server.stop)
        yield started


def start(site: Site, job: str, **env: str) -> Run:
    options = {"workers": 2, "servers": 2, "ranks": 2, "commit_every": COMMIT_EVERY}
    return site.run(job, "--steps", str(STEPS), env=env, held=True, **options)


def at(url: str, site: Site) -> Site:
    """The site with another Redis."""
    return Site(url, site.zookeeper, site.home, site.spawner)


def test_a_name_stands_for_another_master_and_old_connections_stay_open(
    site: Site, servers: list[PrivateRedis], undisturbed: str, rng: random.Random
) -> None:
    old, new = servers[:2]
    with closing(Proxy(old.address)) as proxy:
        own = at(f"redis://:{PASSWORD}@127.0.0.1:{proxy.port}", site)
        run = start(own, "name")
        run.wait_for_step(rng.randrange(15, 60))
        proxy.retarget(new.address)
        told(new).execute_command("REPLICAOF", "NO", "ONE")  # what was not replicated is lost
        told(old).execute_command("REPLICAOF", *new.address)
        run.wait_for_step(STEPS - 10)

        def recovered() -> bool:
            status = own.describe("name")
            ages = [each.heartbeat_age_s for each in (*status.servers, *status.workers)]
            sick = [each for each in status.findings if each.severity is Severity.SICK]
            return len(ages) == 4 and all(age is not None and age < YOUNG_S for age in ages) and not sick

        eventually(recovered)
        assert own.told("status", "name").returncode == 0
        assert run.finish() == 0, run.output
        assert own.digest("name", STEPS) == undisturbed
        with closing(at(new.tcp_url, site).store()) as store:
            assert all(head.manifest(STEPS) for head in store.heads("name", [0, 1]))


def test_the_master_is_killed_and_sentinels_promote_another(
    site: Site, servers: list[PrivateRedis], undisturbed: str, tmp_path: Path, rng: random.Random
) -> None:
    with ExitStack() as stack:
        sentinels = Sentinels(tmp_path / "sentinels", servers[0])
        stack.callback(sentinels.stop)
        own = at(sentinels.url, site)
        run = start(own, "sentinel")
        run.wait_for_step(rng.randrange(15, 60))
        servers[0].kill()
        eventually(lambda: sentinels.master_port() != servers[0].address[1])
        servers[0].start(120)  # it is back as a master, until a Sentinel sees it
        run.wait_for_step(STEPS - 10)
        eventually(lambda: told(servers[0]).info("replication")["role"] == "slave")
        assert run.finish() == 0, run.output
        assert own.digest("sentinel", STEPS) == undisturbed
        assert own.told("doctor").returncode == 0


@pytest.mark.parametrize("acknowledge", [1, 0])
def test_a_master_that_is_cut_off_from_its_replica_is_failed_over(
    site: Site, undisturbed: str, tmp_path: Path, rng: random.Random, acknowledge: int
) -> None:
    """Nothing that a replica acknowledged is lost; if none had to, what is lost is said."""
    job = f"cut-{acknowledge}"
    with ExitStack() as stack:
        links: list[Proxy] = []

        def link(master: tuple[str, int]) -> int:
            links.append(stack.enter_context(closing(Proxy(master))))
            return links[0].port

        old, new = replicated(tmp_path, 1, link)
        stack.callback(old.stop)
        stack.callback(new.stop)
        name = stack.enter_context(closing(Proxy(old.address)))
        own = at(f"redis://:{PASSWORD}@127.0.0.1:{name.port}", site)
        run = start(own, job, PSA_REPLICAS_ACKNOWLEDGE=str(acknowledge))
        cut_at = rng.randrange(15, 50)
        run.wait_for_step(cut_at)
        links[0].stall()
        if acknowledge:
            run.wait_for_line(lambda line: "0 of 1 replicas" in line)
            assert own.describe(job).redis.replicas_acknowledge == 1
        else:
            eventually(lambda: (own.describe(job).committed or 0) >= cut_at + 2 * COMMIT_EVERY)
        durable = own.describe(job).committed or 0
        name.retarget(new.address)
        told(new).execute_command("REPLICAOF", "NO", "ONE")
        with closing(at(new.tcp_url, site).store()) as store:
            kept = all(head.manifest(durable) is not None for head in store.heads(job, [0, 1]))
        assert kept is (acknowledge == 1)
        links[0].refuse()
        told(old).execute_command("REPLICAOF", *new.address)
        if acknowledge:
            eventually(lambda: told(new).info("replication")["connected_slaves"] == 1)
        else:
            run.wait_for_line(lambda line: "lost a committed version" in line and "steps_lost=" in line)
        assert run.finish() == 0, run.output
        assert own.digest(job, STEPS) == undisturbed
