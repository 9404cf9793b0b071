"""The door to ZooKeeper, and the only package that imports kazoo: who is alive, who is elected, what the plan is."""

from psa_store.coordination.barrier import Barrier, BarrierState
from psa_store.coordination.coordination import Coordination, MemberKind, Versioned
from psa_store.coordination.examination import ZooKeeperMember, examine_zookeeper, greet_zookeeper

__all__ = [
    "Barrier",
    "BarrierState",
    "Coordination",
    "MemberKind",
    "Versioned",
    "ZooKeeperMember",
    "examine_zookeeper",
    "greet_zookeeper",
]
