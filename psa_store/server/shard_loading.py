"""Reading the shards of a term from Redis, at the version where it begins, into memory from which they are served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from psa_store import logs
from psa_store.checkpoint.change import newest_config
from psa_store.cluster import Plan, newest_common
from psa_store.compression import NONE
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, Fenced, Rewound
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, TensorRole
from psa_store.job.wire_layout import WireLayout
from psa_store.optim.history import OptimizerHistory, of_servers
from psa_store.server.messages import Released
from psa_store.server.shard import OwnedShard
from psa_store.storage import Head, RedisStore
from psa_store.testing.journal import Journal
from psa_store.wire import SharedMemory

_LOADERS = 4


class NotLoaded(Exception):
    """The shards cannot be served in this term: another is needed first. The text says why."""


class ShardLoader:
    """Loads shards of one job. Used by the plan follower's thread."""

    def __init__(
        self,
        config: JobConfig,
        layout: Layout,
        wire: WireLayout,
        store: RedisStore,
        coordination: Coordination,
        journal: Journal,
    ) -> None:
        self._config = config
        self._job = config.name
        self._layout = layout
        self._wire = wire
        self._coordination = coordination
        self._store = store
        self._journal = journal
        self._log = logs.get_logger()

    def history(self) -> OptimizerHistory:
        """What servers apply in the term that begins, with all changes; raises DependencyUnreachable."""
        return of_servers(newest_config(self._store, self._coordination, self._job))

    def load(
        self, plan: Plan, shards: Sequence[int], held: Released, memory: SharedMemory, history: OptimizerHistory
    ) -> dict[int, OwnedShard]:
        """Read these shards. ``held``: what this server served before, and need not read again.

        Raises:
            NotLoaded: the term cannot be served; a damaged version was put aside for an older one, perhaps.
            DataIntegrity: a shard is damaged and nothing older can replace it. Nothing was changed.
        """
        heads = {head.shard: head for head in self._store.heads(self._job, shards)}
        if any(head.term != plan.term or head.manifest(self._version(i, plan)) is None for i, head in heads.items()):
            raise NotLoaded("the shards in Redis are not as the plan left them")
        with ThreadPoolExecutor(_LOADERS, thread_name_prefix="psa-load") as loaders:
            load = partial(self._load_one, plan=plan, held=held, memory=memory, history=history)
            found = list(loaders.map(load, [heads[index] for index in shards]))
        damaged = [each for each in found if isinstance(each, NotLoaded)]
        if damaged:
            raise damaged[0]
        owned_shards = {owned.shard.index: owned for owned in found if isinstance(owned, OwnedShard)}
        for owned in owned_shards.values():
            owned.history = history
        return owned_shards

    def _version(self, shard: int, plan: Plan) -> int:
        return 0 if self._layout.shards[shard].role is TensorRole.FROZEN else plan.resume

    def _load_one(
        self, head: Head, plan: Plan, held: Released, memory: SharedMemory, history: OptimizerHistory
    ) -> OwnedShard | NotLoaded:
        version = self._version(head.shard, plan)
        manifest = head.manifest(version)
        assert manifest is not None
        kept = held.owned_shards.get(head.shard)
        if kept is not None and kept.committed == manifest and held.version in (plan.resume, 0):
            kept.drop_pushes()
            kept.move_to(memory)  # not in place: workers may still be reading the old term's
            return kept  # a hand-over: it stands where the term begins, with what Redis holds
        config = self._config
        owned = OwnedShard(
            self._layout.shards[head.shard],
            self._layout,
            self._wire,
            history.at(0),
            memory,
            config.clocks,
            movements=config.compression if config.publishes_movements else NONE,
            seed=config.seed,
            average=config.average,
        )
        try:
            self._store.load(self._job, head.shard, manifest, owned.places(manifest))
        except DataIntegrity as error:
            if owned.shard.role is TensorRole.FROZEN or not self._older_version_exists(plan):
                raise
            return self._put_aside(head.shard, plan, version, error)
        owned.loaded(manifest)
        return owned

    def _put_aside(self, shard: int, plan: Plan, version: int, error: DataIntegrity) -> NotLoaded:
        """Mark a version as damaged: the next term begins at an older one."""
        self._log.error("a damaged version is put aside", version=version, why=str(error))
        try:
            self._store.mark_corrupt(self._job, shard, plan.term, version)
        except (Fenced, Rewound) as late:
            self._log.info("overtaken while loading", term=plan.term, why=str(late))
            return NotLoaded(str(late))
        self._journal.record("marked_corrupt", term=plan.term, shard=shard, version=version)
        return NotLoaded(str(error))

    def _older_version_exists(self, plan: Plan) -> bool:
        """Whether all shards share a version other than the one at which this term began."""
        heads = self._store.heads(self._job, [shard.index for shard in self._layout.versioned])
        versions: Mapping[int, set[int]] = {h.shard: {m.version for m in h.manifests} - {plan.resume} for h in heads}
        return newest_common(versions) is not None
