"""The door to ZooKeeper, and the only room that imports kazoo: which processes live, which is elected, the plan."""

from psa_store.coordination.barrier import Barrier, BarrierState
from psa_store.coordination.coordination import Coordination, StoredPlan
from psa_store.coordination.examination import ZooKeeperMember, examine_zookeeper, probe_zookeeper
from psa_store.coordination.request import CheckpointRequest
from psa_store.coordination.session import Lease

__all__ = [
    "Barrier",
    "BarrierState",
    "CheckpointRequest",
    "Coordination",
    "Lease",
    "StoredPlan",
    "ZooKeeperMember",
    "examine_zookeeper",
    "probe_zookeeper",
]
