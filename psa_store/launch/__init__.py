"""One machine: private servers as child processes, and the supervision of workers and servers."""

from psa_store.launch.child import Place
from psa_store.launch.redis_server import PrivateRedis
from psa_store.launch.supervisor import Child, Supervisor
from psa_store.launch.up import Addresses, PrivateServers, down, fill_addresses, running, up
from psa_store.launch.zookeeper_server import PrivateZooKeeper

__all__ = [
    "Addresses",
    "Child",
    "Place",
    "PrivateRedis",
    "PrivateServers",
    "PrivateZooKeeper",
    "Supervisor",
    "down",
    "fill_addresses",
    "running",
    "up",
]
