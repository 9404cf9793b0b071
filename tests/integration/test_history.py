"""Heartbeats, events and the curve, in a real Redis: bounded, counted once, and gone with the job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

import pytest
import redis

from chaos.proxy import Proxy
from psa_store.cluster import ProcessRole
from psa_store.errors import DependencyUnreachable
from psa_store.launch import PrivateRedis
from psa_store.observe import EventKind
from psa_store.observe.curve import Point
from psa_store.observe.events import Event
from psa_store.observe.heartbeat import Heartbeat
from psa_store.observe.history import JobHistory
from psa_store.storage import History, RedisStore, keys
from psa_store.storage.history import EVENTS_MAX, POINTS_MAX

JOB = "job"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRedis]:
    private = PrivateRedis(tmp_path_factory.mktemp("redis"), tcp=True)
    private.start(120)
    yield private
    private.stop()


@pytest.fixture
def raw(server: PrivateRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        client.flushdb()
        client.function_flush()
        yield client


@pytest.fixture
def history(server: PrivateRedis, raw: redis.Redis) -> Iterator[History]:
    with closing(History(JOB, server.url, timeout_s=5.0)) as history:
        yield history


def backdate(raw: redis.Redis, age_ms: int, document: dict[str, Any]) -> None:
    """Put a point onto the curve as if it had been added so long ago."""
    seconds, micros = raw.time()
    moment_ms = seconds * 1000 + micros // 1000 - age_ms
    raw.xadd(keys.curve(JOB), {"json": json.dumps(document)}, id=f"{moment_ms}-0")


def test_the_newest_heartbeat_of_each_member_is_there_until_it_is_forgotten(history: History) -> None:
    assert history.heartbeats() == {}
    history.heartbeat("a", '{"time": 1}')
    history.heartbeat("b", '{"time": 2}')
    history.heartbeat("a", '{"time": 3}')
    assert history.heartbeats() == {"a": '{"time": 3}', "b": '{"time": 2}'}
    history.forget([])
    history.forget(["a", "unknown"])
    assert history.heartbeats() == {"b": '{"time": 2}'}


def test_events_are_kept_in_order_and_each_once(history: History) -> None:
    first, second = '{"time": 1.5, "text": "one", "term": null}', '{"time": 1.5, "text": "two", "term": 3}'
    for event in (first, second, first, second):
        history.event(event)
    assert history.events() == [first, second]


def test_only_the_newest_events_are_kept(history: History, raw: redis.Redis) -> None:
    with raw.pipeline(transaction=False) as pipeline:
        for number in range(EVENTS_MAX):
            pipeline.xadd(keys.events(JOB), {"json": json.dumps({"number": number})})
        pipeline.execute()
    history.event(json.dumps({"number": EVENTS_MAX}))
    assert [json.loads(event)["number"] for event in history.events()] == list(range(1, EVENTS_MAX + 1))


def test_a_second_point_within_the_interval_is_not_kept(history: History, raw: redis.Redis) -> None:
    backdate(raw, 1_100, {"version": 0})
    history.point(json.dumps({"version": 1}))
    history.point(json.dumps({"version": 2}))
    assert [json.loads(point)["version"] for point in history.curve()] == [0, 1]


def test_a_curve_with_too_many_points_keeps_every_other_and_doubles_its_interval(
    history: History, raw: redis.Redis
) -> None:
    for number in range(POINTS_MAX):
        backdate(raw, 1_000 * (POINTS_MAX - number), {"version": number})
    history.point(json.dumps({"version": POINTS_MAX}))
    assert [json.loads(point)["version"] for point in history.curve()] == list(range(0, POINTS_MAX + 1, 2))
    assert raw.get(keys.curve_interval(JOB)) == b"2"


@pytest.mark.parametrize(("age_ms", "kept"), [(1_200, False), (1_900, True)])
def test_a_continued_curve_keeps_its_interval(history: History, raw: redis.Redis, age_ms: int, kept: bool) -> None:
    raw.set(keys.curve_interval(JOB), 2)
    backdate(raw, age_ms, {"version": 1})
    history.point(json.dumps({"version": 2}))
    assert (len(history.curve()) == 2) is kept


def test_a_clock_of_redis_that_went_back_does_not_stop_the_curve(history: History, raw: redis.Redis) -> None:
    backdate(raw, -3_600_000, {"version": 1})
    history.point(json.dumps({"version": 2}))
    assert [json.loads(point)["version"] for point in history.curve()] == [1, 2]


@pytest.mark.parametrize("found", ["{", "[1]", "[" * 50_000, "\x00"])
@pytest.mark.parametrize("read", [JobHistory.heartbeats, JobHistory.events, JobHistory.curve])
def test_what_cannot_be_read_is_named_and_hides_nothing(
    server: PrivateRedis,
    raw: redis.Redis,
    read: Callable[[JobHistory], Mapping[str, object] | list[object]],
    found: str,
) -> None:
    with closing(JobHistory(JOB, server.url, timeout_s=5.0)) as history:
        history.beat(Heartbeat("b", ProcessRole.WORKER, 1.0))
        history.add(Event(1.0, EventKind.MEMBERS, "one"))
        history.offer(Point(1.0, 1))
        whole = read(history)
        assert len(whole) == 1 and not history.damaged
        raw.hset(keys.heartbeats(JOB), "a", found)
        raw.xadd(keys.events(JOB), {"json": found})
        raw.xadd(keys.curve(JOB), {"json": found})
        assert read(history) == (whole | {"a": None} if isinstance(whole, dict) else whole)
        assert [each.where for each in history.damaged.values()] == [f"psa:{{job}}:{read.__name__}"]


def test_a_job_that_is_deleted_leaves_nothing(history: History, server: PrivateRedis, raw: redis.Redis) -> None:
    history.heartbeat("a", "{}")
    history.event('{"number": 1}')
    for number in range(POINTS_MAX):
        backdate(raw, 1_000 * (POINTS_MAX - number), {"version": number})
    history.point(json.dumps({"version": POINTS_MAX}))
    assert set(raw.keys()) == {key.encode() for key in keys.history(JOB)}
    with closing(RedisStore(server.url, timeout_s=5.0)) as store:
        store.delete_job(JOB, 3)
    assert raw.keys() == []


def test_a_redis_that_is_away_is_given_up_in_time(server: PrivateRedis) -> None:
    with closing(Proxy(server.address)) as proxy:
        gone = f"redis://127.0.0.1:{proxy.port}"
    with closing(History(JOB, gone, timeout_s=0.3)) as history:
        begun_s = time.monotonic()
        with pytest.raises(DependencyUnreachable):
            history.heartbeat("a", "{}")
        assert time.monotonic() - begun_s < 3.0


def test_what_another_release_wrote_is_set_aside_and_the_rest_is_read(server: PrivateRedis, raw: redis.Redis) -> None:
    strange: list[dict[str, Any]] = [
        {},
        {"time": "soon"},
        {"format": 1, "time": "soon", "version": 3},
        {"format": 1, "time": 1.0, "version": 3, "workers": None},
        {"format": 1, "time": 1.0, "kind": "eclipse", "text": "a kind of event that is not known here"},
        {"format": 2, "time": 1.0, "version": 3, "kind": "finished", "text": "of a newer release"},
    ]
    for number, document in enumerate(strange):
        raw.xadd(keys.curve(JOB), {"json": json.dumps(document)})
        raw.xadd(keys.events(JOB), {"json": json.dumps(document)})
        raw.hset(keys.heartbeats(JOB), f"member-{number}", json.dumps(document))
    raw.xadd(keys.curve(JOB), {"json": json.dumps({"format": 1, "time": 2.0, "version": 5, "new_field": 1})})
    raw.xadd(
        keys.events(JOB),
        {"json": json.dumps({"format": 1, "time": 2.0, "kind": "finished", "text": "done", "new_field": 1})},
    )
    with closing(JobHistory(JOB, server.url, timeout_s=5.0)) as history:
        assert [(point.version, point.workers) for point in history.curve()] == [(5, 0)]
        assert [(event.kind, event.text) for event in history.events()] == [(EventKind.FINISHED, "done")]
        assert set(history.heartbeats().values()) == {None}
