"""The state of the ranks that a worker holds: its tensors, and their way to servers and back as bytes.

What is in it says :mod:`psa_store.optim.rank_state`; whether a push brings it, :mod:`psa_store.consistency.rank_state`.
Used by the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from psa_store import logs
from psa_store.consistency import push_brings_rank_state
from psa_store.errors import Refused
from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import Shard, TensorRole
from psa_store.observe.formatting import numbered
from psa_store.optim.rank_state import COUNT_BYTES, RankState, rank_state_of
from psa_store.optim.tensors import name_of, to_torch
from psa_store.worker.server_connections import Answer
from psa_store.worker.session import PlanSession, Tools


class RankMemory:
    """One rank's state. ``parts``: by shard, its tensors by name; computing changes them in place."""

    def __init__(self, parts: Mapping[int, dict[str, Tensor]]) -> None:
        self.parts = parts
        self.updates = 0
        """How many updates the optimizer's state has behind it."""

    def pack(self, shard: Shard, state: RankState) -> Tensor:
        """The bytes for servers, uint8. What is rounded in them is rounded here, too, so that both go on alike."""
        payload = torch.empty(state.size_bytes, dtype=torch.uint8)
        low = 0
        for name, dtype in state.parts:
            place = payload[low : low + state.numel * ITEM_BYTES[dtype]]
            tensor = self.parts[shard.index][name]
            if name_of(tensor.dtype) == dtype:
                place.copy_(tensor.view(torch.uint8))
            else:
                rounded = tensor.to(to_torch(dtype))
                place.copy_(rounded.view(torch.uint8))
                tensor.copy_(rounded)
            low += len(place)
        payload[low:].copy_(torch.from_numpy(np.array([self.updates], dtype="<i8").view(np.uint8)))
        return payload

    def unpack(self, shard: Shard, state: RankState, payload: memoryview) -> None:
        """Take over what servers kept.

        Raises:
            Refused: it has another length.
        """
        if len(payload) != state.size_bytes:
            raise Refused(f"STATE of {len(payload)} bytes for shard {shard.index}, which has {state.size_bytes}")
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        low = 0
        for name, dtype in state.parts:
            high = low + state.numel * ITEM_BYTES[dtype]
            tensor = self.parts[shard.index][name]
            whole = torch.empty(state.numel, dtype=to_torch(dtype))
            whole.view(torch.uint8).copy_(data[low:high])
            tensor.copy_(whole)
            low = high
        self.updates = int(np.frombuffer(payload[low : low + COUNT_BYTES], dtype="<i8")[0])


class RankStates:
    """What servers keep of each rank, by shard: pushed when it is due, pulled where a term begins."""

    def __init__(self, tools: Tools, session: PlanSession) -> None:
        self._config = tools.config
        self._shards = tools.layout.shards
        self._servers = tools.servers
        self._session = session
        self._log = logs.get_logger()
        states = {s.index: rank_state_of(tools.config, s) for s in tools.layout.shards_of(TensorRole.TRAINED)}
        self.kept = {shard: state for shard, state in states.items() if state is not None}
        """By trained shard, how it looks; without those of which servers keep nothing."""
        self._expected: dict[tuple[int, int], RankMemory] = {}
        """By rank and shard, where the answer of a server goes."""

    def are_due(self, version: int) -> bool:
        """Whether the pushes that make ``version`` bring them."""
        return push_brings_rank_state(self._config, version, self._session.last_version)

    def pack(self, shard: int, memory: RankMemory) -> Tensor:
        """The bytes of a rank's state in a shard."""
        return memory.pack(self._shards[shard], self.kept[shard])

    def pull(self, version: int, memories: Mapping[int, RankMemory]) -> bool:
        """Have in ``memories``, by rank, what servers keep where the term begins; False if it is over before.

        Nothing has been pushed for these ranks in this term, so servers still stand there.
        """
        self._expected = {
            (rank, shard): memory for rank, memory in memories.items() for shard in self.kept if shard in memory.parts
        }

        def send() -> None:
            for rank, shard in self._expected:
                self._servers.pull_state(shard, version, rank)

        def what() -> str:
            late = numbered("rank", sorted({rank for rank, _ in self._expected}))
            return f"servers to bring the state of {late} at version {version}"

        return self._session.ask(send, lambda: not self._expected, self._session.term_is_over, what)

    def take(self, answer: Answer) -> None:
        """STATE has come: of no length where a rank has no state yet."""
        shard = answer.header.shard
        memory = self._expected.pop((answer.header.rank, shard), None)
        if memory is not None and len(answer.payload):
            memory.unpack(self._shards[shard], self.kept[shard], answer.payload)
        elif memory is not None and answer.header.step > 0:
            self._log.warning(
                "a rank begins with new state: the job had ended between two commits of that",
                rank=answer.header.rank,
                shard=shard,
                version=answer.header.step,
            )
