"""The door to ZooKeeper, and the only package that imports kazoo: who is alive, who is elected, what the plan is."""

from psa_store.coordination.coordination import Coordination, MemberKind, Versioned

__all__ = ["Coordination", "MemberKind", "Versioned"]
