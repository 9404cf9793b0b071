"""Starting a term: take its number, seal, only then read, only then publish. Run by the controller.

A controller that is killed between two of these lines leaves nothing that the next controller cannot start from.
"""

from __future__ import annotations

from collections.abc import Sequence

from psa_store import logs
from psa_store.cluster import Plan, TakeOver, newest_common
from psa_store.coordination import Coordination, StoredPlan
from psa_store.errors import DataIntegrity, Fenced, Rewound
from psa_store.job.document import Damaged
from psa_store.job.layout import Layout, TensorRole
from psa_store.storage import Head, RedisStore, newest_term
from psa_store.testing.failpoints import failpoint
from psa_store.testing.journal import Journal

_FROZEN_VERSION = 0


def take_over(
    action: TakeOver,
    seen: StoredPlan | Damaged | None,
    *,
    job: str,
    layout: Layout,
    coordination: Coordination,
    store: RedisStore,
    journal: Journal,
) -> Plan | None:
    """Begin a new term with these owners; None if another controller was faster.

    Raises:
        DataIntegrity: no version is common to all shards; names the shards that stand in the way.
        DependencyUnreachable: Redis or ZooKeeper did not answer; nothing is published.
    """
    failpoint("takeover.elected")
    log = logs.get_logger()
    least_term, least_revision = action.above
    every = [shard.index for shard in layout.shards]
    store.remove_foreign(job, every)
    known = newest_term(store.heads(job, every), least_term)

    # 1. A number that no term had before. Redis may know higher ones than ZooKeeper, if ZooKeeper was wiped.
    term = coordination.next_term(at_least=max(known, least_term))
    failpoint("takeover.term")
    # 2. From here on, commits of all older terms are refused: what is read next is final.
    try:
        heads = store.seal(job, every, term, layout.fingerprint)
    except Fenced as error:
        log.info("another controller is ahead", term=term, why=str(error))
        return None
    journal.record("sealed", term=term)
    failpoint("takeover.sealed")
    # 3. The version that every shard has; newer ones, which only some have, belong to the past.
    resume = resumable_version(job, layout, heads)
    try:
        store.trim(job, [shard.index for shard in layout.versioned], term, resume)
    except (Fenced, Rewound) as error:
        log.info("overtaken after sealing", term=term, why=str(error))
        return None
    failpoint("takeover.trimmed")
    # 4. Published by compare-and-set: of two controllers that came this far, one wins.
    plan = Plan(
        term=term,
        revision=least_revision + 1,
        resume=resume,
        servers=action.servers,
        owners=action.owners,
        cells=action.cells,
        stages=action.stages,
    )
    if coordination.write_plan(plan, seen) is None:
        return None
    journal.record("published", term=term, resume=resume, servers=[server.id for server in plan.servers])
    failpoint("takeover.published")
    log.info("new term", term=term, resume=resume, servers=len(plan.servers), why=action.reason)
    return plan


def resumable_version(job: str, layout: Layout, heads: Sequence[Head]) -> int:
    """The newest version that all versioned shards have, given that the frozen ones are whole.

    Raises:
        DataIntegrity: there is none.
    """
    versions = {head.shard: [manifest.version for manifest in head.manifests] for head in heads}
    foreign = [head.shard for head in heads if head.manifests and head.layout != layout.fingerprint]
    if foreign:
        raise DataIntegrity(f"job {job!r}: shards {foreign} were written with another layout. Restore them.")
    broken = [s.index for s in layout.shards_of(TensorRole.FROZEN) if _FROZEN_VERSION not in versions[s.index]]
    changing = {shard.index: versions[shard.index] for shard in layout.versioned}
    resume = newest_common(changing) if changing else _FROZEN_VERSION
    if broken or resume is None:
        empty = broken or [shard for shard, has in changing.items() if not has]
        detail = f"shards {empty} have no undamaged version" if empty else f"versions by shard: {changing}"
        raise DataIntegrity(
            f"job {job!r}: no version is common to all shards ({detail}). "
            "Restore Redis from its backup, or start over under another job name."
        )
    return resume
