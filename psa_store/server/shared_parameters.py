"""Where a server publishes its parameters, and which workers see them there. Used by the event loop's thread only."""

from __future__ import annotations

from psa_store.server.client import Client
from psa_store.wire import Connection, SharedMemory


class SharedParameters:
    """The present memory and its generation, which grows with every new one, and the workers that are connected."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        self.generation = 0
        self.clients: dict[Connection, Client] = {}

    def move_to(self, memory: SharedMemory) -> None:
        """Publish here from now on. Nobody has this memory yet, and what was shown before will not change any more."""
        self.memory = memory
        self.generation += 1
        for client in self.clients.values():
            client.reading = None

    def readers(self) -> list[Client]:
        """The workers that see the present version in the present memory."""
        return [client for client in self.clients.values() if client.reading is not None]
