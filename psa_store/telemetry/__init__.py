"""What a process says of itself: its log, and its vitals. Everyone may use it."""

from psa_store.telemetry.logs import Log, complain, configure, get_logger, identify
from psa_store.telemetry.secrets import hide_passwords, printable
from psa_store.telemetry.vitals import VITALS, Kind, Role, Vital, Vitals

__all__ = [
    "VITALS",
    "Kind",
    "Log",
    "Role",
    "Vital",
    "Vitals",
    "complain",
    "configure",
    "get_logger",
    "hide_passwords",
    "identify",
    "printable",
]
