"""Change numbers of a job that runs or rests, from a version on: a new term that begins with the change.

Take a term, seal, write the change into the job's configuration, publish a plan that begins at the newest version that
all shards have committed. What is newer is computed again, with the new numbers. Killed before the change is written,
nothing has changed; after it, the next term begins with it.

Redis and ZooKeeper both have the configuration, and changes are only ever added: where one of them has fewer, it has
been set back, or its writer has died, and it is brought up to date.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from psa_store import logs
from psa_store.checkpoint.catalog import StoredJob, read_job
from psa_store.cluster import ProcessRole
from psa_store.coordination import Coordination, StoredPlan, known_plan
from psa_store.errors import DataIntegrity, DependencyUnreachable, Fenced, JobBusy, Rewound, UsageError
from psa_store.job.change import Change, Numbers
from psa_store.job.config import JobConfig, job_config_from_json
from psa_store.job.document import Damaged, judged
from psa_store.storage import RedisStore, newest_term
from psa_store.storage.sections import CLOCK

_TRIES_MAX = 10
"""Each fails only if another process began a term, or changed the job, meanwhile."""


@dataclass(frozen=True, slots=True)
class Changed:
    """From which version on a change counts, and in which term that begins."""

    version: int
    term: int


def change_job(store: RedisStore, coordination: Coordination, job: str, numbers: Numbers) -> Changed:
    """Let ``numbers`` count from the newest version that is durable.

    Raises:
        UnknownJob: there is no such job.
        UsageError: the job can not have such a batch size, or is past such an end.
        JobBusy: its ranks are at steps of their own, and workers live, which have gradients of later ones.
        DependencyUnreachable: Redis or ZooKeeper does not answer, or other terms began all the time.
    """
    log = logs.get_logger()
    check_change(store, coordination, job, numbers)
    for _ in range(_TRIES_MAX):
        seen = coordination.read_plan()
        before = known_plan(seen)
        config = newest_config(store, coordination, job)
        stored = read_job(store, job)
        published = before.term if before else 0
        term = coordination.next_term(at_least=max(newest_term(stored.heads.values(), published), published))
        try:
            store.seal(job, stored.heads, term, stored.layout.fingerprint)
            version = stored.reread(store).version_of(None)
            store.trim(job, [shard.index for shard in stored.layout.versioned], term, version)
        except (Fenced, Rewound) as error:
            log.info("a controller was faster: again", term=term, why=str(error))
            continue
        change = Change(_first_step(stored, config, version), numbers)
        past = numbers.steps is not None and numbers.steps < change.step  # it went on while it was sealed
        changed = config if past else replace(config, changes=(*config.changes, change))
        # Fenced: members of a newer term may have read the configuration before the change was in it.
        fence = (stored.layout.versioned[0].index, term)
        if not store.replace_config(job, config.to_json(), changed.to_json(), fence):
            continue
        coordination.replace_config(changed)
        # A controller may revise the old term's plan meanwhile; one that begins a term begins it with the change.
        while isinstance(seen, StoredPlan) and seen.plan.owners and seen.plan.term < term:
            if coordination.write_plan(seen.plan.begun_again(term, version), seen) is not None:
                break
            seen = coordination.read_plan()
        if past:
            raise _past_end(job, numbers, change.step)
        return Changed(version, term)
    raise DependencyUnreachable(
        f"job {job!r}: {_TRIES_MAX} terms began while it was to be changed. See `psa status {job}`, and repeat."
    )


def check_change(store: RedisStore, coordination: Coordination, job: str, numbers: Numbers) -> None:
    """Raise what :func:`change_job` raises for a change that the job can not make; nothing is written."""
    config, stored = newest_config(store, coordination, job), read_job(store, job)
    if numbers.batch_size is None and numbers.steps is None:
        return
    if config.clocks and coordination.living(ProcessRole.WORKER):
        raise JobBusy(f"job {job!r}: in mode {config.mode} batch_size and steps are set while it rests: end it first")
    if numbers.batch_size is not None:
        _, record = store.data_record(job).read()
        if record is None:
            raise UsageError(f"batch_size={numbers.batch_size}: job {job!r} has not begun: say it in the script")
        record.following(config.changes).check_batch_size(job, config.ranks, numbers.batch_size)
    if numbers.steps is not None:
        config.check_steps(numbers.steps)
        step = _first_step(stored, config, stored.version_of(None))
        if numbers.steps < step:
            raise _past_end(job, numbers, step)


def _first_step(stored: StoredJob, config: JobConfig, version: int) -> int:
    """The first step that no rank has made at a version."""
    if not config.clocks:
        return config.step_of(version)
    scalars = [each.scalars for each in stored.manifests(version).values()]
    return max(int(its.get(f"{CLOCK}{rank}", 0)) for its in scalars for rank in range(config.ranks))


def _past_end(job: str, numbers: Numbers, step: int) -> UsageError:
    return UsageError(
        f"steps={numbers.steps}: job {job!r} has made {step} already. To end it now say steps={step}; to drop steps, "
        f"go back first: `psa checkpoint rollback {job} VERSION`"
    )


def newest_config(store: RedisStore, coordination: Coordination, job: str) -> JobConfig:
    """What the job is, with all its changes; Redis or ZooKeeper is brought up to date, if one of them is behind.

    Raises:
        UnknownJob: neither has such a job.
        DependencyUnreachable: Redis or ZooKeeper does not answer.
    """
    for _ in range(_TRIES_MAX):
        text, _ = store.read_job(job) or (None, None)
        there = coordination.read_config()
        if text is None:
            return there if isinstance(there, JobConfig) else read_job(store, job).config
        here = judged(job_config_from_json, text, "the job's configuration in Redis")
        if isinstance(here, Damaged):
            if not isinstance(there, JobConfig):
                raise DataIntegrity(f"job {job!r}: {here.where} is damaged, and ZooKeeper has no other: {here.why}")
            store.set_aside(here)
            store.documents(job).overwrite(config=there.to_json())
            return there
        if isinstance(there, Damaged):
            coordination.replace_config(here)
            return here
        if there is None or len(there.changes) == len(here.changes):
            return here
        if len(there.changes) < len(here.changes):
            coordination.replace_config(here)
            return here
        if store.replace_config(job, text, there.to_json()):
            return there
    raise DependencyUnreachable(f"job {job!r}: it is being changed all the time")
