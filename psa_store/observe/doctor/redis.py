"""Judgements on a Redis. Pure: facts in, checks out."""

from __future__ import annotations

from psa_store.observe.doctor.check import Check, Verdict
from psa_store.observe.doctor.footprint import Footprint
from psa_store.observe.doctor.machine import numbers
from psa_store.observe.formatting import milliseconds, size
from psa_store.storage import PROBE_BYTES, RedisFacts, RedisRates

REDIS_OLDEST = (7, 0)
CLOCK_SKEW_S = 1.0
"""Nothing is decided by comparing clocks. But people who read logs of two machines side by side do that."""
REDIS_SLOW_BYTES_PER_S = 100e6
"""Of a plain network of 1 Gbit/s; commits wait for no less with anything slower."""
ALLOCATION = 1.25
"""What Redis counts for a chunk, against its bytes: its allocator knows four sizes to a doubling, and a chunk, which
has a power of two and a few bytes of header, gets the next one. Measured with 1 and 4 MiB."""
PROBE_ROOM = 4
"""Room that must be there for each byte of the measurement: a running job must not meet a full Redis because of it."""


def unreachable_redis(why: str) -> Check:
    fix = "start Redis, or correct PSA_REDIS: host, port, user and password, and what its ACL allows that user"
    return Check("Redis", Verdict.FAIL, why, fix)


def judge_redis(facts: RedisFacts, replicas_acknowledge: int) -> list[Check]:
    """All that does not depend on a job."""
    return [
        _judge_role(facts),
        _judge_version(facts),
        _judge_eviction(facts),
        _judge_persistence(facts),
        _judge_compression(facts),
        _judge_clock(facts),
        _judge_replicas(facts, replicas_acknowledge),
    ]


def _judge_role(facts: RedisFacts) -> Check:
    found = f"answers at {facts.where} in {milliseconds(facts.round_trip_s, 2)}"
    if facts.is_replica:
        return Check("Redis", Verdict.FAIL, f"{found}, but is a replica", "point PSA_REDIS at its master")
    if facts.in_cluster:
        fix = "point PSA_REDIS at one without cluster mode, for failover with Sentinels"
        return Check("Redis", Verdict.FAIL, f"{found}, but is a node of a cluster, and psa keeps a job in one", fix)
    return Check("Redis", Verdict.PASS, found)


def _judge_version(facts: RedisFacts) -> Check:
    fix = "use Redis 7.0 or newer, or Valkey"
    if not facts.has_functions:
        why = "without functions, or its ACL refuses them"
        if facts.has_scripts:
            return Check("Redis version", Verdict.PASS, f"{facts.product}, {why}: by scripts")
        return Check("Redis version", Verdict.FAIL, f"{facts.product}, {why}, and scripts as well", fix)
    if numbers(facts.version) < REDIS_OLDEST:
        return Check("Redis version", Verdict.FAIL, facts.product, fix)
    return Check("Redis version", Verdict.PASS, f"{facts.product}, with functions")


def _judge_eviction(facts: RedisFacts) -> Check:
    fix = "`redis-cli CONFIG SET maxmemory-policy noeviction`, and the same in its configuration file"
    if facts.eviction is None:
        found = "Redis does not show its maxmemory-policy"
        return Check("Redis eviction", Verdict.WARN, found, "see to it that its maxmemory-policy is noeviction")
    if facts.eviction != "noeviction":
        found = f"maxmemory-policy is {facts.eviction}: Redis may throw parameters away, and psa refuses it"
        return Check("Redis eviction", Verdict.FAIL, found, fix)
    return Check("Redis eviction", Verdict.PASS, "maxmemory-policy is noeviction")


def _judge_persistence(facts: RedisFacts) -> Check:
    name = "Redis persistence"
    if facts.cannot_persist:
        return Check(name, Verdict.FAIL, "its last write to disk failed", "make room on its disk; its log says more")
    log_it = "`redis-cli CONFIG SET appendonly yes`, and the same in its configuration file"
    if facts.appends:
        return _judge_log(name, facts)
    if facts.save:
        lost = f"all since the last snapshot is lost when Redis dies (save {facts.save})"
        return Check(name, Verdict.WARN, f"no log, snapshots only: {lost}", log_it)
    if facts.save is None:
        return Check(name, Verdict.WARN, "no log, and Redis does not show whether it takes snapshots", log_it)
    lost = "a restart forgets every job, and servers that are alive must write theirs again"
    return Check(name, Verdict.FAIL, f"neither log nor snapshots: {lost}", log_it)


def _judge_log(name: str, facts: RedisFacts) -> Check:
    match facts.appendfsync:
        case "always":
            return Check(name, Verdict.PASS, "appendonly, appendfsync always: nothing is lost when its machine dies")
        case "everysec":
            lost = "when its machine and all servers die together, about the last second is lost"
            return Check(name, Verdict.PASS, f"appendonly, appendfsync everysec: {lost}")
    policy = f"appendfsync {facts.appendfsync}" if facts.appendfsync else "an appendfsync that Redis does not show"
    lost = "when its machine and all servers die together, what its kernel has not written is lost, often 30 s"
    fix = "`redis-cli CONFIG SET appendfsync everysec`, and the same in its configuration file"
    return Check(name, Verdict.WARN, f"appendonly, {policy}: {lost}", fix)


def _judge_compression(facts: RedisFacts) -> Check:
    name = "Redis compression"
    if facts.compresses and (facts.appends or facts.save):
        cost = "weights do not get smaller, and a rewrite of the log takes 4 times as long (5.6 s of a core per GB)"
        fix = "`redis-cli CONFIG SET rdbcompression no`, and the same in its configuration file"
        return Check(name, Verdict.WARN, f"snapshots are compressed: {cost}", fix)
    if facts.compresses is None:
        return Check(name, Verdict.PASS, "Redis does not show whether it compresses snapshots")
    return Check(name, Verdict.PASS, "nothing is compressed on its disk")


def _judge_replicas(facts: RedisFacts, wanted: int) -> Check:
    name = "Redis replicas"
    if facts.replicas < wanted:
        fix = "see that its replicas run and follow it, or lower PSA_REPLICAS_ACKNOWLEDGE"
        return Check(name, Verdict.FAIL, f"{facts.replicas} follow it, and {wanted} must acknowledge a version", fix)
    if wanted:
        return Check(name, Verdict.PASS, f"a version is durable when {wanted} of {facts.replicas} have it")
    if facts.replicas:
        lost = "what they have not got when it fails over is written again from memory, if servers live"
        return Check(name, Verdict.PASS, f"{facts.replicas} follow it, none must acknowledge a version: {lost}")
    return Check(name, Verdict.PASS, "none")


def _judge_clock(facts: RedisFacts) -> Check:
    ahead_s = facts.clock_ahead_s
    found = f"{abs(ahead_s):.3f} s {'ahead of' if ahead_s > 0 else 'behind'} ours"
    if abs(ahead_s) > CLOCK_SKEW_S:
        fix = "let chrony or systemd-timesyncd set both clocks: logs of the two machines cannot be compared"
        return Check("Redis clock", Verdict.WARN, found, fix)
    return Check("Redis clock", Verdict.PASS, found)


def judge_room(facts: RedisFacts) -> Check:
    """Memory, where no job is meant."""
    used = f"{size(facts.used_memory_bytes)} used"
    room = facts.room_bytes
    if room is None:
        return Check("Redis memory", Verdict.PASS, f"{used}, no limit")
    if room < facts.used_memory_bytes / 9:
        fix = "raise maxmemory, use a larger machine, or delete jobs that are done"
        return Check("Redis memory", Verdict.WARN, f"{used}, {size(max(room, 0))} left", fix)
    return Check("Redis memory", Verdict.PASS, f"{used}, {size(room)} left")


def judge_headroom(facts: RedisFacts, job: str, footprint: Footprint, stored_bytes: int) -> Check:
    """Memory for a job. ``stored_bytes``: what Redis has of it now, of which it has counted that."""
    kept = round(footprint.kept_bytes * ALLOCATION)
    to_come = max(0, kept - round(stored_bytes * ALLOCATION))
    room = facts.room_bytes
    needs = f"job {job!r} takes {size(kept)} in {footprint.versions} versions, {size(to_come)} of it to come"
    if room is None:
        return Check("Redis memory", Verdict.PASS, f"{needs}; no limit")
    found = f"{needs}; {size(max(room, 0))} left"
    # The next version is written while the kept ones are still there: shard by shard, but by all servers at once.
    with_next = to_come + round(footprint.version_bytes * ALLOCATION)
    if to_come > room:
        fix = f"give Redis {size(with_next - room)} more (maxmemory, or a larger machine), or delete other jobs"
        return Check("Redis memory", Verdict.FAIL, found, fix)
    if with_next > room:
        fix = f"give Redis {size(with_next - room)} more: the next version is written before the oldest is freed"
        return Check("Redis memory", Verdict.WARN, found, fix)
    full = facts.used_memory_bytes + to_come
    system = facts.system_memory_bytes
    if (facts.appends or facts.save) and 0 < system < 2 * full:
        fix = "use a larger machine: while Redis rewrites its log or takes a snapshot it may need twice its memory"
        return Check("Redis memory", Verdict.WARN, f"{found}; its machine has {size(system)} in all", fix)
    return Check("Redis memory", Verdict.PASS, found)


def unknown_headroom(why: str) -> Check:
    """The job cannot be read."""
    return Check("Redis memory", Verdict.FAIL, why, "restore Redis from its backup, or use another job name")


def rehearsed() -> Check:
    return Check("Redis commands", Verdict.PASS, "a version was committed, loaded, pinned, dropped and swept")


def refused(why: str) -> Check:
    fix = "let this user do what `deploy/README.md` lists, or mend what Redis complains of: a job would meet it later"
    return Check("Redis commands", Verdict.FAIL, why, fix)


def unrehearsed() -> Check:
    found = "not tried: functions of another release are loaded, and a job may be using them"
    return Check("Redis commands", Verdict.WARN, found, "let jobs and this command use one release of psa_store")


def may_measure(facts: RedisFacts) -> bool:
    """Whether the measurement cannot get in the way of a job that runs."""
    room = facts.room_bytes
    return not (facts.is_replica or facts.in_cluster) and (room is None or room > PROBE_ROOM * PROBE_BYTES)


def judge_rates(rates: RedisRates, footprint: Footprint | None) -> Check:
    write, read = rates.write_bytes_per_s, rates.read_bytes_per_s
    found = f"writes {write / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s over one connection"
    if footprint is not None:
        found += f"; one version of the job is {size(footprint.version_bytes)}, "
        found += f"{footprint.version_bytes / write:.1f} s to write"
    if min(write, read) < REDIS_SLOW_BYTES_PER_S:
        fix = "bring Redis nearer (same host or rack), or commit less often: --commit-every of a new job"
        return Check("Redis bandwidth", Verdict.WARN, found, fix)
    return Check("Redis bandwidth", Verdict.PASS, found)


def unmeasured(facts: RedisFacts) -> Check:
    if facts.is_replica:
        return Check("Redis bandwidth", Verdict.WARN, "not measured: it is a replica", "point PSA_REDIS at its master")
    left = size(max(0, facts.room_bytes or 0))
    found = f"not measured: {left} left is too little to try it beside a job that may be running"
    return Check("Redis bandwidth", Verdict.WARN, found, "give Redis more memory, then try again")


def broken_measurement(why: str) -> Check:
    return Check("Redis bandwidth", Verdict.FAIL, why, "mend what Redis complains of: commits would meet it, too")
