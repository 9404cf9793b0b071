"""What a process says of itself: its log, and its vitals. Everyone may use it."""

from psa_store.telemetry.logs import Log, configure, get_logger
from psa_store.telemetry.vitals import VITALS, Kind, Role, Vital, Vitals

__all__ = ["VITALS", "Kind", "Log", "Role", "Vital", "Vitals", "configure", "get_logger"]
