"""What real jobs publish, seen from outside, while what they need is killed, paused and brought back."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import redis as redis_client
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

import psa_store as psa
from psa_store.cluster import Member, ProcessRole, View
from psa_store.config import Settings
from psa_store.errors import UsageError
from psa_store.launch import PrivateRedis, PrivateZooKeeper
from psa_store.observe import Activity, EventKind, Events, JobHistory, Monitor
from psa_store.observe.heartbeat import Heartbeat
from psa_store.observe.metrics import METRICS, Kind, Metrics
from psa_store.storage import History, keys
from tests.harness import Site
from tests.integration.test_endpoint import get, held

PATIENCE_S = 120.0
T = TypeVar("T")


def eventually(look: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """The first answer that is true, of something that gives no event."""
    pause, end_s = threading.Event(), time.monotonic() + patience_s
    while not (found := look()):
        assert time.monotonic() < end_s, "it did not happen in time"
        pause.wait(0.05)
    return found


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[PrivateRedis]:
    server = PrivateRedis(tmp_path / "redis")
    server.start(120)
    yield server
    server.stop()


@pytest.fixture
def zookeeper(tmp_path: Path) -> Iterator[PrivateZooKeeper]:
    server = PrivateZooKeeper(tmp_path / "zookeeper")
    server.start(120)
    yield server
    server.stop()


@pytest.fixture
def own(redis: PrivateRedis, zookeeper: PrivateZooKeeper, tmp_path: Path) -> Site:
    return Site(redis.url, zookeeper.hosts, tmp_path)


@contextmanager
def history_of(site: Site, job: str) -> Iterator[JobHistory]:
    with closing(JobHistory(job, site.redis, timeout_s=5.0)) as history:
        yield history


def heartbeats_by_role(history: JobHistory, since: float = 0.0) -> dict[ProcessRole, list[Heartbeat]]:
    fresh = [each for each in history.heartbeats().values() if each is not None and each.time > since]
    return {role: [each for each in fresh if each.role is role] for role in ProcessRole}


def all_there(history: JobHistory, count: int, since: float = 0.0) -> bool:
    return all(len(found) == count for found in heartbeats_by_role(history, since).values())


def moved(history: JobHistory) -> bool:
    """Whether every worker has published a loss, and every server a commit."""
    found = heartbeats_by_role(history)
    return all("loss" in heartbeat.metrics for heartbeat in found[ProcessRole.WORKER]) and all(
        heartbeat.metrics.get("commits") for heartbeat in found[ProcessRole.SERVER]
    )


def kinds_of(history: JobHistory) -> list[str]:
    return [event.kind.value for event in history.events()]


def check_metrics(job: str, heartbeat: Heartbeat) -> None:
    """Exactly the metrics of its role are there, under their names, and what Prometheus's client knows of a process."""
    status, content_type, body = get(heartbeat.endpoint, "/metrics")
    assert status == 200 and content_type.startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    role = heartbeat.role
    wanted = {f"psa_{metric.name}": metric for metric in METRICS if role in metric.roles}
    assert {name for name in families if not name.startswith("process_")} == wanted.keys()
    assert "process_resident_memory_bytes" in families
    for name, metric in wanted.items():
        assert families[name].type == metric.kind.value
        for sample in families[name].samples:
            assert sample.name == name + ("_total" if metric.kind is Kind.COUNTER else "")
            assert sample.labels == {"job": job, "member": heartbeat.member, "role": role.value}
    for name, value in heartbeat.metrics.items():
        (sample,) = families[f"psa_{name}"].samples
        if METRICS_BY_NAME[name].kind is Kind.COUNTER:
            assert sample.value >= value


METRICS_BY_NAME = {metric.name: metric for metric in METRICS}


def test_a_job_publishes_what_happens_to_it(own: Site, redis: PrivateRedis) -> None:
    """From its creation over the death of its controller and a restart of Redis to its end."""
    job, steps, calm = "told", 1000, own.home / "calm"
    pace = ("--pace-s", "0.05", "--paced-until", str(calm))
    run = own.run(job, "--steps", str(steps), *pace, workers=2, servers=2, commit_every=10)
    run.wait_for_step(30)
    with history_of(own, job) as history:
        eventually(lambda: all_there(history, 2) and moved(history))
        heartbeats = heartbeats_by_role(history)
        described = own.describe(job)
        assert {heartbeat.pid for heartbeat in heartbeats[ProcessRole.SERVER]} == {
            server.pid for server in described.servers
        }
        for heartbeat in (*heartbeats[ProcessRole.SERVER], *heartbeats[ProcessRole.WORKER]):
            assert abs(heartbeat.time - time.time()) < 5.0 and (heartbeat.resident_bytes or 0) > 1 << 20
            assert heartbeat.metrics["term"] == described.term
            assert heartbeat.metrics["sent_bytes"] > 0 and heartbeat.metrics["received_bytes"] > 0
            check_metrics(job, heartbeat)
            assert get(heartbeat.endpoint, "/healthz")[0] == get(heartbeat.endpoint, "/readyz")[0] == 200
        assert sorted(rank for heartbeat in heartbeats[ProcessRole.WORKER] for rank in heartbeat.ranks) == [0, 1]
        for heartbeat in heartbeats[ProcessRole.WORKER]:
            assert heartbeat.stage in ("computing", "waiting")
            assert heartbeat.metrics["samples"] == 6 * heartbeat.metrics["steps"]
            assert heartbeat.samples_per_s == pytest.approx(6 * (heartbeat.steps_per_s or 0.0), rel=1e-3)
            assert 0.0 < heartbeat.metrics["learning_rate"] <= 0.01
            assert heartbeat.metrics["compute_seconds"] > 0.0 and heartbeat.metrics["wait_seconds"] > 0.0
        for heartbeat in heartbeats[ProcessRole.SERVER]:
            assert heartbeat.metrics["gradient_norm"] > 0.0 and heartbeat.metrics["commit_seconds"] > 0.0
        assert sum(heartbeat.metrics["controller"] for heartbeat in heartbeats[ProcessRole.SERVER]) == 1.0
        assert sum(heartbeat.shards for heartbeat in heartbeats[ProcessRole.SERVER]) == described.shards
        assert kinds_of(history).count("created") == 1

        victim = next(server for server in described.servers if server.id == described.controller)
        os.kill(victim.pid, signal.SIGKILL)
        eventually(lambda: "recovered" in kinds_of(history))
        events = history.events()
        gone = next(event for event in events if event.kind == "server-gone")
        assert gone.member == victim.id
        recovered = next(event for event in events if event.kind == "recovered")
        assert victim.id in recovered.text and "computed again" in recovered.text
        assert None not in (recovered.term, described.term, recovered.version)
        assert recovered.term > described.term and recovered.version % 10 == 0  # type: ignore[operator]
        # It is back under another name, and gets its shards with a hand-over.
        eventually(lambda: "hand-over" in kinds_of(history))

        redis.kill()
        back = time.time()
        redis.start(120)
        eventually(lambda: all_there(history, 2, since=back))
        points = len(history.curve())
        eventually(lambda: len(history.curve()) > points)

        calm.touch()
        assert run.finish() == 0, run.output
        finished = [event for event in history.events() if event.kind == "finished"]
        assert [event.version for event in finished] == [steps]
        assert history.heartbeats().keys() <= {victim.id}, "a process that left withdrew its heartbeat"
        curve = history.curve()
        assert all(point.loss is not None for point in curve if point.version > 40 and point.workers == 2)
        assert all(point.committed <= point.version <= steps for point in curve)
        versions = [point.version for point in curve if point.term == curve[-1].term]
        assert versions == sorted(versions) and len(set(versions)) == len(versions) > 3
        assert max(point.steps_per_s for point in curve) > 0 and max(point.samples_per_s for point in curve) > 0


def test_a_server_cut_off_from_zookeeper_is_not_ready_until_it_is_back(own: Site, zookeeper: PrivateZooKeeper) -> None:
    job = "lease"
    run = own.run(job, "--steps", "100000", workers=1, servers=1)
    run.wait_for_step(5)
    with history_of(own, job) as history:
        eventually(lambda: all_there(history, 1))
        (server,) = heartbeats_by_role(history)[ProcessRole.SERVER]
        assert get(server.endpoint, "/readyz") == (200, "text/plain; charset=utf-8", b"ok\n")
        os.kill(zookeeper.pids[0], signal.SIGSTOP)
        try:
            eventually(lambda: get(server.endpoint, "/readyz")[0] == 503)
            assert b"ZooKeeper is silent" in get(server.endpoint, "/readyz")[2]
            assert get(server.endpoint, "/healthz")[0] == 200, "it is well, and only waits"
        finally:
            os.kill(zookeeper.pids[0], signal.SIGCONT)
        eventually(lambda: get(server.endpoint, "/readyz")[0] == 200)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0, run.output


def test_a_job_without_a_monitor_publishes_nothing(own: Site, redis: PrivateRedis) -> None:
    run = own.run("silent", "--steps", "200", workers=1, servers=1, env={"PSA_MONITOR": "0"})
    run.wait_for_step(100)
    with redis_client.Redis.from_url(redis.url) as raw:
        assert set(raw.keys("psa:{silent}:*")) == {b"psa:{silent}:config", b"psa:{silent}:layout", b"psa:{silent}:data"}
        assert run.finish() == 0, run.output
        assert set(raw.keys("psa:{silent}:*")) == {b"psa:{silent}:config", b"psa:{silent}:layout", b"psa:{silent}:data"}


def test_processes_of_one_machine_share_out_the_ports_from_the_one_that_is_set(own: Site) -> None:
    job, port = "ports", 18_431
    run = own.run(job, "--steps", "100000", workers=2, servers=1, env={"PSA_METRICS_PORT": str(port)})
    with history_of(own, job) as history:
        run.wait_for_step(5)
        eventually(lambda: len(history.heartbeats()) == 3)
        ports = {int(each.endpoint.rpartition(":")[2]) for each in history.heartbeats().values() if each is not None}
    assert len(ports) == 3 and min(ports) >= port and max(ports) < port + 100
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0, run.output


@pytest.fixture
def environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in site.env.items():
        monkeypatch.setenv(name, value)


def test_a_worker_leaves_no_thread_and_no_descriptor(site: Site, environment: None) -> None:
    job = "tidy"
    server = site.psa("server", "--job", job)
    model = nn.Linear(4, 1)
    data = [(torch.ones(4), torch.ones(1)) for _ in range(8)]
    nn.functional.mse_loss(model(torch.ones(4)), torch.ones(1)).backward()  # autograd's own thread is there from now on
    before = held()
    worker = psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.25), steps=4)
    with history_of(site, job) as history, worker:
        batches = worker.batches(data, batch_size=2)
        x, y = next(batches)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        with pytest.raises(UsageError, match=r"shape \(2,\)"):
            worker.step(torch.ones(2))
        worker.step(loss)
        told = eventually(lambda: [p for p in heartbeats_by_role(history)[ProcessRole.WORKER] if "loss" in p.metrics])
        assert told[0].metrics["loss"] == pytest.approx(loss.item())
        assert told[0].metrics["learning_rate"] == 0.25
        for x, y in batches:
            nn.functional.mse_loss(model(x), y).backward()
            worker.step(0.5)
    assert held() == before
    server.process.send_signal(signal.SIGTERM)
    assert server.finish() == 0, server.output


class Quiet:
    """A process that has little to publish."""

    member = "server-1"
    sick = ""

    def refresh(self) -> None:
        pass

    @property
    def activity(self) -> Activity:
        return Activity("")

    def why_not_alive(self) -> str:
        return self.sick

    def why_not_ready(self) -> str:
        return ""


def last_beat(history: JobHistory) -> float:
    heartbeat = history.heartbeats().get("server-1")
    return heartbeat.time if heartbeat is not None else 0.0


class TestMonitor:
    @pytest.fixture
    def settings(self, redis: PrivateRedis) -> Settings:
        return Settings(redis=redis.url)

    def test_it_shows_that_its_process_should_be_replaced(self, settings: Settings) -> None:
        health = Quiet()
        with closing(Monitor("job", Metrics(ProcessRole.SERVER, "server-1"), health, settings)) as monitor:
            assert get(monitor.address, "/healthz")[0] == 200
            health.sick = "it has ended"
            assert get(monitor.address, "/healthz") == (503, "text/plain; charset=utf-8", b"it has ended\n")

    def test_events_wait_while_redis_is_away_and_it_closes_in_time_all_the_same(
        self, redis: PrivateRedis, settings: Settings
    ) -> None:
        before, events = held(), Events()
        metrics = Metrics(ProcessRole.SERVER, "server-1")
        monitor = Monitor("job", metrics, Quiet(), settings, events=events)
        with closing(JobHistory("job", redis.url, timeout_s=5.0)) as history:
            eventually(lambda: history.heartbeats())
            redis.kill()
            for number in range(3):
                events.note(EventKind.MEMBERS, str(number))
            redis.start(120)
            eventually(lambda: len(history.events()) == 3)
            assert [event.text for event in history.events()] == ["0", "1", "2"]
            redis.kill()
            begun_s = time.monotonic()
            monitor.close()
            assert time.monotonic() - begun_s < 3.0
        assert held() == before

    def test_an_event_that_could_not_be_written_is_written_later(self, redis: PrivateRedis, settings: Settings) -> None:
        events = Events()
        events.note(EventKind.MEMBERS, "first")
        with (
            redis_client.Redis.from_url(redis.url) as raw,
            closing(JobHistory("job", redis.url, timeout_s=5.0)) as history,
        ):
            last = f"{2**64 - 1}-{2**64 - 1}"  # nothing can be added after it
            raw.xadd(keys.events("job"), {"json": "in the way"}, id=last)
            with closing(Monitor("job", Metrics(ProcessRole.SERVER, "server-1"), Quiet(), settings, events=events)):
                # Twice: the first call may only have found that our functions are not loaded yet.
                eventually(lambda: raw.info("commandstats").get("cmdstat_fcall", {"calls": 0})["calls"] >= 2)
                raw.delete(keys.events("job"))
                events.note(EventKind.MEMBERS, "second")
                eventually(lambda: len(history.events()) == 2)
                assert [event.text for event in history.events()] == ["first", "second"]

    def test_a_heartbeat_that_it_cannot_read_does_not_silence_it(
        self, redis: PrivateRedis, settings: Settings, capsys: pytest.CaptureFixture[str]
    ) -> None:
        events = Events()
        events.see(View(None, {}, {"other": Member("other", "host", 1)}, (1,), 1))
        with closing(JobHistory("job", redis.url, timeout_s=5.0)) as history:
            with closing(History("job", redis.url, timeout_s=5.0)) as raw:
                raw.heartbeat("other", json.dumps({"told": "by another release"}))
            with closing(Monitor("job", Metrics(ProcessRole.SERVER, "server-1"), Quiet(), settings, events=events)):
                for _ in range(3):
                    before = last_beat(history)
                    eventually(lambda: last_beat(history) > before)  # noqa: B023
                events.note(EventKind.MEMBERS, "still here")
                eventually(lambda: [each.text for each in history.events()][-1:] == ["still here"])
        # To standard error where a test before has configured the log of this process.
        lines = [line for line in "".join(capsys.readouterr()).splitlines() if "heartbeats cannot be read" in line]
        assert sum("warning" in line for line in lines) == 1

    def test_a_process_with_a_new_name_has_one_heartbeat(self, redis: PrivateRedis, settings: Settings) -> None:
        health = Quiet()
        with (
            closing(JobHistory("job", redis.url, timeout_s=5.0)) as history,
            closing(Monitor("job", Metrics(ProcessRole.SERVER, "server-1"), health, settings)) as monitor,
        ):
            eventually(lambda: "server-1" in history.heartbeats())
            health.member = "server-1+again"
            eventually(lambda: history.heartbeats().keys() == {"server-1+again"})
            assert b'member="server-1+again"' in get(monitor.address, "/metrics")[2]

    def test_the_controller_removes_old_heartbeats_of_members_that_are_gone(
        self, redis: PrivateRedis, settings: Settings
    ) -> None:
        events = Events()
        events._seen = frozenset({"server-1", "old-but-there"}), frozenset()
        with closing(JobHistory("job", redis.url, timeout_s=5.0)) as history:
            for member, age_s in (("gone", 61), ("just-gone", 20), ("old-but-there", 61)):
                written_s = time.time() - age_s
                history.beat(Heartbeat(member, ProcessRole.SERVER, written_s, shards=1, metrics={"version": 1}))
            with closing(Monitor("job", Metrics(ProcessRole.SERVER, "server-1"), Quiet(), settings, events=events)):
                eventually(lambda: "gone" not in history.heartbeats())
                assert history.heartbeats().keys() == {"server-1", "just-gone", "old-but-there"}
            assert history.curve() == [], "old heartbeats make no points"

    def test_where_the_address_is_not_ours_there_are_heartbeats_and_no_endpoint(
        self, redis: PrivateRedis, settings: Settings
    ) -> None:
        elsewhere = settings.model_copy(update={"bind": "192.0.2.1"})
        with (
            closing(JobHistory("job", redis.url, timeout_s=5.0)) as history,
            closing(Monitor("job", Metrics(ProcessRole.SERVER, "server-1"), Quiet(), elsewhere)),
        ):
            eventually(lambda: history.heartbeats())
            heartbeat = history.heartbeats()["server-1"]
            assert heartbeat is not None and heartbeat.endpoint == ""

    def test_its_endpoint_can_be_left_out(self, settings: Settings) -> None:
        off = settings.model_copy(update={"metrics_port": -1})
        with closing(Monitor("job", Metrics(ProcessRole.SERVER, "server-1"), Quiet(), off)) as monitor:
            assert monitor.address == ""
            assert not [each for each in threading.enumerate() if each.name.startswith("psa-http")]
