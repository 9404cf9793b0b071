"""One machine: private servers as child processes, and the supervision of workers and servers."""

from psa_store.launch.child import Place
from psa_store.launch.redis_server import PrivateRedis
from psa_store.launch.supervisor import Child, Supervisor
from psa_store.launch.up import PrivateServers, down, up
from psa_store.launch.zookeeper_server import PrivateZooKeeper

__all__ = [
    "Child",
    "Place",
    "PrivateRedis",
    "PrivateServers",
    "PrivateZooKeeper",
    "Supervisor",
    "down",
    "up",
]
