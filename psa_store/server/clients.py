"""The workers that are connected, and the memory in which they see parameters. Used by the event loop's thread only."""

from __future__ import annotations

from torch import Tensor

from psa_store.errors import Refused
from psa_store.job.layout import Layout, TensorRole
from psa_store.job.wire_layout import WireLayout
from psa_store.server.shard import tensor_in
from psa_store.wire import Connection, SharedMemory


class Client:
    """One worker. ``by_reference``: it is on this host and shares memory with this server, in both directions."""

    def __init__(self, connection: Connection, member: str, by_reference: bool) -> None:
        self.connection = connection
        self.member = member
        self.by_reference = by_reference
        self.reading: int | None = None
        """The version that its model shows right now, in memory of this server."""
        self.generation: int | None = None
        """Which memory of this server it has the descriptor of; None: none yet."""
        self.gradients: dict[int, dict[int, Tensor]] = {}
        """By number of the worker's memory and by shard: where its gradients lie."""

    def share(self, number: int, layout: Layout, wire: WireLayout, memories_max: int) -> None:
        """Take the memory for gradients that came with a SHARE.

        Raises:
            Refused: there is none, it is too small or may shrink, or there are more than a step has gradients.
        """
        descriptor = self.connection.take_descriptor()
        if descriptor is None:
            raise Refused("SHARE without a descriptor")
        memory = SharedMemory.attach(descriptor, wire.gradient_bytes)
        if not self.by_reference or number >= memories_max or number in self.gradients:
            raise Refused(f"SHARE of memory {number}, which is out of order here")
        trained = layout.shards_of(TensorRole.TRAINED)
        self.gradients[number] = {shard.index: tensor_in(memory, shard, wire) for shard in trained}


class SharedParameters:
    """The present memory and its generation, which grows with every new one, and the workers that are connected."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        self.generation = 0
        self.clients: dict[Connection, Client] = {}

    def move_to(self, memory: SharedMemory) -> None:
        """Publish here from now on. No worker has this memory yet, and what was shown before changes no more."""
        self.memory = memory
        self.generation += 1
        for client in self.clients.values():
            client.reading = None
