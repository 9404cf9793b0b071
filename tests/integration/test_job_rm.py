"""`psa job rm`: a job goes wholly or not at all, and its neighbours stay."""

from __future__ import annotations

import re
from contextlib import closing

import redis

from psa_store.coordination import Coordination
from psa_store.storage import keys
from tests.harness import Run, Site

STEPS = 20


def trained(site: Site, job: str) -> None:
    run = site.run(job, "--steps", str(STEPS), workers=1, servers=1, ranks=2, commit_every=5)
    assert run.finish() == 0, run.output


def psa(site: Site, *arguments: str) -> Run:
    run = site.psa(*arguments)
    run.finish()
    return run


def code(run: Run) -> int:
    return run.finish()


def keys_of(site: Site, job: str) -> list[str]:
    with redis.Redis.from_url(site.redis) as client:
        return [key.decode() for key in client.scan_iter("*") if re.search(rf"\{{{re.escape(job)}[:}}]", key.decode())]


def known_to_zookeeper(site: Site) -> list[str]:
    with Coordination.from_settings(site.settings, "none") as coordination:
        return coordination.jobs()


def test_all_of_a_job_goes_and_nothing_of_others(site: Site) -> None:
    trained(site, "gone")
    trained(site, "gone-2")
    assert code(psa(site, "checkpoint", "save", "gone", "--name", "kept")) == 0
    asked = psa(site, "job", "rm", "gone")
    assert code(asked) == 2 and f"Job gone is removed for good: versions {STEPS - 10}" in asked.output
    assert "checkpoints kept. Confirm with --yes." in asked.output
    before = keys_of(site, "gone")
    done = psa(site, "job", "rm", "gone", "--yes")
    assert code(done) == 0 and re.fullmatch(
        rf"removed job gone: {len(before)} keys, [\d.]+ .B of Redis, \d+ znodes", done.output
    ), done.output
    assert keys_of(site, "gone") == [] and "gone" not in known_to_zookeeper(site)
    assert code(psa(site, "checkpoint", "verify", "gone-2")) == 0 and "gone-2" in known_to_zookeeper(site)
    assert code(psa(site, "job", "rm", "gone", "--yes")) == 2, "there is no such job"
    again = site.run("gone", "--steps", "10", workers=1, servers=1, ranks=1)
    assert again.finish() == 0 and "finished 10" in again.lines, "the name is free, for another job too"


def test_a_job_that_runs_is_not_touched(site: Site) -> None:
    run = site.run("busy", "--steps", "100000", workers=1, servers=1)
    run.wait_for_step(3)
    refused = psa(site, "job", "rm", "busy", "--yes")
    assert code(refused) == 2
    assert re.search(r"job 'busy' is in use by server-\w+, worker-\w+, `psa run` \(pid \d+\)", refused.output)
    run.wait_for_step(1 + int(run.lines[-1].split()[1]))
    run.kill()


def test_what_a_fork_shares_stays_until_the_fork_goes(site: Site) -> None:
    trained(site, "parent-rm")
    assert code(psa(site, "checkpoint", "fork", "parent-rm", str(STEPS), "--as", "child-rm")) == 0
    refused = psa(site, "job", "rm", "parent-rm", "--yes")
    assert code(refused) == 2 and "parameters that child-rm began with" in refused.output
    assert code(psa(site, "checkpoint", "verify", "child-rm")) == 0
    both = psa(site, "job", "rm", "child-rm", "parent-rm", "--yes")
    assert code(both) == 0, both.output
    assert keys_of(site, "child-rm") == keys_of(site, "parent-rm") == []


def test_a_damaged_job_and_one_that_redis_has_lost_can_be_removed(site: Site) -> None:
    for job in ("rm-torn", "rm-lost"):
        trained(site, job)
    with redis.Redis.from_url(site.redis) as client:
        client.hset(keys.head("rm-torn", 0), "v:00000000000000000020", "{")
    with closing(site.store()) as store:
        store.erase_job("rm-lost")
    for job in ("rm-torn", "rm-lost"):
        done = psa(site, "job", "rm", job, "--yes")
        assert code(done) == 0, done.output
        assert keys_of(site, job) == [] and job not in known_to_zookeeper(site)
