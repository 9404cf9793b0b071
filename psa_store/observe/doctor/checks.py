"""Examines everything once, in the order in which it is read. What is away hides nothing else."""

from __future__ import annotations

import platform
import resource
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from psa_store.checkpoint.catalog import read_job
from psa_store.config import Settings
from psa_store.coordination import Coordination, access_of, examine_zookeeper
from psa_store.errors import DataIntegrity, DependencyUnreachable, Disconnected, UsageError
from psa_store.observe.doctor import machine, redis, zookeeper
from psa_store.observe.doctor.check import Check, Examination, Verdict
from psa_store.observe.doctor.footprint import Footprint, footprint_of
from psa_store.storage import RedisFacts, RedisStore, examine_redis, measure_redis
from psa_store.wire import measure_loopback

_LOOPBACK_BYTES = 32 << 20
_LOOPBACK_S = 2.0


@dataclass(frozen=True, slots=True)
class _StoredJob:
    """What the checks need to know of the job, as Redis has it."""

    ranks: int
    stages: int
    footprint: Footprint
    stored_bytes: int


def examine(settings: Settings, job: str | None) -> Examination:
    """Examine this machine, Redis and ZooKeeper; takes seconds.

    Args:
        settings: with both addresses.
        job: whose memory must fit into Redis; None for no job.

    Raises:
        UnknownJob: Redis answers, and has no such job; the message lists those that exist.
    """
    of_redis, stored_job = _examine_redis(settings, job)
    of_zookeeper = _examine_zookeeper(settings)
    checks = (*_examine_machine(stored_job), *of_redis, *of_zookeeper)
    return Examination(all(check.verdict is not Verdict.FAIL for check in checks), checks)


def _examine_machine(job: _StoredJob | None) -> list[Check]:
    checks = [machine.judge_installed("python", platform.python_version())]
    checks += [machine.judge_installed(name, _installed(name)) for name in machine.OLDEST if name != "python"]
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    checks.append(machine.judge_descriptors(limit, job.ranks if job else 1, job.stages if job else 1))
    try:
        checks.append(machine.judge_loopback(measure_loopback(_LOOPBACK_BYTES, _LOOPBACK_S)))
    except Disconnected as error:
        checks.append(machine.no_loopback(str(error)))
    return checks


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _examine_redis(settings: Settings, job: str | None) -> tuple[list[Check], _StoredJob | None]:
    """The checks, and what Redis has of the job, if that can be read."""
    assert settings.redis is not None
    url, timeout_s = settings.redis, settings.connect_timeout_s
    try:
        facts = examine_redis(url, timeout_s)
    except (DependencyUnreachable, UsageError) as error:
        return [redis.unreachable_redis(str(error))], None
    checks = redis.judge_redis(facts, settings.replicas_acknowledge)
    stored_job = None
    try:
        if job is None:
            checks.append(redis.judge_room(facts))
        else:
            stored_job = _read_job(url, job, timeout_s)
            checks.append(redis.judge_headroom(facts, job, stored_job.footprint, stored_job.stored_bytes))
    except DataIntegrity as error:
        checks.append(redis.unknown_headroom(str(error)))
    except DependencyUnreachable as error:
        return [redis.unreachable_redis(str(error))], None
    checks += _rehearse(url, facts, timeout_s)
    checks.append(_measure(url, facts, stored_job, timeout_s))
    return checks, stored_job


def _rehearse(url: str, facts: RedisFacts, timeout_s: float) -> list[Check]:
    """Do what a job does, where that can not get in the way of one, and can be done at all."""
    if not (facts.has_functions or facts.has_scripts) or facts.is_replica or facts.in_cluster:
        return []  # said already
    try:
        with RedisStore(url, timeout_s=timeout_s) as store:
            if store.has_other_functions():
                return [redis.unrehearsed()]
            store.rehearse()
    except DependencyUnreachable as error:
        return [redis.refused(str(error))]
    return [redis.rehearsed()]


def _read_job(url: str, job: str, timeout_s: float) -> _StoredJob:
    with RedisStore(url, timeout_s=timeout_s) as store:
        found = read_job(store, job)
    manifests = [manifest for head in found.heads.values() for manifest in head.manifests]
    stored_bytes = sum(section.size_bytes for manifest in manifests for section in manifest.sections)
    return _StoredJob(found.config.ranks, found.config.stages, footprint_of(found.config, found.layout), stored_bytes)


def _measure(url: str, facts: RedisFacts, stored_job: _StoredJob | None, timeout_s: float) -> Check:
    if not redis.may_measure(facts):
        return redis.unmeasured(facts)
    try:
        return redis.judge_rates(measure_redis(url, timeout_s), stored_job.footprint if stored_job else None)
    except DependencyUnreachable as error:
        return redis.broken_measurement(str(error))


def _examine_zookeeper(settings: Settings) -> list[Check]:
    asked_s = settings.session_timeout_s
    try:
        members = examine_zookeeper(
            access_of(settings), session_timeout_s=asked_s, connect_timeout_s=settings.connect_timeout_s
        )
    except UsageError as error:
        return [zookeeper.unusable_zookeeper(str(error))]
    checks = zookeeper.judge_zookeeper(members, asked_s)
    if any(member.serves for member in members):
        try:
            with Coordination.from_settings(settings, "doctor") as coordination:
                coordination.rehearse()
            checks.append(zookeeper.allowed())
        except DependencyUnreachable as error:
            checks.append(zookeeper.refused(str(error)))
    return checks
