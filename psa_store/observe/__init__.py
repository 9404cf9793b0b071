"""What a process publishes about itself while it runs: heartbeats, events and the curve in Redis, and a small HTTP
endpoint.

Nothing here is needed for training, and nothing here may disturb it: one thread of its own, connections of its own, and
what cannot be written in time is not written.
"""

from psa_store.observe.endpoint import Endpoint
from psa_store.observe.events import Event, EventKind, Events
from psa_store.observe.health import Activity, Health
from psa_store.observe.history import JobHistory, add_if_possible
from psa_store.observe.monitor import Monitor
from psa_store.observe.page.page import Page

__all__ = [
    "Activity",
    "Endpoint",
    "Event",
    "EventKind",
    "Events",
    "Health",
    "JobHistory",
    "Monitor",
    "Page",
    "add_if_possible",
]
