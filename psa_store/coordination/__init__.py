"""The door to ZooKeeper, and the only package that imports kazoo: who is alive, who is elected, what the plan is."""

from psa_store.coordination.barrier import Barrier, BarrierState
from psa_store.coordination.coordination import Coordination, Versioned
from psa_store.coordination.examination import ZooKeeperMember, examine_zookeeper, probe_zookeeper

__all__ = [
    "Barrier",
    "BarrierState",
    "Coordination",
    "Versioned",
    "ZooKeeperMember",
    "examine_zookeeper",
    "probe_zookeeper",
]
