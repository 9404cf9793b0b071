"""The server role: owns shards, reduces gradients, applies the optimizer, commits versions; one is the controller."""

from psa_store.server.main import serve

__all__ = ["serve"]
