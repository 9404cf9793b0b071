"""The door to ZooKeeper, and the only room that imports kazoo: which processes live, which is elected, the plan."""

from psa_store.coordination.access import Access, access_of, as_access
from psa_store.coordination.barrier import Barrier, BarrierState
from psa_store.coordination.coordination import Coordination, StoredPlan, known_plan
from psa_store.coordination.examination import ZooKeeperMember, examine_zookeeper, probe_zookeeper
from psa_store.coordination.ownership import close_to_others
from psa_store.coordination.request import CheckpointRequest
from psa_store.coordination.session import Lease, SessionState

__all__ = [
    "Access",
    "Barrier",
    "BarrierState",
    "CheckpointRequest",
    "Coordination",
    "Lease",
    "SessionState",
    "StoredPlan",
    "ZooKeeperMember",
    "access_of",
    "as_access",
    "close_to_others",
    "examine_zookeeper",
    "known_plan",
    "probe_zookeeper",
]
