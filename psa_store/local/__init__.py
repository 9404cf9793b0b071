"""One machine: private servers as child processes, and the supervision of workers and servers."""

from psa_store.local.addresses import fill_addresses
from psa_store.local.child import Place
from psa_store.local.redis_server import PrivateRedis
from psa_store.local.supervisor import Child, Role, Supervisor, Verdict, after_exit
from psa_store.local.up import Addresses, PrivateServers, down, hold_home, publish, running, up
from psa_store.local.zookeeper_server import PrivateZooKeeper

__all__ = [
    "Addresses",
    "Child",
    "Place",
    "PrivateRedis",
    "PrivateServers",
    "PrivateZooKeeper",
    "Role",
    "Supervisor",
    "Verdict",
    "after_exit",
    "down",
    "fill_addresses",
    "hold_home",
    "publish",
    "running",
    "up",
]
