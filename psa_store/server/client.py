"""What a server knows of one worker that is connected to it. Used by the event loop's thread only."""

from __future__ import annotations

from torch import Tensor

from psa_store.errors import Refused
from psa_store.job.layout import Shard
from psa_store.job.wire_layout import WireLayout
from psa_store.server.shard import tensor_in
from psa_store.wire import Connection, SharedMemory


class Client:
    """``by_reference``: the worker is on this host and shares memory with us, in both directions."""

    def __init__(self, connection: Connection, member: str, by_reference: bool) -> None:
        self.connection = connection
        self.member = member
        self.by_reference = by_reference
        self.reading: int | None = None
        """The version that its model shows right now, in our memory."""
        self.generation = 0
        """Which of our memories it has the descriptor of; 0: none yet."""
        self._memories: dict[int, SharedMemory] = {}
        self._views: dict[tuple[int, int], Tensor] = {}

    def share(self, number: int, wire: WireLayout, memories_max: int) -> None:
        """Take the memory for gradients that came with a SHARE.

        Raises:
            Refused: there is none, it is too small or may shrink, or there are more than the job has ranks.
        """
        descriptor = self.connection.take_descriptor()
        if descriptor is None:
            raise Refused("SHARE without a descriptor")
        memory = SharedMemory.attach(descriptor, wire.gradient_bytes)
        if not self.by_reference or number >= memories_max or number in self._memories:
            raise Refused(f"SHARE of memory {number}, which is out of order here")
        self._memories[number] = memory

    def gradient(self, number: int, shard: Shard, wire: WireLayout) -> Tensor:
        """A shard's gradient in the worker's memory; raises Refused if that memory was never shared."""
        view = self._views.get((number, shard.index))
        if view is None:
            if number not in self._memories:
                raise Refused(f"PUSH from memory {number}, which was not shared")
            view = self._views[number, shard.index] = tensor_in(self._memories[number], shard, wire)
        return view
