"""Back to an older version, of a job that runs or rests: the same steps as a take-over, with one more in the middle.

Take a term, seal, put the version in its place and drop what is newer, publish a plan that begins there. Servers that
live follow it as they would after a death; where none does, the next one finds what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from psa_store import logs
from psa_store.checkpoint.catalog import read_job
from psa_store.checkpoint.reader import find_damage
from psa_store.coordination import Coordination, known_plan
from psa_store.errors import DataIntegrity, DependencyUnreachable, Fenced, Rewound
from psa_store.storage import RedisStore, newest_term
from psa_store.testing.failpoints import failpoint

_TRIES_MAX = 10
"""Each fails only if a controller took a term meanwhile."""


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Where a job stands now."""

    version: int
    term: int


def rollback(store: RedisStore, coordination: Coordination, job: str, what: str) -> RolledBack:
    """Return to a checkpoint, or to a version that is still stored. Its bytes are checked before anything is changed.

    Raises:
        UsageError: there is no such checkpoint or version.
        DataIntegrity: it is damaged; nothing was changed.
        DependencyUnreachable: Redis or ZooKeeper does not answer, or other terms began all the time. Its status shows
            whether the job has gone back.
    """
    damage = find_damage(store, job, what)
    if damage:
        raise DataIntegrity(f"job {job!r}: {what} is damaged, the job stays as it is: {'; '.join(damage)}")
    log = logs.get_logger()
    for _ in range(_TRIES_MAX):
        stored = read_job(store, job)
        stored.manifests(what)
        version = stored.version_of(what)
        name = what if what in stored.checkpoints else None
        seen = coordination.read_plan()
        before = known_plan(seen)
        published = before.term if before else 0
        term = coordination.next_term(at_least=max(newest_term(stored.heads.values(), published), published))
        try:
            store.seal(job, stored.heads, term, stored.layout.fingerprint)
            store.unwind(job, [shard.index for shard in stored.layout.versioned], term, version, name)
        except (Fenced, Rewound) as error:
            log.info("a controller was faster: again", term=term, why=str(error))
            continue
        failpoint("rollback.unwound")
        done = RolledBack(version, term)
        if seen is None or before is None or not before.owners:
            return done
        if coordination.write_plan(before.begun_again(term, version), seen) is not None:
            return done
    raise DependencyUnreachable(
        f"job {job!r}: {_TRIES_MAX} terms began while it was to go back to {what}. See `psa status {job}`, and repeat."
    )
