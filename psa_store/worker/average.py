"""The average of the job's parameters in the model, for as long as the script evaluates with it.

Servers keep it. With stages, that of the stages is read which are held here. All of it must be of one version:

* The servers are asked, each of which sends copies of one version. Mostly none of them moves on before the gradient of
  the asking worker's rank is here, so all are at the version that the model has. The connection is not that of
  training, which is not disturbed.
* Where servers are at different versions (some moved on; always, where each push is applied on arrival), and where they
  do not answer, the newest version that is durable is read from Redis.

Used by the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from psa_store import logs
from psa_store.checkpoint.reader import read_newest
from psa_store.cluster import Plan
from psa_store.errors import Disconnected, UsageError
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, TensorRole
from psa_store.optim.slots import AVERAGE, wide_dtype
from psa_store.optim.tensors import as_bytes, to_torch
from psa_store.storage import RedisStore
from psa_store.wire import Door, Flag, Header, Hello, Kind, fetch
from psa_store.worker.flat_model import FlatModel
from psa_store.worker.membership import Membership
from psa_store.worker.script import script_line
from psa_store.worker.stages import StagedModel

_SILENT_S = 10.0
"""How long a server may be silent that is asked: one that takes over shards answers when it has them."""
_TRIES = 2


@dataclass(frozen=True, slots=True)
class _Averaged:
    version: int
    tensors: Mapping[int, Tensor]
    """By index in the layout."""


class AverageInModel:
    """``store`` and ``membership`` stay the caller's."""

    def __init__(
        self,
        config: JobConfig,
        layout: Layout,
        model: FlatModel | StagedModel,
        membership: Membership,
        store: RedisStore,
        door: Door,
    ) -> None:
        self._config = config
        self._layout = layout
        self._model = model
        self._membership = membership
        self._store = store
        self._door = door
        self._log = logs.get_logger()
        self._shown = False

    def show(self) -> AbstractContextManager[int]:
        """Let the model have the average inside; gives how many steps of each rank are in it.

        Raises:
            UsageError: the job keeps none, or gradients are on their way. In the block: what trains or writes.
        """
        if self._config.average is None:
            raise UsageError(
                f"{script_line()}: worker.average() in a job without one: psa.Worker(…, average=psa.ema(0.999))"
            )
        self.refuse("another worker.average()")
        if isinstance(self._model, StagedModel):
            return self._showing(self._model.held)
        if self._model.backward.under_way:
            self.refuse_between("backward()")
        return self._showing([self._model])

    @staticmethod
    def refuse_between(what: str) -> NoReturn:
        """Raise UsageError: gradients of the present batch are on their way since ``what``."""
        raise UsageError(
            f"{script_line()}: worker.average() between {what} and worker.step(), where servers may have made the next "
            f"step already: evaluate after worker.step(), or before {what}"
        )

    @contextmanager
    def _showing(self, held: Sequence[FlatModel]) -> Iterator[int]:
        averaged = self._read({index for each in held for index in each.trained})
        self._shown = True
        try:
            with ExitStack() as stack:
                for each in held:
                    stack.enter_context(each.evaluate(averaged.tensors))
                yield averaged.version * self._config.steps_per_version // self._config.updates_per_step
        finally:
            self._shown = False

    def refuse(self, what: str) -> None:
        """Raise UsageError if the model has the average now, which ``what`` does not go with."""
        if self._shown:
            raise UsageError(
                f"{script_line()}: {what} inside `with worker.average()`, where the model has the average of its "
                "parameters: only evaluate there"
            )

    def _read(self, wanted: Set[int]) -> _Averaged:
        """The average of these tensors."""
        if self._config.shards_keep_step:
            for _ in range(_TRIES):
                plan = self._membership.standing.plan
                with suppress(Disconnected):
                    if plan is not None and plan.owners and (found := self._from_servers(plan, wanted)) is not None:
                        return found
        stored, tensors = read_newest(self._store, self._config.name, sorted(wanted), AVERAGE)
        self._log.info("evaluating with the average of the newest durable version", version=stored.version)
        return _Averaged(stored.version, tensors)

    def _from_servers(self, plan: Plan, wanted: Set[int]) -> _Averaged | None:
        """What servers have now; None if some are at another version than others."""
        trained = self._layout.shards_of(TensorRole.TRAINED)
        shards = [shard for shard in trained if any(piece.tensor in wanted for piece in shard.pieces)]
        flat = {each.index: torch.empty(each.numel, dtype=to_torch(wide_dtype(each.dtype))) for each in shards}
        versions: set[int] = set()
        hello = Hello(self._config.name, self._layout.fingerprint, f"{self._membership.standing.member}.average", False)
        for server in plan.servers:
            pulls = [
                Header(Kind.PULL, plan.term, plan.revision, shard=shard, flags=Flag.AVERAGE)
                for shard in plan.shards_of(server.id)
                if shard in flat
            ]
            if pulls:
                places = {pull.shard: as_bytes(flat[pull.shard]) for pull in pulls}
                versions |= fetch(
                    server.address, server.local, server.host, hello, pulls, places, _SILENT_S, self._door
                )
        if len(versions) != 1:
            return None
        specs = self._layout.tensors
        tensors = {i: torch.empty(specs[i].numel, dtype=to_torch(wide_dtype(specs[i].dtype))) for i in wanted}
        for shard in shards:
            for piece in shard.pieces:
                low, high = piece.tensor_start, piece.tensor_start + piece.length
                start = piece.shard_start
                tensors[piece.tensor][low:high] = flat[shard.index][start : start + piece.length]
        return _Averaged(versions.pop(), {index: each.view(specs[index].shape) for index, each in tensors.items()})
