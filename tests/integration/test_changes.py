"""Numbers of the optimizer that change while a job lives: from a version on, with the same bits whatever dies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import psa_store as psa
from psa_store.checkpoint.change import Changed, change_job, newest_config
from psa_store.checkpoint.reader import open_version
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, JobBusy, JobMismatch, UsageError
from psa_store.job.change import Numbers
from psa_store.job.config import JobConfig, job_config_from_json
from psa_store.job.position import Reading, begin
from psa_store.job.sampling import SampleOrder
from psa_store.storage import keys
from tests.harness import Servers, Site
from tests.integration.toy import make_data, make_model

SEED = 5
RANKS = 2
PATIENCE_S = 120.0


Turn = Callable[[psa.Worker], None]


pytestmark = pytest.mark.usefixtures("environment")


def coordination(site: Site, job: str) -> Coordination:
    return Coordination(site.zookeeper, job, session_timeout_s=8, connect_timeout_s=30, wake=threading.Event().set)


def run(
    site: Site,
    job: str,
    steps: int,
    after: Turn = lambda worker: None,
    lr: float = 0.1,
    **options: Any,
) -> nn.Module:
    """One stretch of a job."""
    servers = Servers(site, job, 2)
    model = make_model()
    options = {"ranks": RANKS, "optimizer": psa.optim.AdamW(lr=lr, weight_decay=0.1, clip_grad_norm=1.0)} | options
    try:
        with psa.Worker(job, model, steps=steps, seed=SEED, shard_bytes=4096, **options) as worker:
            for x, y in worker.batches(make_data(), batch_size=8):
                nn.functional.mse_loss(model(x), y).backward()
                version = worker.version
                worker.step()
                if worker.version > version:
                    after(worker)
    finally:
        servers.stop()
    return model


def plain(
    steps: int, numbers_at: Callable[[int], dict[str, float]], batch_size_at: Callable[[int], int] = lambda step: 8
) -> nn.Module:
    model, data = make_model(), make_data()
    record = begin(Reading(8, len(data), len(data)))
    order = SampleOrder(SEED, ranks=RANKS, batch_size=8, n=len(data))
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(steps):
        adamw.zero_grad()
        record = record.changed(Reading(batch_size_at(step), len(data), len(data)), step)
        for rank in range(RANKS):
            indices = order.at(*record.place_of(step, rank, RANKS))
            x, y = (torch.stack([data[i][part] for i in indices]) for part in (0, 1))
            (nn.functional.mse_loss(model(x), y) / RANKS).backward()
        numbers = numbers_at(step)
        if numbers["clip"]:
            nn.utils.clip_grad_norm_(model.parameters(), numbers["clip"])
        adamw.param_groups[0] |= {"lr": numbers["lr"], "weight_decay": numbers["weight_decay"]}
        adamw.step()
    return model


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def assert_close(left: nn.Module, right: nn.Module) -> None:
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


BEFORE = {"lr": 0.1, "weight_decay": 0.1, "clip": 1.0}
AFTER = {"lr": 0.01, "weight_decay": 0.0, "clip": 0.0}


def test_a_script_changes_numbers_from_the_present_version_on(site: Site) -> None:
    """The present version is made durable for it, so nothing is computed again."""

    def after(worker: psa.Worker) -> None:
        if worker.version == 5:
            worker.change(lr=0.01, weight_decay=0.0, clip_grad_norm=0.0)

    model = run(site, "change-script", 12, after)
    assert_close(model, plain(12, lambda step: BEFORE if step < 5 else AFTER))
    with site.store() as store, coordination(site, "change-script") as ours:
        assert [each.step for each in newest_config(store, ours, "change-script").changes] == [5]


def test_the_change_is_there_after_a_resume_and_a_rollback(site: Site) -> None:
    """Also where training goes on from before it."""

    def after(worker: psa.Worker) -> None:
        if worker.version == 5 and not worker.state.get("changed"):
            worker.state["changed"] = True
            worker.change(lr=0.01)

    whole = run(site, "change-whole", 12, after, state={})
    run(site, "change-parts", 4, after, state={})
    done = site.told("checkpoint", "save", "change-parts", "--name", "early")
    assert done.returncode == 0, done.stderr
    run(site, "change-parts", 7, after, state={})
    parts = run(site, "change-parts", 12, after, state={})
    assert_equal(whole, parts)
    done = site.told("checkpoint", "rollback", "change-parts", "early", "--yes")
    assert done.returncode == 0, done.stderr
    again = run(site, "change-parts", 12, state={})
    assert_equal(whole, again)


def test_a_person_changes_a_job_at_rest(site: Site) -> None:
    run(site, "change-rest", 5)
    done = site.told("job", "set", "change-rest", "lr=0.01", "weight_decay=0", "clip_grad_norm=0", "--yes")
    assert done.returncode == 0, done.stderr
    assert "from version 5 on lr=0.01 weight_decay=0 clip_grad_norm=0" in done.stdout
    model = run(site, "change-rest", 12)
    assert_close(model, plain(12, lambda step: BEFORE if step < 5 else AFTER))
    status = site.told("status", "change-rest")
    assert "from step 5 on lr=0.01" in status.stdout
    assert "changed" in site.told("status", "change-rest", "--json").stdout


def test_a_job_that_runs_goes_on_from_its_newest_durable_version(site: Site) -> None:
    changed: list[int] = []

    def after(worker: psa.Worker) -> None:
        if worker.version == 6 and not changed:
            with site.store() as store, coordination(site, "change-live") as zk:
                changed.append(change_job(store, zk, "change-live", Numbers(lr=0.01)).version)

    model = run(site, "change-live", 12, after)
    (version,) = changed
    assert version <= 6
    numbers = BEFORE | {"lr": 0.01}
    assert_close(model, plain(12, lambda step: BEFORE if step < version else numbers))


@pytest.mark.parametrize("mode", ["async", "local:steps=2,momentum=0"])
def test_other_modes_follow_a_change(site: Site, mode: str) -> None:
    """With one rank async computes what plain AdamW does; in rounds a rate of 0 stands still."""
    job = f"change-{mode.partition(':')[0]}"
    before = run(site, job, 4, mode=mode, ranks=1)
    done = site.told("job", "set", job, "lr=0", "--yes")
    assert done.returncode == 0, done.stderr
    after = run(site, job, 8, mode=mode, ranks=1)
    assert_equal(before, after)


def test_a_script_may_say_what_was_or_what_is_now(site: Site) -> None:
    run(site, "change-said", 3)
    with pytest.raises(JobMismatch, match=r"lr=0\.1, this process has lr=0\.02.*`psa job set change-said lr=0\.02`"):
        run(site, "change-said", 4, lr=0.02)
    assert site.told("job", "set", "change-said", "lr=0.02", "--yes").returncode == 0
    run(site, "change-said", 4, lr=0.02)
    run(site, "change-said", 5, lr=0.1)
    with pytest.raises(JobMismatch, match=r"exists with optimizer='AdamW', this process has optimizer='SGD'"):
        run(site, "change-said", 6, optimizer=psa.optim.SGD(lr=0.1))
    with pytest.raises(JobMismatch, match=r"exists with eps="):
        run(site, "change-said", 6, optimizer=psa.optim.AdamW(0.02, weight_decay=0.1, clip_grad_norm=1.0, eps=1e-3))


@pytest.mark.parametrize("text", ["lr", "lr=fast", "momentum=0.9", "lr=-1", "lr=nan"])
def test_what_can_not_be_set_is_refused(site: Site, text: str) -> None:
    done = site.told("job", "set", "nobodys", text, "--yes")
    assert done.returncode == 2
    assert text.partition("=")[0] in done.stderr and done.stderr.startswith("psa: ")
    assert done.stderr.count("\n") == 1, done.stderr


def test_change_is_refused_where_it_could_not_be_exact(site: Site) -> None:
    servers = Servers(site, "change-refused", 1)
    model, rule = make_model(), psa.optim.SGD(lr=0.1)
    with (
        pytest.raises(UsageError, match=r"test_changes\.py:\d+.*in mode async use `psa job set"),
        psa.Worker("change-refused", model, optimizer=rule, steps=4, mode="async") as worker,
    ):
        for _ in worker.batches(make_data(), batch_size=8):
            with pytest.raises(UsageError, match=r"between worker\.step"):
                worker.change(lr=0.01)
            worker.step()
            worker.change(lr=0.01)
    servers.stop()


def test_where_redis_or_zookeeper_has_fewer_changes_it_is_brought_up_to_date(site: Site) -> None:
    run(site, "change-behind", 3)
    with site.store() as store, coordination(site, "change-behind") as zk:
        first = newest_config(store, zk, "change-behind")
        change_job(store, zk, "change-behind", Numbers(lr=0.5))
        changed = newest_config(store, zk, "change-behind")
        assert [each.step for each in changed.changes] == [3]
        zk.replace_config(first)
        assert newest_config(store, zk, "change-behind") == changed == zk.read_config()
        assert store.replace_config("change-behind", changed.to_json(), first.to_json())
        assert newest_config(store, zk, "change-behind") == changed
        found = store.read_job("change-behind")
        assert found is not None and job_config_from_json(found[0]) == changed
        for garbage in (b"\xff", b"{", b"[]", b'{"format": 99}'):
            store._client.set(keys.config("change-behind"), garbage)
            assert newest_config(store, zk, "change-behind") == changed
        zk._session.run(lambda znodes: znodes.set(f"{zk._job}/config", "["))
        assert newest_config(store, zk, "change-behind") == changed == zk.read_config()
        store._client.set(keys.config("change-behind"), "{")
        zk._session.run(lambda znodes: znodes.set(f"{zk._job}/config", "{"))
        with pytest.raises(DataIntegrity, match="ZooKeeper has no other"):
            newest_config(store, zk, "change-behind")
        store.documents("change-behind").overwrite(config=changed.to_json())  # other tests look at all jobs
        assert newest_config(store, zk, "change-behind") == changed == zk.read_config()


class RevisedMeanwhile(Coordination):
    """A controller revises the plan of the old term just before the change's own plan is published, once."""

    def replace_config(self, config: JobConfig) -> None:
        super().replace_config(config)
        seen = self.read_plan()
        assert seen is not None and seen.plan.owners
        assert self.write_plan(replace(seen.plan, revision=seen.plan.revision + 1), seen) is not None


def test_a_change_begins_its_term_although_the_old_ones_plan_is_revised_meanwhile(site: Site) -> None:
    """Else steps would be computed with the old numbers, until the old term may not commit them."""
    job = "change-revised"
    servers, model, done = Servers(site, job, 1), make_model(), list[Changed]()
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), steps=9, ranks=1, seed=SEED) as worker:
        for x, y in worker.batches(make_data(), batch_size=8):
            nn.functional.mse_loss(model(x), y).backward()
            worker.step()
            if worker.version == 3 and not done:  # once: it goes back to what is durable, and comes here again
                old = worker.term
                with (
                    site.store() as store,
                    RevisedMeanwhile(
                        site.zookeeper, job, session_timeout_s=8, connect_timeout_s=30, wake=threading.Event().set
                    ) as zk,
                ):
                    done.append(change_job(store, zk, job, Numbers(lr=0)))
                    published = zk.read_plan()
                assert published is not None and published.plan.term >= done[0].term > old
    assert done and worker.finished
    servers.stop()


def test_batch_size_and_end_are_set_while_a_job_rests(site: Site) -> None:
    """From that version on steps have 12 samples, the next ones; the script goes on saying 8, and 5 steps."""
    run(site, "change-loop", 5)
    done = site.told("job", "set", "change-loop", "batch_size=12", "steps=9", "--yes")
    assert done.returncode == 0, done.stderr
    assert "from version 5 on batch_size=12 steps=9" in done.stdout
    told: list[tuple[int, int | None, bool]] = []
    model = run(site, "change-loop", 5, lambda worker: told.append((worker.version, worker.steps, worker.finished)))
    assert told == [(6, 9, False), (7, 9, False), (8, 9, False), (9, 9, True)]
    assert_close(model, plain(9, lambda step: BEFORE, lambda step: 8 if step < 5 else 12))
    status = site.told("status", "change-loop")
    assert "from step 5 on batch_size=12 steps=9" in status.stdout
    for text, why in {
        "steps=8": "steps=8: job 'change-loop' has made 9 already",
        "batch_size=13": "divisible by ranks=2: use 12",
        "steps=many": "'many' is no whole number",
    }.items():
        refused = site.told("job", "set", "change-loop", text, "--yes")
        assert refused.returncode == 2 and why in refused.stderr, refused.stderr
    rule = psa.optim.AdamW(lr=0.1, weight_decay=0.1, clip_grad_norm=1.0)
    options: dict[str, Any] = {"optimizer": rule, "seed": SEED, "shard_bytes": 4096}
    with (
        pytest.raises(JobMismatch, match=r"batch_size=12 from step 5 on, this process has batch_size=16\."),
        psa.Worker("change-loop", make_model(), **options) as worker,
    ):
        next(worker.batches(make_data(), batch_size=16))


def test_batch_size_and_end_are_set_while_a_job_runs(site: Site) -> None:
    """All its workers go over to them in one step: their ranks read each sample once."""
    changed: list[int] = []

    def after(worker: psa.Worker) -> None:
        if worker.version == 6 and not changed:
            with site.store() as store, coordination(site, "change-loop-live") as zk:
                numbers = Numbers(batch_size=4, steps=10)
                changed.append(change_job(store, zk, "change-loop-live", numbers).version)

    model = run(site, "change-loop-live", 30, after)
    (version,) = changed
    assert version <= 6
    assert_close(model, plain(10, lambda step: BEFORE, lambda step: 8 if step < version else 4))


def test_where_ranks_are_at_steps_of_their_own_a_job_must_rest(site: Site) -> None:
    """Then the change counts from the first step that no rank has made; rounds stay whole."""
    run(site, "change-arrival", 4, mode="async")
    assert site.told("job", "set", "change-arrival", "batch_size=4", "steps=6", "--yes").returncode == 0
    refused: list[str] = []

    def after(worker: psa.Worker) -> None:
        if not refused:
            with site.store() as store, coordination(site, "change-arrival") as zk:
                with pytest.raises(JobBusy, match="while it rests") as error:
                    change_job(store, zk, "change-arrival", Numbers(steps=9))
                refused.append(str(error.value))

    run(site, "change-arrival", 4, after, mode="async")
    assert refused
    with site.store() as store:
        assert open_version(store, "change-arrival").version == 6 * RANKS
        _, record = store.data_record("change-arrival").read()
    assert record is not None and [(each.step, each.reading.batch) for each in record.stretches] == [(0, 8), (4, 4)]
