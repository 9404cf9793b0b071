"""Looks at a job: ZooKeeper, Redis and the job's servers are asked at the same time, each with a deadline of its own.

What is away hides nothing else: without Redis there are still the plan, the members and the answers of servers; without
ZooKeeper there are still what is stored and the heartbeats.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

from psa_store.checkpoint.catalog import damaged_documents
from psa_store.cluster import Member, ProcessRole, believed, newest_common
from psa_store.config import Settings
from psa_store.coordination import Coordination, StoredPlan, access_of, known_plan, probe_zookeeper
from psa_store.errors import DataIntegrity, DependencyUnreachable, Disconnected, UnknownJob
from psa_store.job.config import JobConfig, job_config_from_json
from psa_store.job.document import Damaged
from psa_store.job.layout import Layout, layout_from_json
from psa_store.logs import escaped
from psa_store.observe.heartbeat import Heartbeat
from psa_store.observe.history import JobHistory
from psa_store.observe.status.assemble import assemble
from psa_store.observe.status.model import JobStatus
from psa_store.observe.status.views import HeartbeatAge, RedisView, ServerAnswer, ZooKeeperView
from psa_store.storage import RedisStore, keys
from psa_store.wire import Door, inspect

PATIENCE_S_MAX = 2.0
"""How long Redis and ZooKeeper may take to answer here: people do not wait as long as jobs do."""
_ANSWER_S = 1.0
_ASKED_AT_ONCE = 64
_EVENTS_SHOWN = 8


def describe(job: str, settings: Settings, store: RedisStore) -> JobStatus:
    """Look once at a job: everything that is known about it; raises UnknownJob as :meth:`Observer.look`."""
    with closing(Observer(job, settings, store)) as observer:
        return observer.look()


def known_jobs(settings: Settings, store: RedisStore) -> list[str]:
    """Names of all jobs, from Redis, or if that is away from ZooKeeper.

    Raises:
        DependencyUnreachable: both are away.
    """
    try:
        return sorted(store.jobs())
    except DependencyUnreachable as away:
        try:
            with _coordination("", settings) as coordination:
                return sorted(coordination.jobs())
        except DependencyUnreachable as error:
            raise DependencyUnreachable(f"{away} And: {error}") from error


def _coordination(job: str, settings: Settings) -> Coordination:
    return Coordination.from_settings(settings, job, connect_timeout_s=min(settings.connect_timeout_s, PATIENCE_S_MAX))


class Observer:
    """Looks at one job, as often as wanted, through the same sessions. One look at a time; closed once.

    ``settings`` must have both addresses. ``store`` stays the caller's.
    """

    def __init__(self, job: str, settings: Settings, store: RedisStore) -> None:
        assert settings.redis is not None
        self._job = job
        self._settings = settings
        self._access = access_of(settings)
        self._patience_s = min(settings.connect_timeout_s, PATIENCE_S_MAX)
        self._store = store
        self._door = Door.from_settings(settings, job)
        self._history = JobHistory(job, settings.redis, timeout_s=self._patience_s)
        self._coordination: Coordination | None = None
        self._documents: tuple[str, str] | None = None
        self._parsed: tuple[JobConfig, Layout] | None = None
        self._ages: dict[str, HeartbeatAge] = {}

    def close(self) -> None:
        self._history.close()
        if self._coordination is not None:
            self._coordination.close()

    def look(self) -> JobStatus:
        """Look once; raises UnknownJob if Redis answers and has no such job."""
        with ThreadPoolExecutor(3, thread_name_prefix="psa-status") as pool:
            redis = pool.submit(self._ask_redis)
            members = pool.submit(probe_zookeeper, self._access, min(_ANSWER_S, self._patience_s))
            zookeeper = self._ask_zookeeper()
            stored = redis.result()
            zookeeper = replace(zookeeper, members=members.result())
        self._follow(stored.heartbeats)
        return escaped(assemble(self._job, time.time(), stored, zookeeper, self._ages, time.monotonic()))

    # --- Redis

    def _ask_redis(self) -> RedisView:
        view = RedisView(where=self._store.where)
        try:
            view = replace(view, facts=self._store.facts())
            texts = self._store.read_job(self._job)
            if texts is None and self._documents is not None:
                return replace(
                    view, damage=f"Redis no longer knows job {self._job!r}: it was wiped, or the job deleted"
                )
            if texts is None:
                raise UnknownJob(f"no job {self._job!r}; known jobs: {', '.join(self._store.jobs()) or 'none'}")
            config, layout = self._parse(texts)
            view = replace(view, config=config, shards=len(layout.shards), arena_bytes=layout.arena_bytes)
            view = replace(view, heartbeats=self._history.heartbeats())
            view = replace(view, events=self._history.events()[-_EVENTS_SHOWN:])
            heads = self._store.heads(self._job, [shard.index for shard in layout.versioned])
            versions = {head.shard: [manifest.version for manifest in head.manifests] for head in heads}
            damaged = [*self._damaged_documents(), *(each for head in heads for each in head.damage(self._job))]
            return replace(view, committed=newest_common(versions), damaged=damaged)
        except DependencyUnreachable as error:
            return replace(view, problem=str(error))
        except DataIntegrity as error:
            return replace(view, damage=str(error))

    def _damaged_documents(self) -> list[Damaged]:
        """Documents of which training needs none at this moment. Heartbeats that can not be read are shown as such."""
        record = self._store.data_record(self._job).look()[1]
        checkpoints = damaged_documents(self._store.read_checkpoints(self._job), keys.checkpoints(self._job))
        history = [each for key, each in self._history.damaged.items() if key != keys.heartbeats(self._job)]
        return [*([record] if isinstance(record, Damaged) else []), *checkpoints, *history]

    def _parse(self, texts: tuple[str, str]) -> tuple[JobConfig, Layout]:
        """A thousand shards take a while to lay out, and what a job is does not change."""
        if self._parsed is None or texts != self._documents:
            self._parsed = job_config_from_json(texts[0]), layout_from_json(texts[1])
            self._documents = texts
        return self._parsed

    # --- ZooKeeper, and the servers that it names

    def _ask_zookeeper(self) -> ZooKeeperView:
        view = ZooKeeperView(hosts=str(self._access), session_timeout_s=self._settings.session_timeout_s)
        try:
            coordination = self._connected()
            seen, config = coordination.read_plan(), coordination.read_config()
            plan = known_plan(seen)
            servers, workers = (coordination.members(role) for role in (ProcessRole.SERVER, ProcessRole.WORKER))
            requests = map(coordination.read_checkpoint_request, coordination.checkpoint_requests())
            term = coordination.read_term(plan.term if plan else 0)
            found = (seen, config, term, *servers.values(), *workers.values(), *requests)
            view = replace(
                view,
                server=coordination.peer,
                config=config if isinstance(config, JobConfig) else None,
                plan=plan,
                plan_time_s=seen.modified_s if isinstance(seen, StoredPlan) else None,
                servers=list(believed(servers, plan).values()),
                workers=list(believed(workers, plan).values()),
                damaged=[each for each in found if isinstance(each, Damaged)],
                controller=coordination.elected(),
                latency_s=coordination.round_trip_s(),
            )
        except (DependencyUnreachable, Disconnected, DataIntegrity) as error:
            view = replace(view, problem=str(error))
        return replace(view, answers=_ask_servers(view.servers, self._door))

    def _connected(self) -> Coordination:
        """The session of the first look; it outlives an outage by itself."""
        if self._coordination is None:
            coordination = _coordination(self._job, self._settings)
            coordination.start()
            self._coordination = coordination
        return self._coordination

    def _follow(self, heartbeats: Mapping[str, Heartbeat | None]) -> None:
        """Note when a heartbeat changed, by our own clock: that of another host may be wrong."""
        now_s, wall_s = time.monotonic(), time.time()
        self._ages = {
            member: HeartbeatAge.after(self._ages.get(member), heartbeat.time, now_s, wall_s)
            for member, heartbeat in heartbeats.items()
            if heartbeat is not None
        }


def _ask_servers(servers: Sequence[Member], door: Door) -> dict[str, ServerAnswer]:
    """The answer of each server, by id; all are asked at once."""
    if not servers:
        return {}
    with ThreadPoolExecutor(min(len(servers), _ASKED_AT_ONCE), thread_name_prefix="psa-status-ask") as pool:
        answers = pool.map(lambda member: _ask(member, door), servers)
        return dict(zip((member.id for member in servers), answers, strict=True))


def _ask(member: Member, door: Door) -> ServerAnswer:
    try:
        found = inspect(member.address, member.local, member.host, _ANSWER_S, door)
    except Disconnected as error:
        return ServerAnswer(problem=str(error))
    return ServerAnswer(found.version, found.committed, found.stage)
