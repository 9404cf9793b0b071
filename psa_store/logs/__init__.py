"""The log of a process, without secrets. Every room may use it."""

from psa_store.logs.account import Account
from psa_store.logs.escape import escaped
from psa_store.logs.secrets import HIDDEN, hide_passwords, names_secret, printable, printable_hosts
from psa_store.logs.setup import Log, complain, configure, configure_once, get_logger, identify
from psa_store.logs.title import entitle
from psa_store.logs.waits import Wait, Waits

__all__ = [
    "HIDDEN",
    "Account",
    "Log",
    "Wait",
    "Waits",
    "complain",
    "configure",
    "configure_once",
    "entitle",
    "escaped",
    "get_logger",
    "hide_passwords",
    "identify",
    "names_secret",
    "printable",
    "printable_hosts",
]
