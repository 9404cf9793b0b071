"""The log of a process, without secrets. Every room may use it."""

from psa_store.logs.secrets import hide_passwords, printable, printable_hosts
from psa_store.logs.setup import Log, complain, configure, configure_once, get_logger, identify
from psa_store.logs.title import entitle

__all__ = [
    "Log",
    "complain",
    "configure",
    "configure_once",
    "entitle",
    "get_logger",
    "hide_passwords",
    "identify",
    "printable",
    "printable_hosts",
]
